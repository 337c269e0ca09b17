"""What holding weights in fewer bits does to a model's answers: how far its distributions move, how often its choice.

For every position of some texts the distribution of the next token is compared with that of the same weights in another
form: KL(reference || form) in nats, and whether the likeliest token is the same. A random model's texts are random ids.

This file does not know what a form costs or gains, nor other systems than the torch engine.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tllm.core.types import BlockId, Chunk, DType, Epoch, Quantization, Scoring, SequenceId, Step, StepId, TokenId
from tllm.engines.base import EngineConfig
from tllm.models.checkpoint import Checkpoint
from tllm.models.spec import Shard

Logits = NDArray[np.float32]  # (T, V): after every token of a text
Text = tuple[TokenId, ...]

_MAX_TEXT = 512
_NUM_RANDOM, _RANDOM_LENGTH = 2, 128
_ROWS_AT_ONCE = 16  # x 128k vocabulary x 8 bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Divergence:
    """Of one form's distributions from a reference's, over all positions."""

    mean_kl: float
    largest_kl: float
    greedy_agreement: float  # share of positions
    num_positions: int


def texts_of(model: Path) -> tuple[Text, ...]:
    """The questions and answers that lie beside a model, a few at a time; random ids where there are none."""
    spec = Checkpoint.open(model).spec
    golden = model / "golden.json"
    if not golden.exists():
        random = np.random.default_rng(0).integers(0, spec.vocab_size, (_NUM_RANDOM, _RANDOM_LENGTH))
        return tuple(tuple(TokenId(int(token)) for token in row) for row in random)
    texts: list[Text] = []
    for entry in json.loads(golden.read_bytes()):
        text = tuple(TokenId(token) for token in entry["prompt_tokens"] + entry["tokens"])
        if texts and len(texts[-1]) + len(text) <= min(_MAX_TEXT, spec.max_positions):
            texts[-1] += text
        else:
            texts.append(text)
    return tuple(texts)


def engine_logits(
    model: Path,
    texts: Sequence[Text],
    *,
    dtype: DType,
    quantization: Quantization | None = None,
    num_threads: int | None = None,
) -> Iterator[Logits]:
    """Those of the torch engine with weights in this form, a text at a time."""
    from tllm.engines.torch.engine import TorchEngine
    from tllm.lab.inside import kept_logits

    checkpoint = Checkpoint.open(model)
    shard = Shard(first_layer=0, last_layer=checkpoint.spec.num_layers, embed=True, head=True)
    engine = TorchEngine(EngineConfig(shard=shard, dtype=dtype, quantization=quantization, num_threads=num_threads))
    try:
        engine.load(checkpoint, lambda done, total: None)
        engine.allocate(1, max(map(len, texts)))
        for number, text in enumerate(texts):
            chunk = Chunk(
                seq=SequenceId(number),
                start=0,
                tokens=text,
                blocks=(BlockId(0),),
                scoring=Scoring(targets=text, top=0),  # any targets: what is scored is not used
            )
            with kept_logits(engine) as kept:
                engine.forward(Step(id=StepId(number), epoch=Epoch(1), chunks=(chunk,)), None)
            yield np.concatenate([logits.cpu().numpy() for logits in kept])
    finally:
        engine.close()


def divergence(reference: Sequence[Logits], other: Sequence[Logits]) -> Divergence:
    """Of logits over the same positions, text by text."""
    kls: list[NDArray[np.float64]] = []
    agree: list[NDArray[np.bool_]] = []
    for ours, theirs in zip(reference, other, strict=True):
        assert ours.shape == theirs.shape, (ours.shape, theirs.shape)
        for first in range(0, len(ours), _ROWS_AT_ONCE):
            rows = slice(first, first + _ROWS_AT_ONCE)
            log_p, log_q = _log_softmax(ours[rows]), _log_softmax(theirs[rows])
            kls.append(np.sum(np.exp(log_p) * (log_p - log_q), axis=1))
            agree.append(ours[rows].argmax(axis=1) == theirs[rows].argmax(axis=1))
    kl, same = np.concatenate(kls), np.concatenate(agree)
    return Divergence(
        mean_kl=float(kl.mean()),
        largest_kl=float(kl.max()),
        greedy_agreement=float(same.mean()),
        num_positions=len(kl),
    )


def lines(measured: Sequence[tuple[str, str, Divergence]]) -> Iterator[str]:
    """A table of (form, what it is compared with, how far it is from that)."""
    yield f"{'':<18}{'compared with':<18}{'mean KL':>10}{'largest':>10}{'greedy agrees':>16}{'positions':>12}"
    for form, reference, found in measured:
        yield (
            f"{form:<18}{reference:<18}{found.mean_kl:>10.2e}{found.largest_kl:>10.2e}"
            f"{found.greedy_agreement:>16.2%}{found.num_positions:>12}"
        )


def _log_softmax(logits: NDArray[Any]) -> NDArray[np.float64]:
    wide = logits.astype(np.float64)
    wide -= wide.max(axis=1, keepdims=True)
    wide -= np.log(np.exp(wide).sum(axis=1, keepdims=True))
    return wide
