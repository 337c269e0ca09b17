"""`POST /v1/chat/completions`: a conversation in, the assistant's next message out, whole or as events.

This file does not know how prompts are rendered, nor how tokens become text.
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Sequence

from starlette.requests import Request
from starlette.responses import Response

from tllm.api.answers import Answer, Asked, Choice
from tllm.api.bodies import call_of, dumps, json_response, quote, read
from tllm.api.choices import Entry, Piece, TextOptions
from tllm.api.logprobs import TokenNames, chat_logprobs, prompt_logprobs
from tllm.api.parameters import for_choice, sampling_params, stop_strings
from tllm.api.prompts import chat_prompt, last_message_text, require_room
from tllm.api.refusals import refuse_generation, refuse_tools
from tllm.api.schema import ChatBody
from tllm.api.sse import EventStream, Write, while_connected
from tllm.api.state import ApiState
from tllm.cluster.deployment import Deployment, GenerationRequest
from tllm.core.errors import RequestError
from tllm.core.types import TokenId


async def chat_completions(request: Request, state: ApiState) -> Response:
    """Answer one request; raises what the edge turns into an error reply."""
    body = await read(ChatBody, request, state)
    deployment = state.find(body.model)
    state.require_serving(deployment)
    refuse_generation(body)
    refuse_tools(body)
    stop = stop_strings(body, state.limits)
    num_top = _num_top(body)
    prompt = await asyncio.to_thread(chat_prompt, body, deployment, state.limits.max_messages)
    require_room(prompt, deployment, param="messages")
    params = sampling_params(
        body,
        deployment,
        state,
        num_prompt_tokens=len(prompt.ids),
        max_tokens=body.max_completion_tokens or body.max_tokens,
        logprobs=num_top,
    )
    requests = tuple(
        GenerationRequest(
            prompt=prompt.ids,
            params=for_choice(params, index),
            prompt_logprobs=body.prompt_logprobs if index == 0 else None,
            priority=body.priority or 0,
            salt=body.cache_salt or "",
        )
        for index in range(body.n or 1)
    )
    options = TextOptions(
        stop=stop,
        own_stop_ids=frozenset(TokenId(token) for token in body.stop_token_ids or ()),
        skip_special_tokens=body.skip_special_tokens is not False,
        include_stop=bool(body.include_stop_str_in_output),
        keep_scores=num_top is not None,
    )
    call = call_of(request)
    answer = Answer(
        state=state,
        deployment=deployment,
        call=call,
        asked=(Asked(prompt=prompt, requests=requests),),
        options=options,
    )
    writer = _ChatWriter(body, deployment, answer, state.version)
    if body.stream:
        return EventStream(
            writer.stream, close=answer.close, request_id=call.request_id, ping_interval_s=state.limits.ping_interval_s
        )
    return json_response(await while_connected(request.receive, writer.whole()))


def _num_top(body: ChatBody) -> int | None:
    """How many alternatives beside each token; None when no log-probabilities are asked for."""
    if body.logprobs:
        return body.top_logprobs or 0
    if body.top_logprobs:
        raise RequestError("'top_logprobs' is only allowed with 'logprobs': true.", param="top_logprobs")
    return None


class _ChatWriter:
    """Writes one answer. Frames differ in a few characters, so what is the same is written once."""

    def __init__(self, body: ChatBody, deployment: Deployment, answer: Answer, version: str) -> None:
        self._answer = answer
        self._names = TokenNames(deployment.tokenizer, as_ids=bool(body.return_tokens_as_token_ids))
        self._has_logprobs = bool(body.logprobs)
        self._has_ids = bool(body.return_token_ids)
        self._num_prompt_top = body.prompt_logprobs
        self._preface = last_message_text(body) if body.echo else ""
        options = body.stream_options
        self._has_usage_frame = bool(options and options.include_usage)
        self._has_usage_everywhere = self._has_usage_frame and bool(options and options.continuous_usage_stats)
        self._head = {
            "id": f"chatcmpl-{body.request_id or secrets.token_hex(12)}",
            "object": "chat.completion",
            "created": answer.created,
            "model": body.model or deployment.names[0],
            "system_fingerprint": f"tllm-{version}",
        }
        answer.called(str(self._head["id"]))
        self._frame_start = dumps({**self._head, "object": "chat.completion.chunk"})[:-1] + ',"choices":['
        self._is_plain = not (self._has_logprobs or self._has_ids or self._has_usage_everywhere)

    async def whole(self) -> dict[str, object]:
        """The answer as one object. Frees everything if it is cancelled."""
        choices = [_Gathered() for _ in self._answer.choices]

        async def gather(choice: Choice, piece: Piece) -> None:
            choices[choice.index].add(piece)

        await self._answer.run(gather)
        made = {
            **self._head,
            "choices": [self._whole_choice(index, gathered) for index, gathered in enumerate(choices)],
            "usage": self._answer.usage(),
            "timings": self._answer.timings(),
        }
        first = self._answer.choices[0].prompt.ids
        if self._num_prompt_top is not None:
            scores = next((piece.prompt_scores for piece in choices[0].pieces if piece.prompt_scores is not None), ())
            made["prompt_logprobs"] = prompt_logprobs(first, scores, self._num_prompt_top, self._names)
        if self._has_ids:
            made["prompt_token_ids"] = list(first)
        return made

    def _whole_choice(self, index: int, gathered: _Gathered) -> dict[str, object]:
        last = gathered.pieces[-1]
        choice: dict[str, object] = {
            "index": index,
            "message": {"role": "assistant", "content": self._preface + gathered.text, "refusal": None},
            "logprobs": chat_logprobs(gathered.entries, self._names) if self._has_logprobs else None,
            "finish_reason": last.finish,
            "stop_reason": last.stop_reason,
        }
        if self._has_ids:
            choice["token_ids"] = gathered.ids
        return choice

    async def stream(self, write: Write) -> None:
        """The answer as events, ended by [DONE]."""
        for choice in self._answer.choices:
            await write(self._opening(choice))

        async def emit(choice: Choice, piece: Piece) -> None:
            if frames := self._frames(choice, piece):
                await write(frames)

        await self._answer.run(emit)
        if self._has_usage_frame:
            end = f'],"usage":{dumps(self._answer.usage())},"timings":{dumps(self._answer.timings())}}}'
            await write(f"data: {self._frame_start}{end}\n\n".encode())
        await write(b"data: [DONE]\n\n")

    def _opening(self, choice: Choice) -> bytes:
        extra: dict[str, object] = {}
        if self._has_ids and choice.index == 0:
            extra["prompt_token_ids"] = list(choice.prompt.ids)
        frames = self._frame(choice, {"role": "assistant", "content": ""}, extra=extra)
        if self._preface:
            frames += self._frame(choice, {"content": self._preface})
        return frames

    def _frames(self, choice: Choice, piece: Piece) -> bytes:
        """The frames of one piece: its text, then its end; none when nothing can be shown."""
        if self._is_plain:
            text = (
                f'data: {self._frame_start}{{"index":{choice.index},"delta":{{"content":{quote(piece.text)}}},'
                '"logprobs":null,"finish_reason":null}]}\n\n'.encode()
                if piece.text
                else b""
            )
            return text if piece.finish is None else text + self._finish(choice, piece, (), ())
        is_shown = bool(piece.text) or (piece.finish is None and bool(piece.entries or (self._has_ids and piece.ids)))
        if not is_shown:
            return b"" if piece.finish is None else self._finish(choice, piece, piece.entries, piece.ids)
        frame = self._frame(choice, {"content": piece.text}, entries=piece.entries, ids=piece.ids)
        return frame if piece.finish is None else frame + self._finish(choice, piece, (), ())

    def _finish(self, choice: Choice, piece: Piece, entries: Sequence[Entry], ids: Sequence[TokenId]) -> bytes:
        is_last = self._answer.is_finished and not self._has_usage_frame
        return self._frame(
            choice,
            {},
            entries=entries,
            ids=ids,
            finish=piece.finish,
            stop={"stop_reason": piece.stop_reason},
            extra={"timings": self._answer.timings()} if is_last else {},
        )

    def _frame(
        self,
        choice: Choice,
        delta: dict[str, object],
        *,
        entries: Sequence[Entry] = (),
        ids: Sequence[TokenId] = (),
        finish: str | None = None,
        stop: dict[str, object] | None = None,
        extra: dict[str, object] | None = None,
    ) -> bytes:
        made: dict[str, object] = {
            "index": choice.index,
            "delta": delta,
            "logprobs": chat_logprobs(entries, self._names) if self._has_logprobs and entries else None,
            "finish_reason": finish,
            **(stop or {}),
        }
        if self._has_ids:
            made["token_ids"] = list(ids)
        after = dict(extra or {})
        if self._has_usage_everywhere:
            after["usage"] = self._answer.usage()
        tail = f",{dumps(after)[1:]}" if after else "}"
        return f"data: {self._frame_start}{dumps(made)}]{tail}\n\n".encode()


class _Gathered:
    """The pieces of one choice, for an answer given whole."""

    def __init__(self) -> None:
        self.pieces: list[Piece] = []

    def add(self, piece: Piece) -> None:
        self.pieces.append(piece)

    @property
    def text(self) -> str:
        return "".join(piece.text for piece in self.pieces)

    @property
    def entries(self) -> list[Entry]:
        return [entry for piece in self.pieces for entry in piece.entries]

    @property
    def ids(self) -> list[TokenId]:
        return [token for piece in self.pieces for token in piece.ids]
