"""From messages as clients send them to messages as chat templates expect them.

* Everything becomes plain JSON types; fields that are null are left out, as are empty lists of tool calls: many
  templates ask only whether a field is there.
* `content` is text or a list of parts. A template that reads only text gets the parts' texts joined by line breaks;
  one that reads only parts gets text as one part; one that reads both gets what was sent.
* The arguments of a tool call come as JSON text. Templates want the object, which they get; those that print it or add
  it to a string want the text, and for them the object reads as the text that was sent.
* `developer` is another name of `system`, unless the template knows it.
* Past reasoning has three names among clients and templates; a template finds it under each (as in transformers).

This file does not know jinja2 or any template.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from enum import StrEnum
from typing import Final

from tllm.core.errors import RequestError

_TEXT_PARTS: Final = {"text": "text", "input_text": "text", "output_text": "text", "refusal": "refusal"}
_REASONING_NAMES: Final = ("reasoning_content", "thinking", "reasoning")

Message = dict[str, object]


class ContentFormat(StrEnum):
    """What a template can make of `content`."""

    TEXT = "text"
    PARTS = "parts"
    EITHER = "either"


class Arguments(dict[str, object]):
    """The arguments of a tool call: an object for templates, and its own JSON text wherever text is asked for."""

    __slots__ = ("_text",)

    def __init__(self, values: Mapping[str, object], text: str) -> None:
        super().__init__(values)
        self._text = text

    def __str__(self) -> str:
        return self._text

    def __add__(self, other: object) -> str:
        return self._text + other if isinstance(other, str) else NotImplemented

    def __radd__(self, other: object) -> str:
        return other + self._text if isinstance(other, str) else NotImplemented


def plain(value: object) -> object:
    """`value` rebuilt from dicts, lists and exact JSON scalars, which have no methods of ours.

    A value of another kind is a bug of the caller: TypeError.
    """
    match value:
        case None | bool():
            return value
        case str():
            return str.__str__(value)
        case int():
            return int(value)
        case float():
            return float(value)
        case Arguments():
            return value
        case Mapping():
            return {str(key): plain(item) for key, item in value.items()}
        case Sequence() if not isinstance(value, (bytes, bytearray, memoryview)):
            return [plain(item) for item in value]
        case _:
            raise TypeError(f"a chat template takes JSON values, not {type(value).__name__}")


def normalised(
    messages: Sequence[Mapping[str, object]], *, formats: Mapping[str, ContentFormat], knows_developer: bool
) -> list[Message]:
    """New messages by the rules above; `formats` has the content format of each role, TEXT for those it lacks.

    Raises RequestError naming the message's field.
    """
    if not messages:
        raise RequestError("messages is empty; give at least one message.", param="messages")
    return [
        _normalised(message, f"messages[{index}]", formats=formats, knows_developer=knows_developer)
        for index, message in enumerate(messages)
    ]


def _normalised(
    message: Mapping[str, object], where: str, *, formats: Mapping[str, ContentFormat], knows_developer: bool
) -> Message:
    if not isinstance(message, Mapping):
        raise RequestError(f"{where} is a {type(message).__name__}; an object with a role is needed.", param=where)
    result: Message = {str(key): plain(value) for key, value in message.items() if value is not None}
    role = result.get("role")
    if not isinstance(role, str):
        raise RequestError(f"{where}.role must be a string such as user or assistant.", param=f"{where}.role")
    if role == "developer" and not knows_developer:
        role = result["role"] = "system"
    if "content" in result:
        result["content"] = _content(result["content"], f"{where}.content", formats.get(role, ContentFormat.TEXT))
    if "tool_calls" in result:
        calls = _tool_calls(result["tool_calls"], f"{where}.tool_calls")
        if calls:
            result["tool_calls"] = calls
        else:
            del result["tool_calls"]
    reasoning = next((result[name] for name in _REASONING_NAMES if name in result), None)
    if reasoning is not None:
        result = {"thinking": reasoning, **result, "reasoning_content": reasoning}
    return result


def _content(content: object, where: str, form: ContentFormat) -> str | list[Message]:
    if isinstance(content, str):
        return [{"type": "text", "text": content}] if form is ContentFormat.PARTS else content
    if not isinstance(content, list):
        raise RequestError(
            f"{where} is a {type(content).__name__}; a string or a list of parts is needed.", param=where
        )
    texts = [_part_text(part, f"{where}[{index}]") for index, part in enumerate(content)]
    if form is ContentFormat.TEXT:
        return "\n".join(texts)
    return [{"type": "text", "text": text} for text in texts]


def _part_text(part: object, where: str) -> str:
    if isinstance(part, str):
        return part
    kind = part.get("type") if isinstance(part, dict) else None
    if not isinstance(part, dict) or not isinstance(kind, str):
        raise RequestError(f"{where} must be an object with a type.", param=where)
    field = _TEXT_PARTS.get(kind)
    if field is None:
        raise RequestError(
            f"{where} has type {kind!r}; this model takes text alone ({', '.join(_TEXT_PARTS)}).", param=where
        )
    text = part.get(field)
    if not isinstance(text, str):
        raise RequestError(f"{where}.{field} must be a string.", param=f"{where}.{field}")
    return text


def _tool_calls(calls: object, where: str) -> list[object]:
    if not isinstance(calls, list):
        raise RequestError(f"{where} is a {type(calls).__name__}; a list is needed.", param=where)
    return [_tool_call(call, f"{where}[{index}]") for index, call in enumerate(calls)]


def _tool_call(call: object, where: str) -> object:
    match call:
        case {"function": {"arguments": str(text)}}:
            assert isinstance(call, dict)
            return {
                **call,
                "function": {**call["function"], "arguments": _arguments(text, f"{where}.function.arguments")},
            }
        case dict():
            return call
        case _:
            raise RequestError(f"{where} is a {type(call).__name__}; an object is needed.", param=where)


def _arguments(text: str, where: str) -> Arguments:
    try:
        value = json.loads(text) if text.strip() else {}  # some clients send no text where there are no arguments
    except (ValueError, RecursionError) as error:
        raise RequestError(f"{where} is not JSON: {error}", param=where) from error
    if not isinstance(value, dict):
        raise RequestError(f"{where} is a JSON {type(value).__name__}; an object is needed.", param=where)
    return Arguments(value, text if text.strip() else "{}")
