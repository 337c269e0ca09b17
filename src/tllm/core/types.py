"""What travels between the parts: chunks down the pipeline, tokens home.

Everything here is frozen, slotted and keyword-only, holds tuples rather than lists, and can be compared, hashed and
sent. Positions are counted from 0 at the sequence's first prompt token. Block `blocks[i]` of a sequence holds the
KV of positions `[i * block_size, (i + 1) * block_size)` on every stage.

This file does not know how anything is computed, scheduled or sent.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Final, Literal, NewType

from tllm.core.errors import ConfigError

SequenceId = NewType("SequenceId", int)
BlockId = NewType("BlockId", int)
StepId = NewType("StepId", int)
Epoch = NewType("Epoch", int)
TokenId = NewType("TokenId", int)

HEAD: Final = "head"  # the head among the nodes: in certificates, in links, and where an order names a neighbour


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """How to choose a sequence's tokens, and when to stop. The same for all of the sequence's life.

    `logprobs` asks for the log-probability of every chosen token and of that many best alternatives (0: the chosen
    one alone; None: nothing). They are taken from the model's own distribution, before penalties and temperature.
    """

    temperature: float = 1.0  # 0 is greedy
    top_k: int = 0  # 0 keeps all
    top_p: float = 1.0  # 1 keeps all
    min_p: float = 0.0  # 0 keeps all
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0  # 1 changes nothing; counts prompt and output alike
    logit_bias: tuple[tuple[TokenId, float], ...] = ()
    allowed_ids: tuple[TokenId, ...] | None = None  # None allows all
    seed: int = 0  # always set: whoever leaves it to chance draws one first
    max_tokens: int = 16
    min_tokens: int = 0  # stop ids cannot be chosen before that many tokens
    stop_ids: tuple[TokenId, ...] = ()  # end of sequence included, unless the request ignores it
    logprobs: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingState:
    """All that the last stage needs to sample one token without keeping a record of the sequence.

    `counts` are the occurrences of each token among the *output* so far and `prompt_ids` the distinct ids of the
    prompt; both are left empty unless a penalty of `params` needs them. `banned_ids` must not be chosen now (stop ids
    before `min_tokens`).
    """

    params: SamplingParams
    position: int  # of the token to be sampled; with the seed and the token's id it determines the noise
    counts: tuple[tuple[TokenId, int], ...] = ()
    prompt_ids: tuple[TokenId, ...] = ()
    banned_ids: tuple[TokenId, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Scoring:
    """Ask for the log-probabilities of given tokens, row by row (prompt log-probabilities).

    Row `i` of the chunk predicts position `start + i + 1`; `targets[i]` is the token that stands there. There may be
    one target fewer than rows: the last row of a prompt predicts a token that is not known yet.
    """

    targets: tuple[TokenId, ...]
    top: int  # how many best alternatives beside each


@dataclass(frozen=True, slots=True, kw_only=True)
class Chunk:
    """A run of one sequence's tokens to compute now: positions `start, start + 1, ...`.

    `blocks` covers positions `0` to `start + len(tokens) - 1` and may be longer. `sampling` is set only when the
    chunk ends at the sequence's last token. A decode is a chunk of one token.
    """

    seq: SequenceId
    start: int
    tokens: tuple[TokenId, ...]
    blocks: tuple[BlockId, ...]
    sampling: SamplingState | None = None
    scoring: Scoring | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockCopy:
    """Copy the KV of the first `length` positions of block `source` to block `target`, on every layer."""

    source: BlockId
    target: BlockId
    length: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """Chunks of disjoint sequences that travel down the pipeline together; `copies` are done before any compute."""

    id: StepId
    epoch: Epoch
    copies: tuple[BlockCopy, ...] = ()
    chunks: tuple[Chunk, ...] = ()

    @property
    def num_tokens(self) -> int:
        return sum(len(chunk.tokens) for chunk in self.chunks)


class DType(StrEnum):
    """Element types that may cross a link or hold weights."""

    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"
    FLOAT16 = "float16"

    @property
    def num_bytes(self) -> int:
        return 4 if self is DType.FLOAT32 else 2


@dataclass(frozen=True, slots=True, kw_only=True)
class Quantization:
    """How the weights of linears are held: so many bits each, and one scale for every `group` inputs of an output.

    Written int8 (in groups of 128), int4 (in groups of 64), int4-g32, int4-g64, int4-g128.
    """

    bits: Literal[4, 8]
    group: int

    @classmethod
    def parse(cls, text: str) -> Quantization:
        """Raises ConfigError."""
        if text not in _QUANTIZATIONS:
            raise ConfigError(f"Weights cannot be quantized to {text!r}; possible are {', '.join(_QUANTIZATIONS)}.")
        return _QUANTIZATIONS[text]

    def __str__(self) -> str:
        return next(text for text, known in _QUANTIZATIONS.items() if known == self)


_QUANTIZATIONS: Final = {
    "int8": Quantization(bits=8, group=128),
    "int4": Quantization(bits=4, group=64),
    "int4-g32": Quantization(bits=4, group=32),
    "int4-g64": Quantization(bits=4, group=64),
    "int4-g128": Quantization(bits=4, group=128),
}


class Codec(StrEnum):
    """How an activation's bytes are encoded on the wire."""

    RAW = "raw"


@dataclass(frozen=True, slots=True, kw_only=True)
class Activation:
    """Hidden states of a step: row-major, shape (T, D), rows in chunk order, little-endian."""

    data: bytes | bytearray | memoryview
    dtype: DType
    shape: tuple[int, int]
    codec: Codec = Codec.RAW


@dataclass(frozen=True, slots=True, kw_only=True)
class Logprob:
    """One token's log-probability (natural log)."""

    token: TokenId
    logprob: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampled:
    """The token chosen for a sequence; `logprob` and `top` (best first) only when its request asks for them."""

    seq: SequenceId
    token: TokenId
    logprob: float | None = None
    top: tuple[Logprob, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Score:
    """The answer to one target of a `Scoring`: the target's log-probability and the best alternatives."""

    logprob: float
    top: tuple[Logprob, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Scored:
    """Scores of positions `start + 1, start + 2, ...` of a sequence, in order."""

    seq: SequenceId
    start: int
    scores: tuple[Score, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class SequenceFailed:
    """One sequence of a step could not be computed (its logits are not finite, say); the others are good."""

    seq: SequenceId
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class StepResult:
    """What comes home from the last stage when all stages did their part of a step."""

    step: StepId
    epoch: Epoch
    sampled: tuple[Sampled, ...] = ()
    scored: tuple[Scored, ...] = ()
    failed: tuple[SequenceFailed, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class StepFailed:
    """A stage could not compute a step. No sequence of the step advanced; KV written for it must be rewritten."""

    step: StepId
    epoch: Epoch
    layers: tuple[int, int]  # the failing stage's half-open range
    reason: str


class FinishReason(StrEnum):
    """Why a sequence ended."""

    STOP = "stop"  # a stop id was sampled, or (decided above the scheduler) a stop string appeared
    LENGTH = "length"  # max_tokens or the context is full
    ABORT = "abort"  # whoever asked is gone
    ERROR = "error"
