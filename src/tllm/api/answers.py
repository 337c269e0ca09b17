"""All the choices of one request, from submission to the last token: counted, timed, and freed whatever happens.

This file does not know how an answer is written as JSON.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass

from tllm.api.choices import ChoiceText, Piece, TextOptions
from tllm.api.errors import RefusedError, deadline_passed
from tllm.api.prompts import Prompt
from tllm.api.sse import together
from tllm.api.state import ApiState
from tllm.api.traced import TracedRequest
from tllm.cluster.deployment import Deployment, Generation, GenerationRequest
from tllm.core.errors import GenerationError, TllmError

Emit = Callable[["Choice", Piece], Awaitable[None]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Call:
    """One HTTP request: its id and when it arrived, on `time.perf_counter`."""

    request_id: str
    arrived_s: float
    is_traced: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """One prompt and the generations it is answered with, one for each of its choices."""

    prompt: Prompt
    requests: tuple[GenerationRequest, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """One choice being answered. `index` is its place in the answer, `prompt` the one it continues."""

    index: int
    prompt: Prompt
    is_first_of_prompt: bool
    generation: Generation
    text: ChoiceText


class Answer:
    """The choices of one request. Whoever makes one must `close` it."""

    def __init__(
        self, *, state: ApiState, deployment: Deployment, call: Call, asked: Sequence[Asked], options: TextOptions
    ) -> None:
        """Submits every generation, or none: what a deployment raises for one of them frees those before it."""
        self._metrics = state.metrics
        self._deadline_s = state.limits.deadline_s
        self._model = deployment.names[0]
        self._call = call
        self.created = int(time.time())
        self._all_traced = state.traced
        self._traced: TracedRequest | None = None
        self.choices: list[Choice] = []
        try:
            for one in asked:
                for number, request in enumerate(one.requests):
                    text = ChoiceText(deployment.tokenizer, request.prompt, options)
                    self.choices.append(
                        Choice(
                            index=len(self.choices),
                            prompt=one.prompt,
                            is_first_of_prompt=number == 0,
                            generation=deployment.submit(request),
                            text=text,
                        )
                    )
        except TllmError:
            self.close()
            raise
        if call.is_traced:
            generations = [choice.generation for choice in self.choices]
            self._traced = state.traced.begin(call.request_id, call.arrived_s, generations)
        for one in asked:
            params = one.requests[0].params
            self._metrics.observe_request(self._model, n=len(one.requests), max_tokens=params.max_tokens)

    def called(self, answer_id: str) -> None:
        """The answer's own id, by which its trace may be asked for."""
        if self._traced is not None:
            self._all_traced.call(self._traced, answer_id)

    def close(self) -> None:
        """Free everything that still runs."""
        for choice in self.choices:
            choice.generation.cancel()
            if self._traced is not None:
                self._traced.end(choice.index)

    async def run(self, emit: Emit) -> None:
        """Give every piece of every choice to `emit`, in order within a choice, until all have ended.

        A slow `emit` holds up its own choice only. Raises what the deployment raises in mid-way, RefusedError when the
        deadline passes; nothing runs any more then.
        """
        try:
            async with asyncio.timeout(self._deadline_s):
                await together([self._follow(choice, emit) for choice in self.choices])
        except TimeoutError:
            raise RefusedError(deadline_passed(self._deadline_s or 0.0)) from None
        finally:
            self.close()

    @property
    def is_finished(self) -> bool:
        return all(choice.text.finish is not None for choice in self.choices)

    async def _follow(self, choice: Choice, emit: Emit) -> None:
        first_token_s: float | None = None
        last_s = self._call.arrived_s
        reason = "abort"
        inter_token = self._metrics.inter_token.labels(self._model)
        try:
            async for output in choice.generation:
                if output.tokens:
                    now_s = time.perf_counter()
                    if first_token_s is None:
                        first_token_s = now_s - self._call.arrived_s
                    else:
                        inter_token.observe((now_s - last_s) / len(output.tokens))
                    last_s = now_s
                piece = choice.text.feed(output)
                if piece.finish is not None:
                    choice.generation.cancel()  # before waiting for the reader: a stop string frees at once
                    reason = piece.finish
                await emit(choice, piece)
                if piece.finish is not None:
                    return
            raise GenerationError("The generation ended without saying why.")
        except TllmError:
            reason = "error"
            raise
        finally:
            choice.generation.cancel()
            if self._traced is not None:
                self._traced.end(choice.index)
            self._metrics.observe_choice(
                self._model,
                reason=reason,
                usage=choice.generation.usage(),
                first_token_s=first_token_s,
                e2e_s=last_s - self._call.arrived_s,
            )

    def usage(self) -> dict[str, object]:
        """OpenAI's usage object as things stand: each prompt once, the tokens of all choices."""
        firsts = [choice for choice in self.choices if choice.is_first_of_prompt]
        num_prompt = sum(len(choice.prompt.ids) for choice in firsts)
        num_cached = sum(choice.generation.usage().num_cached_tokens for choice in firsts)
        num_output = sum(choice.text.num_tokens for choice in self.choices)
        return {
            "prompt_tokens": num_prompt,
            "completion_tokens": num_output,
            "total_tokens": num_prompt + num_output,
            "prompt_tokens_details": {"cached_tokens": num_cached},
        }

    def timings(self) -> dict[str, object]:
        """llama.cpp's figures, which chat front ends show: prompt of the first choice, tokens of all of them.

        `predicted_per_second` is the rate between a choice's first and last token, summed over the choices.
        """
        usages = [choice.generation.usage() for choice in self.choices]
        num_prompt = usages[0].num_prompt_tokens - usages[0].num_cached_tokens
        prompt_s = usages[0].prefill_s
        num_output = sum(choice.text.num_tokens for choice in self.choices)
        decode_s = max(usage.decode_s for usage in usages)
        rate = math.fsum(
            (choice.text.num_tokens - 1) / usage.decode_s
            for choice, usage in zip(self.choices, usages, strict=True)
            if choice.text.num_tokens > 1 and usage.decode_s > 0
        )
        return {
            "prompt_n": num_prompt,
            "prompt_ms": round(prompt_s * 1e3, 3),
            "prompt_per_second": round(num_prompt / prompt_s, 3) if prompt_s > 0 else 0.0,
            "predicted_n": num_output,
            "predicted_ms": round(decode_s * 1e3, 3),
            "predicted_per_second": round(rate, 3),
            "cache_n": usages[0].num_cached_tokens,
        }
