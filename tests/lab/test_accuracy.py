"""Distributions are compared position by position, over all of them, as they come from an engine."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from tllm.core.types import (
    BlockId,
    Chunk,
    DType,
    Epoch,
    Quantization,
    Scoring,
    SequenceId,
    Step,
    StepId,
    StepResult,
    TokenId,
)
from tllm.engines.base import EngineConfig
from tllm.engines.torch.engine import TorchEngine
from tllm.lab.accuracy import divergence, engine_logits, lines, texts_of
from tllm.models.checkpoint import Checkpoint
from tllm.models.spec import Shard
from tllm.testing.checkpoints import tiny_checkpoint


def logits(*rows: list[float]) -> np.ndarray:
    return np.array(rows, dtype=np.float32)


def test_the_divergence_of_known_distributions():
    halves, quarter = logits([0.0, 0.0]), logits([float(np.log(1 / 4)), float(np.log(3 / 4))])
    found = divergence([halves, halves], [halves, quarter])
    expected = 0.5 * np.log(0.5 / 0.25) + 0.5 * np.log(0.5 / 0.75)
    assert found.largest_kl == pytest.approx(expected, rel=1e-6)
    assert found.mean_kl == pytest.approx(expected / 2, rel=1e-6)
    assert found.greedy_agreement == 0.5
    assert found.num_positions == 2


def test_what_is_added_to_all_logits_changes_nothing():
    rows = np.random.default_rng(0).normal(size=(40, 7)).astype(np.float32)
    found = divergence([rows], [rows + np.float32(1000)])
    assert found.largest_kl == pytest.approx(0, abs=1e-6)
    assert found.greedy_agreement == 1.0


def test_the_engines_logits_are_those_that_it_scores_by(tmp_path: Path):
    model = tiny_checkpoint(tmp_path, shards=1)
    text = tuple(TokenId(token) for token in range(100))
    (found,) = engine_logits(model, [text], dtype=DType.FLOAT32)
    checkpoint = Checkpoint.open(model)
    engine = TorchEngine(
        EngineConfig(shard=Shard(first_layer=0, last_layer=4, embed=True, head=True), dtype=DType.FLOAT32)
    )
    engine.load(checkpoint, lambda done, total: None)
    engine.allocate(1, len(text))
    scoring = Scoring(targets=text[1:], top=0)
    chunk = Chunk(seq=SequenceId(0), start=0, tokens=text, blocks=(BlockId(0),), scoring=scoring)
    result = engine.forward(Step(id=StepId(0), epoch=Epoch(1), chunks=(chunk,)), None)
    assert isinstance(result, StepResult)
    wide = found[:-1].astype(np.float64)
    expected = [row[token] - np.log(np.exp(row).sum()) for row, token in zip(wide, text[1:], strict=True)]
    assert [score.logprob for score in result.scored[0].scores] == pytest.approx(expected, abs=1e-4)


def test_fewer_bits_are_farther_away(tmp_path: Path):
    model = tiny_checkpoint(tmp_path, hidden_size=128, shards=1)
    texts = texts_of(model)
    plain = list(engine_logits(model, texts, dtype=DType.FLOAT32))
    eight, four = (
        divergence(plain, list(engine_logits(model, texts, dtype=DType.FLOAT32, quantization=Quantization.parse(form))))
        for form in ("int8", "int4")
    )
    assert 0 < eight.mean_kl < four.mean_kl
    assert eight.num_positions == sum(map(len, texts))
    assert len(list(lines([("int8", "float32", eight)]))) == 2


def test_texts_beside_a_model_are_taken_together_up_to_what_it_can_hold(tmp_path: Path):
    model = tiny_checkpoint(tmp_path, max_positions=16)
    entry = {"prompt_tokens": [1, 2, 3, 4], "tokens": [5, 6]}
    (model / "golden.json").write_text(json.dumps([entry] * 5))
    assert [len(text) for text in texts_of(model)] == [12, 12, 6]
