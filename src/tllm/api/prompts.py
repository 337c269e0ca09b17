"""From what a client wrote to token ids: messages through the chat template, texts through the tokenizer.

Everything here only computes; callers run it off the event loop, since a long prompt takes milliseconds.
This file does not know HTTP, nor what is done with the ids.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from tllm.api.schema import ChatBody, CompletionBody, Message, TokenizeBody
from tllm.cluster.deployment import Deployment
from tllm.core.errors import ContextLengthError, RequestError
from tllm.core.types import TokenId
from tllm.text.template import RESERVED_VARIABLES

_RESERVED = RESERVED_VARIABLES | {"self"}
_MESSAGE_FIELDS = set(Message.model_fields)


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompt:
    """One prompt: its ids, and the text it was made from where there is one."""

    ids: tuple[TokenId, ...]
    text: str | None


def chat_prompt(body: ChatBody, deployment: Deployment, max_messages: int) -> Prompt:
    """The conversation as the model's template writes it. Raises RequestError naming what cannot be rendered."""
    if len(body.messages) > max_messages:
        raise RequestError(
            f"{len(body.messages)} messages were given; at most {max_messages} are allowed.", param="messages"
        )
    variables = dict(body.chat_template_kwargs or {})
    _refuse_reserved(variables)
    if body.reasoning_effort is not None:
        variables["reasoning_effort"] = body.reasoning_effort
    if body.documents is not None:
        variables["documents"] = body.documents
    text = _render(
        deployment,
        body.messages,
        variables,
        add_generation_prompt=body.add_generation_prompt,
        continue_final_message=body.continue_final_message,
    )
    ids = deployment.tokenizer.encode(text, add_special_tokens=bool(body.add_special_tokens))
    if not ids:
        raise RequestError("The messages make an empty prompt. Write something.", param="messages")
    return Prompt(ids=_truncated(ids, body, deployment, body.max_completion_tokens or body.max_tokens), text=text)


def completion_prompts(body: CompletionBody, deployment: Deployment) -> tuple[Prompt, ...]:
    """Each prompt of a text completion. Raises RequestError for empty ones and for ids outside the vocabulary."""
    prompts = []
    for index, source in enumerate(_listed_prompts(body.prompt)):
        where = "prompt" if isinstance(body.prompt, str) else f"prompt[{index}]"
        if isinstance(source, str):
            ids = deployment.tokenizer.encode(source, add_special_tokens=body.add_special_tokens is not False)
            text: str | None = source
        else:
            ids = checked_ids(source, deployment.vocab_size, param="prompt")
            text = None
        if not ids:
            raise RequestError(f"'{where}' is empty. Write something or give at least one token id.", param="prompt")
        kept = _truncated(ids, body, deployment, 16 if body.max_tokens is None else body.max_tokens)
        prompts.append(Prompt(ids=kept, text=text if len(kept) == len(ids) else None))
    if not prompts:
        raise RequestError("'prompt' is an empty list. Give at least one prompt.", param="prompt")
    return tuple(prompts)


def num_prompts(body: CompletionBody) -> int:
    """How many prompts a text completion has; known before any of them is encoded."""
    return len(_listed_prompts(body.prompt))


def tokenize_prompt(body: TokenizeBody, deployment: Deployment) -> tuple[TokenId, ...]:
    """The ids of a text, or of messages as chat completions would make them."""
    if (body.prompt is None) == (body.messages is None):
        raise RequestError("Give exactly one of 'prompt' and 'messages'.", param="prompt")
    if body.messages is None:
        return deployment.tokenizer.encode(body.prompt or "", add_special_tokens=body.add_special_tokens is not False)
    variables = dict(body.chat_template_kwargs or {})
    _refuse_reserved(variables)
    text = _render(
        deployment,
        body.messages,
        variables,
        add_generation_prompt=body.add_generation_prompt,
        continue_final_message=body.continue_final_message,
    )
    return deployment.tokenizer.encode(text, add_special_tokens=bool(body.add_special_tokens))


def checked_ids(ids: Sequence[int], vocab_size: int, *, param: str) -> tuple[TokenId, ...]:
    """`ids` as token ids. Raises RequestError for the first one outside the vocabulary."""
    if ids and not (min(ids) >= 0 and max(ids) < vocab_size):
        wrong = next(token for token in ids if not 0 <= token < vocab_size)
        raise RequestError(
            f"'{param}' contains token id {wrong}; this model's vocabulary has ids 0 to {vocab_size - 1}.",
            param=param,
        )
    return tuple(TokenId(token) for token in ids)


def last_message_text(body: ChatBody) -> str:
    """What `echo` puts in front of a chat answer: the final message, where the assistant had begun to speak."""
    final = body.messages[-1]
    if final.role != "assistant" or final.content is None:
        return ""
    return final.content if isinstance(final.content, str) else "\n".join(part.text or "" for part in final.content)


def _listed_prompts(prompt: str | list[str] | list[int] | list[list[int]]) -> Sequence[str | list[int]]:
    if isinstance(prompt, str):
        return (prompt,)
    texts_or_lists = [item for item in prompt if not isinstance(item, int)]
    if len(texts_or_lists) == len(prompt):
        return texts_or_lists
    return ([item for item in prompt if isinstance(item, int)],)


def _truncated(
    ids: tuple[TokenId, ...], body: ChatBody | CompletionBody, deployment: Deployment, max_tokens: int | None
) -> tuple[TokenId, ...]:
    """The last ids that `truncate_prompt_tokens` keeps; -1 keeps what leaves room for the answer."""
    keep = body.truncate_prompt_tokens
    if keep is None:
        return ids
    if keep == 0:
        raise RequestError(
            "'truncate_prompt_tokens' is 0, which leaves no prompt; give -1 or a positive number.",
            param="truncate_prompt_tokens",
        )
    if keep == -1:
        keep = max(1, deployment.max_model_len - max(1, max_tokens or 1))
    return ids[-keep:]


def _render(
    deployment: Deployment,
    messages: Sequence[Message],
    variables: Mapping[str, object],
    *,
    add_generation_prompt: bool | None,
    continue_final_message: bool | None,
) -> str:
    if deployment.template is None:
        raise RequestError(
            "This model has no chat template; send a plain prompt to /v1/completions instead.", param="messages"
        )
    if add_generation_prompt and continue_final_message:
        raise RequestError(
            "'add_generation_prompt' and 'continue_final_message' exclude each other; set one of them.",
            param="continue_final_message",
        )
    continued = bool(continue_final_message)
    return deployment.template.render(
        [_for_template(message, index) for index, message in enumerate(messages)],
        tools=None,
        add_generation_prompt=not continued if add_generation_prompt is None else add_generation_prompt,
        continue_final_message=continued,
        **dict(variables),
    )


def _refuse_reserved(variables: Mapping[str, object]) -> None:
    for name in variables:
        if name in _RESERVED:
            raise RequestError(
                f"'chat_template_kwargs' must not set '{name}', which the server sets itself.",
                param="chat_template_kwargs",
            )


def _for_template(message: Message, index: int) -> dict[str, object]:
    """A message with the fields we know and no others; what templates need of them is the template's own business."""
    needs_content = message.role != "assistant" or not (
        message.tool_calls or message.reasoning or message.reasoning_content
    )
    if message.content is None and needs_content:
        where = f"messages[{index}].content"
        raise RequestError(f"'{where}' is missing; a message of role {message.role} needs it.", param=where)
    return message.model_dump(include=_MESSAGE_FIELDS, exclude_none=True)


def require_room(prompt: Prompt, deployment: Deployment, *, param: str) -> None:
    """Raise ContextLengthError unless the context has room for at least one more token."""
    if len(prompt.ids) >= deployment.max_model_len:
        raise ContextLengthError(len(prompt.ids), deployment.max_model_len, param=param)
