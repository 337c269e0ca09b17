"""From a conversation to the prompt that the model was trained to see, by the checkpoint's own chat template.

Renders what transformers' `apply_chat_template` renders (golden tests hold it to that), and takes the messages that
OpenAI's clients send; `messages.py` has the differences between the two. What a template can read (text, parts, or
both, for each role) is found out by rendering a short conversation both ways, once, when the template is opened.

This file does not know tokens, requests, or how a template is kept from doing harm.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from typing import Final

import jinja2

from tllm.core.errors import ModelError, RequestError
from tllm.text.messages import ContentFormat, Message, normalised, plain
from tllm.text.sandbox import OutputLimitError, Program, StepLimitError, TemplateRefusal
from tllm.text.tokenizer import Tokenizer

# Given by `render` itself, so they cannot be among a request's own variables.
RESERVED_VARIABLES: Final = frozenset(
    {"messages", "tools", "add_generation_prompt", "continue_final_message", "raise_exception", "strftime_now"}
)

# A long conversation with many tools takes thousands of steps; this many take a few seconds.
_MAX_STEPS: Final = 5_000_000
_MAX_CHARS: Final = 16 * 2**20

# Stands at the end of the message to be continued. Templates that trim the message take the space with them.
_END_MARK: Final = "THE-MODEL-GOES-ON-FROM-HERE "

_PROBE: Final = "probe-of-content"

# What the expressions of a template can raise beside jinja2's own errors.
_FAILURES: Final = (
    jinja2.TemplateError,
    ArithmeticError,
    AttributeError,
    LookupError,
    MemoryError,
    RuntimeError,  # RecursionError among them
    TypeError,
    ValueError,
)


class ChatTemplate:
    """One checkpoint's chat template. Immutable; may render in several threads at once."""

    def __init__(
        self,
        source: str,
        tokenizer: Tokenizer,
        *,
        tool_source: str | None = None,
        now: Callable[[], datetime] = datetime.now,
        max_steps: int = _MAX_STEPS,
        max_chars: int = _MAX_CHARS,
    ) -> None:
        """`tool_source` is rendered instead for requests with tools; `now` is the clock that templates may read.

        Raises ModelError if a source is not a template, or does not end even for a few words.
        """
        self.source = source
        self._special_tokens = tokenizer.special_tokens
        self._default = _Variant(source, self._special_tokens, now=now, max_steps=max_steps, max_chars=max_chars)
        self._for_tools = (
            self._default
            if tool_source is None
            else _Variant(tool_source, self._special_tokens, now=now, max_steps=max_steps, max_chars=max_chars)
        )

    @classmethod
    def of(cls, tokenizer: Tokenizer) -> ChatTemplate | None:
        """The template that came with the tokenizer, or None. Raises ModelError if it is broken."""
        if tokenizer.chat_template is None:
            return None
        return cls(tokenizer.chat_template, tokenizer, tool_source=tokenizer.tool_template)

    def render(
        self,
        messages: Sequence[Mapping[str, object]],
        *,
        tools: Sequence[Mapping[str, object]] | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        **variables: object,
    ) -> str:
        """The prompt's text, with every special token in it: encode it with `add_special_tokens=False`.

        `continue_final_message` leaves the last message open, for the model to go on with. `variables` are what the
        template may ask for beside (`enable_thinking`, `documents`, ...), JSON values all, none of RESERVED_VARIABLES;
        they stand above the special tokens' names.

        Raises RequestError where the messages are malformed or the template refuses them or cannot render them, and
        ModelError where the template itself does what it may not, or does not end.
        """
        if continue_final_message and add_generation_prompt:
            raise RequestError(
                "continue_final_message and add_generation_prompt exclude each other: the first goes on with the last "
                "message, the second begins a new one. Set one of them to false.",
                param="add_generation_prompt",
            )
        try:
            values = {name: plain(value) for name, value in variables.items()}
            plain_tools = None if tools is None else [plain(tool) for tool in tools]
            variant = self._default if tools is None else self._for_tools
            chat = normalised(messages, formats=variant.formats, knows_developer=variant.knows_developer)
        except RecursionError as error:
            raise RequestError("The messages or tools are nested too deeply.", param="messages") from error
        ending = _mark_end(chat[-1]) if continue_final_message else None
        text = variant.render(
            {
                "documents": None,
                **self._special_tokens,
                **values,
                "messages": chat,
                "tools": plain_tools,
                "add_generation_prompt": add_generation_prompt,
            }
        )
        return text if ending is None else _cut_at_mark(text, ending)


class _Variant:
    """One template source, and what it can read."""

    def __init__(
        self,
        source: str,
        special_tokens: Mapping[str, str],
        *,
        now: Callable[[], datetime],
        max_steps: int,
        max_chars: int,
    ) -> None:
        try:
            self._program = Program(source, now=now, max_steps=max_steps, max_chars=max_chars)
        except jinja2.TemplateSyntaxError as error:
            raise ModelError(f"The chat template is not valid jinja2: line {error.lineno}: {error.message}") from error
        except RecursionError as error:
            raise ModelError("The chat template is nested too deeply.") from error
        self._special_tokens = special_tokens
        self.knows_developer = "developer" in source
        self.formats = self._probe()

    def render(self, variables: Mapping[str, object]) -> str:
        try:
            return self._program.render(variables)
        except TemplateRefusal as error:
            raise RequestError(
                f"The model's chat template refuses these messages: {error}", param="messages"
            ) from error
        except OutputLimitError as error:
            raise RequestError(f"The chat template gave up on these messages: {error}.", param="messages") from error
        except (StepLimitError, MemoryError, jinja2.exceptions.SecurityError) as error:
            raise ModelError(f"The model's chat template was stopped: {error}.") from error
        except _FAILURES as error:
            raise RequestError(
                f"The model's chat template cannot render these messages: {error}", param="messages"
            ) from error

    def _probe(self) -> dict[str, ContentFormat]:
        """What each role's content may be. TEXT where neither renders: the real messages will show why."""
        asks: Message = {"role": "user", "content": "a"}
        formats = {"user": self._probe_role((), "user", ())}
        if formats["user"] is ContentFormat.PARTS:
            asks = {"role": "user", "content": [{"type": "text", "text": "a"}]}
        calls: Message = {
            "role": "assistant",
            "tool_calls": [{"id": "call00000", "type": "function", "function": {"name": "f", "arguments": {}}}],
        }
        formats["system"] = self._probe_role((), "system", (asks,))
        formats["developer"] = self._probe_role((), "developer", (asks,))
        formats["assistant"] = self._probe_role((asks,), "assistant", (asks,))
        formats["tool"] = self._probe_role((asks, calls), "tool", ())
        return formats

    def _probe_role(self, before: tuple[Message, ...], role: str, after: tuple[Message, ...]) -> ContentFormat:
        parts = [{"type": "text", "text": _PROBE}]
        from_text = self._try((*before, _probe_message(role, _PROBE), *after))
        from_parts = self._try((*before, _probe_message(role, parts), *after))
        if _PROBE in from_text:
            return ContentFormat.EITHER if from_text == from_parts else ContentFormat.TEXT
        # The list printed as such is no reading of it.
        is_read = _PROBE in from_parts and f"'{_PROBE}'" not in from_parts and f'"{_PROBE}"' not in from_parts
        return ContentFormat.PARTS if is_read else ContentFormat.TEXT

    def _try(self, messages: tuple[Message, ...]) -> str:
        """The rendered messages, or nothing if they cannot be rendered."""
        try:
            return self._program.render(
                {
                    "documents": None,
                    **self._special_tokens,
                    "messages": list(messages),
                    "tools": None,
                    "add_generation_prompt": False,
                    "strftime_now": lambda _: "",  # two renderings must not differ by the time between them
                }
            )
        except StepLimitError as error:
            raise ModelError(f"The chat template is of no use: {error}, even for a few words.") from error
        except _FAILURES:
            return ""


def _probe_message(role: str, content: object) -> Message:
    message: Message = {"role": role, "content": content}
    return message | {"name": "f", "tool_call_id": "call00000"} if role == "tool" else message


def _mark_end(message: Message) -> str:
    """Put the mark at the end of the message's text; returns the text as it was."""
    content = message.get("content")
    if isinstance(content, str):
        message["content"] = content + _END_MARK
        return content
    if isinstance(content, list) and content:
        last = content[-1]
        text: str = last["text"]
        message["content"] = [*content[:-1], {**last, "text": text + _END_MARK}]
        return text
    raise RequestError(
        "continue_final_message is set, but the last message has no content to go on with.",
        param="continue_final_message",
    )


def _cut_at_mark(text: str, ending: str) -> str:
    mark = _END_MARK.rstrip()
    end = text.rfind(mark)
    if end < 0 or ending.strip() not in text:
        raise RequestError(
            "continue_final_message is set, but the model's chat template leaves the last message out or changes it.",
            param="continue_final_message",
        )
    is_trimmed = not text.startswith(_END_MARK, end)
    return text[:end].rstrip() if is_trimmed else text[:end]
