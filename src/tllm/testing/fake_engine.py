"""An engine without a model: same contract, no framework, and wrong tokens for every mistake in the bookkeeping.

Every layer keeps a 64-bit digest per KV slot, and a row's digest is a hash of what its layer's KV holds for all of
the sequence's positions, read through the block table. So a wrong block, a lost or stale KV, a bad copy, rows of hidden
states that are swapped or from another step, a layer skipped or done twice: each changes the tokens, and
`fake_tokens` says without any KV, blocks or stages what they should be. It is as slow as it is told to be, and fails
where it is told to.

    layer l:  kv[l][slot] = x;   x' = mix(sum over positions p of mix(kv[l][slot of p], p), x, l)
    token  :  mix(x', seed if not greedy) modulo the vocabulary, the next such number while it is not allowed

Hidden states carry a digest as eight numbers 0..255, repeated over the row: exact in float32, bfloat16 and float16.

Its weights are an account alone: which ones it holds and how many bytes it would have read for them.

This file does not know any framework, and neither who calls it.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from tllm.core.errors import EngineError
from tllm.core.types import (
    Activation,
    Codec,
    DType,
    Logprob,
    Sampled,
    SamplingParams,
    SamplingState,
    Score,
    Scored,
    SequenceFailed,
    SequenceId,
    Step,
    StepResult,
    TokenId,
)
from tllm.engines.base import EngineConfig, EngineStatistics
from tllm.engines.packing import BlockLedger, PackedChunk, PackedStep, pack
from tllm.models.checkpoint import Checkpoint
from tllm.models.slicing import shard_weights
from tllm.models.spec import ActivationKind, MlpKind, ModelSpec, NormKind, Rope, RopeKind, Shard

Digests = NDArray[np.uint64]

FAKE_SPEC = ModelSpec(
    family="fake",
    num_layers=4,
    hidden_size=16,
    intermediate_size=32,
    num_heads=2,
    num_kv_heads=1,
    head_dim=8,
    vocab_size=259,
    max_positions=4096,
    norm=NormKind.RMS,
    norm_eps=1e-5,
    positions=Rope(kind=RopeKind.DEFAULT, theta=10000.0, dim=8),
    mlp=MlpKind.GATED,
    activation=ActivationKind.SILU,
    attention_scale=8**-0.5,
)


def fake_checkpoint(spec: ModelSpec = FAKE_SPEC) -> Checkpoint:
    """What a FakeEngine can load: a spec without files."""
    return Checkpoint(
        directory=Path("fake"), spec=spec, dtype=DType.FLOAT32, fingerprint="fake", tensors={}, sources={}
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Faults:
    """What goes wrong. Raised errors come in the middle of a forward, after KV was written."""

    steps: frozenset[int] = frozenset()  # raise at these calls of `forward`, counted from 0
    seqs: frozenset[SequenceId] = frozenset()  # raise whenever one of these is in the step
    poison_ids: frozenset[TokenId] = frozenset()  # raise whenever a chunk holds one of these tokens
    failed_seqs: frozenset[SequenceId] = frozenset()  # reported as SequenceFailed instead of sampled
    error: Callable[[str], Exception] = EngineError  # what is raised


@dataclass(frozen=True, slots=True, kw_only=True)
class FakeBehaviour:
    """How slow, how large and how faulty."""

    seconds_per_step: float = 0.0
    seconds_per_token: float = 0.0
    sleep: Callable[[float], None] = time.sleep
    memory_bytes: int = 1 << 30
    faults: Faults = field(default_factory=Faults)


class FakeEngine:
    """Implements `tllm.engines.base.Engine`, for a checkpoint of any kind: only its spec is used."""

    def __init__(self, config: EngineConfig, behaviour: FakeBehaviour | None = None) -> None:
        _check_ranks(config.shard)
        self._config = config
        self._shard = config.shard
        self._behaviour = behaviour or FakeBehaviour()
        self._spec: ModelSpec | None = None
        self._fingerprint = ""
        self._weights: dict[str, int] = {}  # elements by canonical name
        self._read_bytes = 0
        self._kv: Digests | None = None  # (layers of the shard, slots)
        self._ledger: BlockLedger | None = None
        self._num_blocks = 0
        self._block_size = 0
        self._num_calls = 0
        self._num_steps = 0
        self._num_tokens = 0

    def load(self, checkpoint: Checkpoint, progress: Callable[[int, int], None]) -> None:
        if checkpoint.spec.hidden_size < 8:
            raise EngineError("the fake engine needs rows of at least 8 elements")
        self._fingerprint = checkpoint.fingerprint
        self._become(checkpoint, self._shard, progress)

    def reload(self, checkpoint: Checkpoint, shard: Shard, progress: Callable[[int, int], None]) -> None:
        if self._spec is None:
            raise EngineError("the engine has no weights: load comes before reload")
        if checkpoint.fingerprint != self._fingerprint:
            raise EngineError(f"the engine holds another checkpoint than the one in {checkpoint.directory}")
        _check_ranks(shard)
        self._drop_kv()
        self._spec = None
        self._become(checkpoint, shard, progress)

    def _become(self, checkpoint: Checkpoint, shard: Shard, progress: Callable[[int, int], None]) -> None:
        held, self._weights = self._weights, {}
        wanted = {weight.target: math.prod(weight.shape) for weight in shard_weights(checkpoint.spec, shard)}
        missing = sum(size for target, size in wanted.items() if target not in held)
        num_bytes = missing * checkpoint.dtype.num_bytes
        progress(0, num_bytes)
        self._spec, self._shard, self._weights = checkpoint.spec, shard, wanted
        self._read_bytes += num_bytes
        progress(num_bytes, num_bytes)

    def free_bytes(self) -> int:
        return self._behaviour.memory_bytes - self.statistics().kv_bytes

    def allocate(self, num_blocks: int, block_size: int) -> None:
        if self._spec is None:
            raise EngineError("the engine has no weights: load comes before allocate")
        if num_blocks < 1 or block_size < 1:
            raise EngineError(f"{num_blocks} blocks of {block_size} positions were asked for; both must be at least 1")
        self._drop_kv()
        needed = num_blocks * block_size * self._bytes_per_position()
        if needed > self.free_bytes():
            raise EngineError(f"the KV takes {needed} bytes, but {self.free_bytes()} are left")
        self._kv = np.zeros((len(self._shard.layers), num_blocks * block_size), dtype=np.uint64)
        self._ledger = BlockLedger(num_blocks, block_size)
        self._num_blocks, self._block_size = num_blocks, block_size

    def forward(self, step: Step, hidden: Activation | None) -> Activation | StepResult:
        if self._spec is None or self._kv is None or self._ledger is None:
            raise EngineError("the engine is not ready: load and allocate come before forward")
        call, self._num_calls = self._num_calls, self._num_calls + 1
        packed = pack(
            step,
            num_blocks=self._num_blocks,
            block_size=self._block_size,
            vocab_size=self._spec.vocab_size,
            max_positions=self._config.max_positions or self._spec.max_positions,
        )
        x = self._input(packed, hidden)
        with self._ledger.writing(packed):
            behaviour = self._behaviour
            if seconds := behaviour.seconds_per_step + behaviour.seconds_per_token * packed.num_rows:
                behaviour.sleep(seconds)
            for copy in step.copies:
                source, target = copy.source * self._block_size, copy.target * self._block_size
                self._kv[:, target : target + copy.length] = self._kv[:, source : source + copy.length]
            for layer, kv in zip(self._shard.layers, self._kv, strict=True):
                kv[packed.slots] = x
                seen = [self._read(kv, chunk) for chunk in packed.chunks]
                x = _next_layer(layer, x, np.concatenate(seen)) if seen else x
            self._raise_faults(call, step)
            answer = self._results(step, packed, x) if self._shard.head else self._to_wire(x)
        self._num_steps += 1
        self._num_tokens += packed.num_rows
        return answer

    def statistics(self) -> EngineStatistics:
        positions = self._num_blocks * self._block_size
        return EngineStatistics(
            weight_bytes=sum(self._weights.values()) * self._config.dtype.num_bytes,
            read_bytes=self._read_bytes,
            kv_bytes=positions * self._bytes_per_position() if positions else 0,
            num_blocks=self._num_blocks,
            num_steps=self._num_steps,
            num_tokens=self._num_tokens,
        )

    def close(self) -> None:
        self._drop_kv()
        self._spec = None
        self._weights = {}

    def _drop_kv(self) -> None:
        self._kv = self._ledger = None
        self._num_blocks = self._block_size = 0

    def _bytes_per_position(self) -> int:
        assert self._spec is not None
        return self._spec.kv_bytes_per_position(len(self._shard.layers), self._config.dtype)

    def _input(self, packed: PackedStep, hidden: Activation | None) -> Digests:
        assert self._spec is not None
        if self._shard.embed:
            if hidden is not None:
                raise EngineError("the shard embeds tokens itself, but was given hidden states")
            return _embed(packed.tokens, packed.positions)
        shape = (packed.num_rows, self._spec.hidden_size)
        if hidden is None:
            raise EngineError("the shard does not embed tokens and was given no hidden states")
        if hidden.shape != shape or hidden.dtype is not self._config.dtype or hidden.codec is not Codec.RAW:
            raise EngineError(f"hidden states are {hidden.codec} {hidden.dtype} {hidden.shape} instead of {shape}")
        if memoryview(hidden.data).nbytes != shape[0] * shape[1] * hidden.dtype.num_bytes:
            raise EngineError("hidden states have the wrong number of bytes")
        return _from_row_bytes(hidden)

    def _read(self, kv: Digests, chunk: PackedChunk) -> Digests:
        """What each row of the chunk sees: a running sum over the sequence's positions, in their order."""
        slots = np.concatenate([np.arange(run.slot, run.slot + run.length) for run in chunk.runs])
        return _seen(kv[slots])[chunk.start :]

    def _raise_faults(self, call: int, step: Step) -> None:
        faults = self._behaviour.faults
        if call in faults.steps:
            raise faults.error(f"told to fail at call {call}")
        for chunk in step.chunks:
            if chunk.seq in faults.seqs or not faults.poison_ids.isdisjoint(chunk.tokens):
                raise faults.error(f"told to fail for sequence {chunk.seq}")

    def _results(self, step: Step, packed: PackedStep, x: Digests) -> StepResult:
        assert self._spec is not None
        vocab_size = self._spec.vocab_size
        sampled, failed, scored = [], [], []
        for chunk in packed.chunks:
            seq, state, scoring = chunk.chunk.seq, chunk.chunk.sampling, chunk.chunk.scoring
            if seq in self._behaviour.faults.failed_seqs:
                failed.append(SequenceFailed(seq=seq, reason="told to fail"))
                continue
            rows = [int(digest) for digest in x[chunk.first_row : chunk.first_row + chunk.num_rows]]
            if scoring is not None:
                pairs = zip(rows, scoring.targets, strict=False)  # one target fewer than rows, perhaps
                scores = tuple(_score(digest, target, scoring.top, vocab_size) for digest, target in pairs)
                scored.append(Scored(seq=seq, start=chunk.start, scores=scores))
            if state is not None:
                sampled.append(_sample(seq, rows[-1], state, vocab_size))
        return StepResult(
            step=step.id, epoch=step.epoch, sampled=tuple(sampled), scored=tuple(scored), failed=tuple(failed)
        )

    def _to_wire(self, x: Digests) -> Activation:
        assert self._spec is not None
        return _to_row_bytes(x, self._spec.hidden_size, self._config.dtype)


def _check_ranks(shard: Shard) -> None:
    if shard.ranks != 1:
        raise EngineError("the fake engine computes whole layers only")


def fake_tokens(
    prompt: Sequence[TokenId],
    num_tokens: int,
    params: SamplingParams | None = None,
    *,
    spec: ModelSpec = FAKE_SPEC,
) -> tuple[TokenId, ...]:
    """The tokens a FakeEngine of this spec answers, whatever the stages, chunks, blocks and batch-mates."""
    params = params or SamplingParams(temperature=0.0)
    tokens = list(prompt)
    for count in range(num_tokens):
        x = _embed(np.array(tokens), np.arange(len(tokens)))
        for layer in range(spec.num_layers):
            x = _next_layer(layer, x, _seen(x))
        banned = params.stop_ids if count < params.min_tokens else ()
        state = SamplingState(params=params, position=len(tokens), banned_ids=banned)
        tokens.append(_choose(int(x[-1]), state, spec.vocab_size))
    return tuple(tokens[len(prompt) :])


def _mix(x: Digests) -> Digests:
    """The finaliser of splitmix64 (Steele, Lea, Flood 2014)."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def _embed(tokens: NDArray[np.int64], positions: NDArray[np.int64]) -> Digests:
    return _mix(tokens.astype(np.uint64) + (positions.astype(np.uint64) << np.uint64(32)) + np.uint64(1))


def _seen(kv: Digests) -> Digests:
    """For each position, the sum over all positions up to it; places count, so exchanged positions show."""
    places = np.arange(1, len(kv) + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    sums: Digests = np.cumsum(_mix(kv ^ places), dtype=np.uint64)
    return sums


def _next_layer(layer: int, x: Digests, seen: Digests) -> Digests:
    return _mix(seen ^ (x << np.uint64(1)) ^ np.uint64(layer + 1))


def _numbers(digest: int, salt: int) -> Iterator[int]:
    x = np.array([digest ^ (salt * 0x9E3779B97F4A7C15 & 0xFFFFFFFFFFFFFFFF)], dtype=np.uint64)
    while True:
        x = _mix(x + np.uint64(1))
        yield int(x[0])


def _choose(digest: int, state: SamplingState, vocab_size: int) -> TokenId:
    params = state.params
    salt = 0 if params.temperature == 0 else params.seed + 1
    allowed: Sequence[int] = range(vocab_size) if params.allowed_ids is None else params.allowed_ids
    if state.banned_ids:
        allowed = [token for token in allowed if token not in state.banned_ids]
    return TokenId(allowed[next(_numbers(digest, salt)) % len(allowed)])


def _sample(seq: SequenceId, digest: int, state: SamplingState, vocab_size: int) -> Sampled:
    token = _choose(digest, state, vocab_size)
    if state.params.logprobs is None:
        return Sampled(seq=seq, token=token)
    score = _score(digest, token, state.params.logprobs, vocab_size)
    return Sampled(seq=seq, token=token, logprob=score.logprob, top=score.top)


def _score(digest: int, token: TokenId, top: int, vocab_size: int) -> Score:
    """Made-up log-probabilities: of a token a hash, of the best ones -0.1, -0.2, ..."""
    numbers = _numbers(digest, 0)
    best: list[TokenId] = []
    while len(best) < min(top, vocab_size):
        candidate = TokenId(next(numbers) % vocab_size)
        if candidate not in best:
            best.append(candidate)
    logprobs = {candidate: -(rank + 1) / 10 for rank, candidate in enumerate(best)}
    own = logprobs.get(token, -top / 10 - 1 - next(_numbers(digest, token + 1)) % 1000 / 100)
    return Score(logprob=own, top=tuple(Logprob(token=t, logprob=p) for t, p in logprobs.items()))


def _to_row_bytes(x: Digests, hidden_size: int, dtype: DType) -> Activation:
    digits = x[:, None] >> (np.arange(8, dtype=np.uint64) * np.uint64(8)) & np.uint64(255)
    row = np.tile(digits, (1, -(-hidden_size // 8)))[:, :hidden_size].astype("<f4")
    match dtype:
        case DType.FLOAT32:
            data = row.tobytes()
        case DType.FLOAT16:
            data = row.astype("<f2").tobytes()
        case DType.BFLOAT16:
            data = (row.view("<u4") >> 16).astype("<u2").tobytes()
    return Activation(data=data, dtype=dtype, shape=(len(x), hidden_size))


def _from_row_bytes(hidden: Activation) -> Digests:
    match hidden.dtype:
        case DType.FLOAT32:
            row = np.frombuffer(hidden.data, dtype="<f4")
        case DType.FLOAT16:
            row = np.frombuffer(hidden.data, dtype="<f2").astype("<f4")
        case DType.BFLOAT16:
            row = (np.frombuffer(hidden.data, dtype="<u2").astype("<u4") << 16).view("<f4")
    digits = row.reshape(hidden.shape)[:, :8].astype(np.uint64)
    places = np.arange(8, dtype=np.uint64) * np.uint64(8)
    x: Digests = (digits << places).sum(axis=1, dtype=np.uint64)
    if _to_row_bytes(x, hidden.shape[1], hidden.dtype).data != bytes(hidden.data):
        raise EngineError("hidden states are not what the stage before sent")
    return x
