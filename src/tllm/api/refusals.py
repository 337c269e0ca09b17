"""Options that clients know from OpenAI or vLLM, that would change the answer, and that this server cannot honour.

They are refused by name, because an answer made without them would be a different answer. A value that asks for
nothing (null, an empty list, the default) passes. Options that change nothing in an answer are simply ignored.
This file does not know how the options that do work are carried out.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

from tllm.api.schema import Body, ChatBody, GenerationBody
from tllm.core.errors import RequestError


@dataclass(frozen=True, slots=True, kw_only=True)
class Refusal:
    """Why a field is refused, and the values of it that ask for nothing."""

    reason: str
    harmless: Collection[object] = (None, False, "", [], {})


_CONSTRAINED = Refusal(reason="Constrained (structured) output is not supported by this server.")

REFUSED: Mapping[str, Refusal] = {
    "structured_outputs": _CONSTRAINED,
    "guided_json": _CONSTRAINED,
    "guided_regex": _CONSTRAINED,
    "guided_choice": _CONSTRAINED,
    "guided_grammar": _CONSTRAINED,
    "structural_tag": _CONSTRAINED,
    "json_schema": _CONSTRAINED,
    "grammar": _CONSTRAINED,
    "functions": Refusal(reason="Function calling is not supported by this server."),
    "function_call": Refusal(
        reason="Function calling is not supported by this server.", harmless=(None, "none", "auto")
    ),
    "audio": Refusal(reason="This model answers with text only."),
    "modalities": Refusal(reason="This model answers with text only.", harmless=(None, [], ["text"])),
    "chat_template": Refusal(reason="The template of a request is not used; the server's operator sets it."),
    "bad_words": Refusal(reason="Banned words are not supported; ban single tokens with logit_bias -100."),
    "suffix": Refusal(reason="Insertion before a suffix is not supported."),
    "use_beam_search": Refusal(reason="Beam search is not supported."),
    "length_penalty": Refusal(reason="Beam search is not supported.", harmless=(None, 1, 1.0)),
    "prompt_embeds": Refusal(reason="Prompts are text or token ids, not embeddings."),
    "logits_processors": Refusal(reason="Logits processors of a request are not run."),
    "kv_transfer_params": Refusal(reason="KV transfer between servers is not supported."),
    "mm_processor_kwargs": Refusal(reason="This model reads text only."),
    "thinking_token_budget": Refusal(reason="A token budget for reasoning is not supported; use max_tokens."),
}


def refuse_unsupported(body: Body) -> None:
    """Raise RequestError for the first extra field of `body` that is in the table and asks for something."""
    for name, value in (body.model_extra or {}).items():
        refusal = REFUSED.get(name)
        if refusal is not None and value not in refusal.harmless:
            raise unsupported(name, refusal.reason)


def refuse_generation(body: GenerationBody) -> None:
    """Raise RequestError for what neither kind of completion can do, or for fields that contradict."""
    refuse_unsupported(body)
    if body.stream_options is not None and not body.stream:
        raise RequestError(
            "'stream_options' is only allowed with 'stream': true. Leave it out or stream.", param="stream_options"
        )
    if body.best_of is not None and body.best_of > (body.n or 1):
        raise unsupported("best_of", f"Choosing the best of more than n = {body.n or 1} answers is not supported.")
    if body.response_format is not None and body.response_format.type != "text":
        raise unsupported(
            "response_format",
            f"Only {{'type': 'text'}} is supported by this server, not {body.response_format.type!r:.60}.",
        )
    if body.prompt_logprobs is not None and body.stream:
        raise RequestError("'prompt_logprobs' are not available with 'stream': true.", param="prompt_logprobs")


def refuse_tools(body: ChatBody) -> None:
    """Raise RequestError when tools could be called. With `tool_choice` none they are left out of the prompt."""
    if body.tools:
        if body.tool_choice != "none":
            raise unsupported("tools", "Tool calls are not supported by this server. Send 'tool_choice': 'none'.")
    elif body.tool_choice not in (None, "none", "auto"):
        raise RequestError("'tool_choice' is only allowed when 'tools' are given; leave it out.", param="tool_choice")


def unsupported(param: str, reason: str) -> RequestError:
    """The error for a known option that cannot be honoured."""
    return RequestError(f"'{param}' cannot be honoured. {reason}", param=param, code="unsupported_parameter")
