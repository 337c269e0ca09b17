"""`POST /v1/completions`: prompts in as text or token ids, their continuations out, whole or as events.

With `echo` and `logprobs` this is also how evaluation harnesses score a given text; `max_tokens` 0 then scores alone.
This file does not know how prompts are encoded, nor how tokens become text.
"""

from __future__ import annotations

import asyncio
import secrets

from starlette.requests import Request
from starlette.responses import Response

from tllm.api.answers import Answer, Asked, Choice
from tllm.api.bodies import call_of, dumps, json_response, read
from tllm.api.choices import Piece, TextOptions
from tllm.api.logprobs import CompletionLogprobs, TokenNames, prompt_logprobs
from tllm.api.parameters import for_choice, sampling_params, stop_strings
from tllm.api.prompts import Prompt, completion_prompts, num_prompts, require_room
from tllm.api.refusals import refuse_generation
from tllm.api.schema import CompletionBody
from tllm.api.sse import EventStream, Write, while_connected
from tllm.api.state import ApiState
from tllm.cluster.deployment import Deployment, GenerationRequest
from tllm.core.errors import RequestError
from tllm.core.types import Score, TokenId

DEFAULT_MAX_TOKENS = 16


async def completions(request: Request, state: ApiState) -> Response:
    """Answer one request; raises what the edge turns into an error reply."""
    body = await read(CompletionBody, request, state)
    deployment = state.find(body.model)
    state.require_serving(deployment)
    refuse_generation(body)
    stop = stop_strings(body, state.limits)
    max_tokens = DEFAULT_MAX_TOKENS if body.max_tokens is None else body.max_tokens
    if max_tokens == 0 and not body.echo:
        raise RequestError(
            "'max_tokens' is 0, which asks for nothing; give at least 1, or set 'echo' to score the prompt.",
            param="max_tokens",
        )
    _require_few(num_prompts(body) * (body.n or 1), state.limits.max_choices)
    prompts = await asyncio.to_thread(completion_prompts, body, deployment)
    asked = tuple(_asked(prompt, body, deployment, state, max_tokens) for prompt in prompts)
    options = TextOptions(
        stop=stop,
        own_stop_ids=frozenset(TokenId(token) for token in body.stop_token_ids or ()),
        skip_special_tokens=body.skip_special_tokens is not False,
        include_stop=bool(body.include_stop_str_in_output),
        keep_scores=body.logprobs is not None,
    )
    call = call_of(request)
    answer = Answer(state=state, deployment=deployment, call=call, asked=asked, options=options)
    writer = _CompletionWriter(body, deployment, answer, state.version)
    if body.stream:
        return EventStream(
            writer.stream, close=answer.close, request_id=call.request_id, ping_interval_s=state.limits.ping_interval_s
        )
    return json_response(await while_connected(request.receive, writer.whole()))


def _require_few(num_choices: int, max_choices: int) -> None:
    if num_choices > max_choices:
        raise RequestError(
            f"The prompts times n make {num_choices} choices; at most {max_choices} are allowed in one request.",
            param="prompt",
        )


def _asked(prompt: Prompt, body: CompletionBody, deployment: Deployment, state: ApiState, max_tokens: int) -> Asked:
    require_room(prompt, deployment, param="prompt")
    params = sampling_params(
        body,
        deployment,
        state,
        num_prompt_tokens=len(prompt.ids),
        max_tokens=max_tokens,
        logprobs=body.logprobs,
    )
    return Asked(
        prompt=prompt,
        requests=tuple(
            GenerationRequest(
                prompt=prompt.ids,
                params=for_choice(params, index),
                prompt_logprobs=_num_prompt_top(body),
                priority=body.priority or 0,
                salt=body.cache_salt or "",
            )
            for index in range(body.n or 1)
        ),
    )


def _num_prompt_top(body: CompletionBody) -> int | None:
    """How many alternatives beside each prompt token; an echo with log-probabilities needs them too."""
    wanted = [body.prompt_logprobs, body.logprobs if body.echo else None]
    return max((number for number in wanted if number is not None), default=None)


class _CompletionWriter:
    """Writes one answer."""

    def __init__(self, body: CompletionBody, deployment: Deployment, answer: Answer, version: str) -> None:
        self._answer = answer
        self._body = body
        self._tokenizer = deployment.tokenizer
        self._names = TokenNames(deployment.tokenizer, as_ids=bool(body.return_tokens_as_token_ids))
        options = body.stream_options
        self._has_usage_frame = bool(options and options.include_usage)
        self._has_usage_everywhere = self._has_usage_frame and bool(options and options.continuous_usage_stats)
        self._has_ids = bool(body.return_token_ids)
        self._skip_special = body.skip_special_tokens is not False
        self._prefaces = [self._preface(choice) for choice in answer.choices]
        self._begun: set[int] = set()  # choices that have had a frame
        self._is_echo_due = [bool(body.echo) for _ in answer.choices]
        self._head = {
            "id": f"cmpl-{body.request_id or secrets.token_hex(12)}",
            "object": "text_completion",
            "created": answer.created,
            "model": body.model or deployment.names[0],
            "system_fingerprint": f"tllm-{version}",
        }
        answer.called(str(self._head["id"]))
        self._frame_start = dumps(self._head)[:-1] + ',"choices":['

    def _preface(self, choice: Choice) -> str:
        """The echoed prompt."""
        if not self._body.echo:
            return ""
        if choice.prompt.text is not None:
            return choice.prompt.text
        return self._tokenizer.decode(choice.prompt.ids, skip_special_tokens=self._skip_special)

    async def whole(self) -> dict[str, object]:
        """The answer as one object."""
        gathered: list[list[Piece]] = [[] for _ in self._answer.choices]

        async def gather(choice: Choice, piece: Piece) -> None:
            gathered[choice.index].append(piece)

        await self._answer.run(gather)
        return {
            **self._head,
            "choices": [
                self._whole_choice(choice, pieces)
                for choice, pieces in zip(self._answer.choices, gathered, strict=True)
            ],
            "usage": self._answer.usage(),
            "timings": self._answer.timings(),
        }

    def _whole_choice(self, choice: Choice, pieces: list[Piece]) -> dict[str, object]:
        preface = self._prefaces[choice.index]
        scores = next((piece.prompt_scores for piece in pieces if piece.prompt_scores is not None), ())
        made: dict[str, object] = {
            "index": choice.index,
            "text": preface + "".join(piece.text for piece in pieces),
            "logprobs": None,
            "finish_reason": pieces[-1].finish,
            "stop_reason": pieces[-1].stop_reason,
        }
        if self._body.logprobs is not None:
            lists = self._lists(choice, scores if self._body.echo else None)
            for piece in pieces:
                lists.add(piece.entries, shift=len(preface), num_top=self._body.logprobs)
            made["logprobs"] = lists.json()
        if self._body.prompt_logprobs is not None:
            made["prompt_logprobs"] = prompt_logprobs(
                choice.prompt.ids, scores, self._body.prompt_logprobs, self._names
            )
        if self._has_ids:
            made["prompt_token_ids"] = list(choice.prompt.ids)
            made["token_ids"] = [token for piece in pieces for token in piece.ids]
        return made

    def _lists(self, choice: Choice, echoed: tuple[Score, ...] | None) -> CompletionLogprobs:
        lists = CompletionLogprobs(self._names)
        if echoed is not None:
            lists.add_prompt(
                choice.prompt.ids, echoed, self._body.logprobs or 0, skip_special_tokens=self._skip_special
            )
        return lists

    async def stream(self, write: Write) -> None:
        """The answer as events, ended by [DONE]. An echo comes as soon as its log-probabilities are known."""
        if self._body.echo and self._body.logprobs is None:
            for choice in self._answer.choices:
                self._is_echo_due[choice.index] = False
                await write(self._frame(choice, Piece(text=self._prefaces[choice.index], ids=())))

        async def emit(choice: Choice, piece: Piece) -> None:
            if frames := self._frames(choice, piece):
                await write(frames)

        await self._answer.run(emit)
        if self._has_usage_frame:
            end = f'],"usage":{dumps(self._answer.usage())},"timings":{dumps(self._answer.timings())}}}'
            await write(f"data: {self._frame_start}{end}\n\n".encode())
        await write(b"data: [DONE]\n\n")

    def _frames(self, choice: Choice, piece: Piece) -> bytes:
        frames = b""
        if self._is_echo_due[choice.index] and (piece.prompt_scores is not None or len(choice.prompt.ids) == 1):
            self._is_echo_due[choice.index] = False
            echoed = piece.prompt_scores or ()
            frames = self._frame(choice, Piece(text=self._prefaces[choice.index], ids=()), echoed=echoed)
        if piece.text or piece.entries or piece.finish is not None or (self._has_ids and piece.ids):
            frames += self._frame(choice, piece)
        return frames

    def _frame(self, choice: Choice, piece: Piece, *, echoed: tuple[Score, ...] | None = None) -> bytes:
        made: dict[str, object] = {
            "index": choice.index,
            "text": piece.text,
            "logprobs": None,
            "finish_reason": piece.finish,
        }
        if piece.finish is not None:
            made["stop_reason"] = piece.stop_reason
        if self._body.logprobs is not None and (piece.entries or echoed is not None):
            lists = self._lists(choice, echoed)
            lists.add(piece.entries, shift=len(self._prefaces[choice.index]), num_top=self._body.logprobs)
            made["logprobs"] = lists.json()
        if self._has_ids:
            made["token_ids"] = list(piece.ids)
            if choice.index not in self._begun:
                made["prompt_token_ids"] = list(choice.prompt.ids)
        self._begun.add(choice.index)
        after: dict[str, object] = {}
        if piece.finish is not None and self._answer.is_finished and not self._has_usage_frame:
            after["timings"] = self._answer.timings()
        if self._has_usage_everywhere:
            after["usage"] = self._answer.usage()
        tail = f",{dumps(after)[1:]}" if after else "}"
        return f"data: {self._frame_start}{dumps(made)}]{tail}\n\n".encode()
