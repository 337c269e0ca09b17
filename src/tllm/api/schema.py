"""What clients send, field by field: types and ranges, and nothing of what they mean.

Rules:
    An unknown field never fails; `ignored_fields` names it for the log.
    null is the same as absent, in every optional field.
    A string is not a number and a number is not a boolean; a whole float (`10.0`) is an integer.
    The first thing that is wrong is answered with 400, naming the field the way OpenAI does: `messages[1].content`.

This file does not know models, tokens or answers.
"""

from __future__ import annotations

from typing import Annotated, Literal, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Discriminator, Field, Tag, ValidationError
from pydantic_core import ErrorDetails

from tllm.core.errors import RequestError

MAX_N = 64
MAX_LOGPROBS = 20
INT64 = 2**63


def _whole(value: object) -> object:
    """JavaScript and some Python clients write 10 as 10.0; it means the same."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


Int = Annotated[int, BeforeValidator(_whole)]
TokenIds = list[Annotated[int, Field(ge=0, lt=2**32)]]  # ids come by the million: no Python call for each


def _kind_of_text(value: object) -> str | None:
    match value:
        case str():
            return "<text>"
        case list():
            return "<list>"
        case dict():
            return "<object>"
    return None


def _kind_of_prompt(value: object) -> str | None:
    if isinstance(value, str):
        return "<text>"
    if not isinstance(value, list):
        return None
    first = value[0] if value else ""
    if isinstance(first, str):
        return "<texts>"
    return "<lists>" if isinstance(first, list) else "<ids>"


class Body(BaseModel):
    """A request's body. Fields it does not know are kept aside, to be named in the log or refused."""

    model_config = ConfigDict(extra="allow", strict=True, frozen=True, allow_inf_nan=False, protected_namespaces=())


class StreamOptions(Body):
    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None


class ContentPart(Body):
    """One part of a message. Only text can be read so far; the kind of the others is named in the refusal."""

    type: str
    text: str | None = None


Arguments = Annotated[
    Annotated[str, Tag("<text>")] | Annotated[dict[str, object], Tag("<object>")],
    Discriminator(
        _kind_of_text, custom_error_type="call_arguments_type", custom_error_message="Input should be a string of JSON"
    ),
]


class FunctionCall(Body):
    name: str
    arguments: Arguments | None = None


class ToolCall(Body):
    id: str | None = None
    type: Literal["function"] | None = None
    function: FunctionCall


Content = Annotated[
    Annotated[str, Tag("<text>")] | Annotated[list[ContentPart], Tag("<list>")],
    Discriminator(
        _kind_of_text,
        custom_error_type="message_content_type",
        custom_error_message="Input should be a string or a list of content parts",
    ),
]


class Message(Body):
    role: Literal["system", "developer", "user", "assistant", "tool", "function"]
    content: Content | None = None
    name: str | None = None
    tool_calls: list[ToolCall] | None = None
    tool_call_id: str | None = None
    reasoning: str | None = None
    reasoning_content: str | None = None


class ResponseFormat(Body):
    type: str


Stop = Annotated[
    Annotated[str, Tag("<text>")] | Annotated[list[str], Tag("<list>")],
    Discriminator(
        _kind_of_text,
        custom_error_type="stop_strings_type",
        custom_error_message="Input should be a string or a list of them",
    ),
]


class GenerationBody(Body):
    """What chat and text completions share."""

    model: str | None = None
    max_tokens: Int | None = Field(default=None, ge=0)
    min_tokens: Int | None = Field(default=None, ge=0)
    temperature: float | None = Field(default=None, ge=0, le=2)
    top_p: float | None = Field(default=None, ge=0, le=1)
    top_k: Int | None = Field(default=None, ge=-1, lt=2**31)
    min_p: float | None = Field(default=None, ge=0, le=1)
    presence_penalty: float | None = Field(default=None, ge=-2, le=2)
    frequency_penalty: float | None = Field(default=None, ge=-2, le=2)
    repetition_penalty: float | None = Field(default=None, gt=0, le=100)
    logit_bias: dict[str, Annotated[float, Field(ge=-100, le=100)]] | None = None
    allowed_token_ids: TokenIds | None = None
    seed: Int | None = Field(default=None, ge=-INT64, lt=INT64)
    n: Int | None = Field(default=None, ge=1, le=MAX_N)
    best_of: Int | None = Field(default=None, ge=1)
    stop: Stop | None = None
    stop_token_ids: TokenIds | None = None
    include_stop_str_in_output: bool | None = None
    ignore_eos: bool | None = None
    skip_special_tokens: bool | None = None
    add_special_tokens: bool | None = None
    truncate_prompt_tokens: Int | None = Field(default=None, ge=-1)
    prompt_logprobs: Int | None = Field(default=None, ge=0, le=MAX_LOGPROBS)
    return_token_ids: bool | None = None
    return_tokens_as_token_ids: bool | None = None
    priority: Int | None = Field(default=None, ge=-(2**31), lt=2**31)
    cache_salt: str | None = Field(default=None, max_length=1024)
    request_id: str | None = Field(default=None, min_length=1, max_length=128, pattern=r"^[\x21-\x7e]+$")
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    echo: bool | None = None
    response_format: ResponseFormat | None = None


class ChatBody(GenerationBody):
    """`POST /v1/chat/completions`."""

    messages: list[Message] = Field(min_length=1)
    max_tokens: Int | None = Field(default=None, ge=1)
    max_completion_tokens: Int | None = Field(default=None, ge=1)
    logprobs: bool | None = None
    top_logprobs: Int | None = Field(default=None, ge=0, le=MAX_LOGPROBS)
    tools: list[dict[str, object]] | None = None
    tool_choice: object = None
    reasoning_effort: str | None = None
    chat_template_kwargs: dict[str, object] | None = None
    documents: list[dict[str, object]] | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    include_reasoning: bool | None = None
    parallel_tool_calls: bool | None = None


Prompt = Annotated[
    Annotated[str, Tag("<text>")]
    | Annotated[list[str], Tag("<texts>")]
    | Annotated[TokenIds, Tag("<ids>")]
    | Annotated[list[TokenIds], Tag("<lists>")],
    Discriminator(
        _kind_of_prompt,
        custom_error_type="prompts_type",
        custom_error_message="Input should be a string, a list of strings, a list of token ids or a list of such lists",
    ),
]


class CompletionBody(GenerationBody):
    """`POST /v1/completions`."""

    prompt: Prompt
    logprobs: Int | None = Field(default=None, ge=0, le=MAX_LOGPROBS)


class TokenizeBody(Body):
    """`POST /tokenize`: one of `prompt` and `messages`."""

    model: str | None = None
    prompt: str | None = None
    messages: list[Message] | None = None
    add_special_tokens: bool | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template_kwargs: dict[str, object] | None = None
    return_token_strs: bool | None = None


class DetokenizeBody(Body):
    """`POST /detokenize`."""

    model: str | None = None
    tokens: TokenIds


AnyBody = TypeVar("AnyBody", bound=Body)


def parse(kind: type[AnyBody], data: bytes) -> AnyBody:
    """The body as a `kind`. Raises RequestError naming the first field that is wrong."""
    try:
        return kind.model_validate_json(data or b"null")
    except ValidationError as error:
        raise _as_request_error(error.errors(include_url=False)[0]) from None


def ignored_fields(body: Body) -> tuple[str, ...]:
    """Names of the top-level fields that this kind of body does not know."""
    return tuple(body.model_extra or ())


def _as_request_error(detail: ErrorDetails) -> RequestError:
    param = _param(detail["loc"])
    match detail["type"]:
        case "json_invalid":
            return RequestError(
                f"The request's body is not valid JSON: {detail['msg'].removeprefix('Invalid JSON: ')}.",
                code="invalid_json",
            )
        case "missing":
            return RequestError(f"Missing required field '{param}'.", param=param, code="missing_required_parameter")
        case "model_type" | "model_attributes_type" if param is None:
            return RequestError("The request's body must be a JSON object.", code="invalid_json")
    given = repr(detail["input"])
    shown = given if len(given) <= 80 else f"{given[:77]}..."
    return RequestError(f"Invalid '{param}': {detail['msg']}; got {shown}.", param=param, code="invalid_value")


def _param(loc: tuple[int | str, ...]) -> str | None:
    """`("messages", 0, "content", "<list>", 1, "type")` as `messages[0].content[1].type`."""
    path = ""
    for step in loc:
        if isinstance(step, int):
            path += f"[{step}]"
        elif not step.startswith("<"):
            path += f".{step}" if path else step
    return path[:200] or None
