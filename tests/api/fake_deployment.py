"""A deployment that computes nothing: scripted tokens at a scripted pace, with a real tokenizer and template.

It keeps what the API relies on: stop ids and token limits end a generation as the scheduler ends it, tokens that were
not looked at in time arrive together, and `cancel` frees at once. `submitted`, `running` and `num_cancelled` say what
happened to it.
It does not know the API.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from tokenizers import AddedToken, decoders, models, pre_tokenizers
from tokenizers import Tokenizer as Backend

from tllm.cluster.deployment import (
    DeploymentState,
    DeploymentStatistics,
    GenerationOutput,
    GenerationRequest,
    GenerationUsage,
)
from tllm.core.errors import ContextLengthError, TllmError
from tllm.core.types import FinishReason, Logprob, Sampled, Score, SequenceId, StepId, TokenId
from tllm.text.template import ChatTemplate
from tllm.text.tokenizer import Tokenizer

BOS, EOS, END = "<|bos|>", "<|eos|>", "<|end|>"
TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "<{{ message.role }}>{{ message.content }}{% if not loop.last or add_generation_prompt %}<|end|>{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
    "{% if enable_thinking is defined %}[thinking={{ enable_thinking }}]{% endif %}"
    "{% if reasoning_effort is defined %}[effort={{ reasoning_effort }}]{% endif %}"
)


def write_byte_tokenizer(directory: Path) -> None:
    """A vocabulary of the 256 bytes and three special tokens: a text's length in tokens is its length in bytes."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Backend(models.BPE(vocab={char: index for index, char in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(token, special=True) for token in (BOS, EOS, END)])
    backend.save(str(directory / "tokenizer.json"))
    config = {"bos_token": BOS, "eos_token": EOS, "chat_template": TEMPLATE, "tokenizer_class": "Bytes"}
    (directory / "tokenizer_config.json").write_text(json.dumps(config))


@dataclass(frozen=True, slots=True, kw_only=True)
class Script:
    """What one generation does: these tokens, then the end of sequence; or `error` after `tokens`."""

    tokens: Sequence[TokenId]
    token_s: float = 0.0  # 0: as fast as they are looked at, one at a time
    first_token_s: float = 0.0
    burst: int = 1  # tokens per look, where they are not paced
    error: TllmError | None = None


class FakeGeneration:
    def __init__(self, deployment: FakeDeployment, request: GenerationRequest, script: Script) -> None:
        self._deployment = deployment
        self._request = request
        self._script = script
        self._clock = asyncio.get_running_loop().time
        self._started_s = self._clock()
        self.seq = SequenceId(len(deployment.submitted))
        self.arrived_s = time.perf_counter()
        self.first_step = StepId(1)
        self._num_given = 0
        self._is_over = False
        self._plan, self._finish, self._stop_id = self._planned()

    def _planned(self) -> tuple[list[TokenId], FinishReason, TokenId | None]:
        params = self._request.params
        tokens = [*self._script.tokens]
        if self._script.error is None:
            end = self._deployment.end_ids[0]
            tokens.append(end if end in params.stop_ids else TokenId(0))
        for index, token in enumerate(tokens):
            if token in params.stop_ids and index >= params.min_tokens:
                if index < params.max_tokens:
                    return tokens[: index + 1], FinishReason.STOP, token
                break
        while len(tokens) < params.max_tokens and self._script.error is None:
            tokens.append(TokenId(0))
        return tokens[: params.max_tokens], FinishReason.LENGTH, None

    def __aiter__(self) -> AsyncIterator[GenerationOutput]:
        return self

    async def __anext__(self) -> GenerationOutput:
        if self._is_over:
            raise StopAsyncIteration
        if self._num_given == len(self._plan) and self._script.error is not None:
            self._end()
            raise self._script.error
        num_ready = await self._wait()
        if self._is_over:  # cancelled while waiting
            raise StopAsyncIteration
        first = self._num_given
        given = self._plan[first : first + num_ready]
        self._num_given += len(given)
        is_last = self._num_given == len(self._plan) and self._script.error is None
        if is_last:
            self._end()
        self._deployment.num_generated += len(given)
        return GenerationOutput(
            tokens=tuple(self._sampled(token) for token in given),
            prompt_scores=self._prompt_scores() if first == 0 else None,
            finish=self._finish if is_last else None,
            stop_id=self._stop_id if is_last else None,
        )

    async def _wait(self) -> int:
        script = self._script
        if not (script.token_s or script.first_token_s):
            await asyncio.sleep(0)
            return script.burst
        due_s = self._started_s + script.first_token_s + self._num_given * script.token_s
        if (wait_s := due_s - self._clock()) > 0:
            await asyncio.sleep(wait_s)
        if not script.token_s:
            return script.burst
        elapsed_s = self._clock() - self._started_s - script.first_token_s
        return max(1, int(elapsed_s / script.token_s) + 1 - self._num_given)

    def _sampled(self, token: TokenId) -> Sampled:
        num_top = self._request.params.logprobs
        if num_top is None:
            return Sampled(seq=SequenceId(0), token=token)
        return Sampled(seq=SequenceId(0), token=token, logprob=-0.5, top=self._top(token, num_top))

    def _top(self, token: TokenId, num_top: int) -> tuple[Logprob, ...]:
        vocab_size = self._deployment.vocab_size
        return tuple(
            Logprob(token=TokenId((token + rank) % vocab_size), logprob=-0.5 - rank) for rank in range(num_top)
        )

    def _prompt_scores(self) -> tuple[Score, ...] | None:
        num_top = self._request.prompt_logprobs
        if num_top is None:
            return None
        return tuple(
            Score(logprob=-float(index), top=self._top(token, num_top))
            for index, token in enumerate(self._request.prompt[1:], 1)
        )

    def _end(self) -> None:
        self._is_over = True
        self._deployment.running.discard(self)

    def cancel(self) -> None:
        if not self._is_over:
            self._end()
            self._deployment.num_cancelled += 1

    def usage(self) -> GenerationUsage:
        return GenerationUsage(
            num_prompt_tokens=len(self._request.prompt),
            num_cached_tokens=self._deployment.num_cached_tokens,
            num_output_tokens=self._num_given,
            num_preemptions=0,
            queue_s=0.001,
            prefill_s=0.002,
            decode_s=0.010,
        )


@dataclass(eq=False, kw_only=True)
class FakeDeployment:
    """Set `script` (and the other fields) before a request comes; `reset` brings all back."""

    tokenizer: Tokenizer
    names: Sequence[str] = ("fake", "org/fake-model")
    created: int = 1_700_000_000
    root: str = "/models/fake"
    max_model_len: int = 256
    state: DeploymentState = DeploymentState.SERVING
    template: ChatTemplate | None = None
    original_template: ChatTemplate | None = field(init=False)
    generation_defaults: Mapping[str, float | int] = field(default_factory=dict)
    script: Callable[[GenerationRequest], Script] | None = None
    refusal: TllmError | None = None  # raised by submit
    num_admitted: int | None = None  # submit raises `refusal` after so many; None: at once
    num_cached_tokens: int = 0
    submitted: list[GenerationRequest] = field(default_factory=list)
    running: set[FakeGeneration] = field(default_factory=set)
    num_cancelled: int = 0
    num_generated: int = 0

    @classmethod
    def in_directory(cls, directory: Path) -> FakeDeployment:
        write_byte_tokenizer(directory)
        tokenizer = Tokenizer.load(directory)
        return cls(tokenizer=tokenizer, template=ChatTemplate.of(tokenizer))

    def __post_init__(self) -> None:
        self.original_template = self.template

    @property
    def takes_requests(self) -> bool:
        return self.state in (DeploymentState.SERVING, DeploymentState.REPLANNING)

    @property
    def vocab_size(self) -> int:
        return self.tokenizer.vocab_size

    @property
    def end_ids(self) -> tuple[TokenId, ...]:
        return tuple(token for name in (END, EOS) if (token := self.tokenizer.token_id(name)) is not None)

    def reset(self) -> None:
        vars(self).update(vars(FakeDeployment(tokenizer=self.tokenizer, template=self.original_template)))

    def ids(self, text: str) -> tuple[TokenId, ...]:
        return self.tokenizer.encode(text, add_special_tokens=False)

    def say(self, text: str, **pace: float) -> None:
        """Every generation says `text`."""
        script = Script(tokens=self.ids(text), **pace)  # type: ignore[arg-type]
        self.script = lambda request: script

    def submit(self, request: GenerationRequest) -> FakeGeneration:
        if self.refusal is not None and len(self.running) >= (self.num_admitted or 0):
            raise self.refusal
        if len(request.prompt) >= self.max_model_len:
            raise ContextLengthError(len(request.prompt), self.max_model_len)
        self.submitted.append(request)
        script = Script(tokens=self.ids("Hello, world!")) if self.script is None else self.script(request)
        generation = FakeGeneration(self, request, script)
        self.running.add(generation)
        return generation

    def statistics(self) -> DeploymentStatistics:
        return DeploymentStatistics(
            num_running=len(self.running),
            num_blocks=64,
            block_size=16,
            num_used_blocks=16,
            num_prompt_tokens=sum(len(request.prompt) for request in self.submitted),
            num_output_tokens=self.num_generated,
            epoch=1,
        )
