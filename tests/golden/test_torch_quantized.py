"""Every form of weights: a row's numbers are the same bits in every cut, chunk and company; kernels agree with torch's
operations; and answers are near those of transformers with the weights spelled out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch

from tllm.core.types import DType, Quantization
from tllm.engines.base import EngineConfig
from tllm.engines.torch import engine as engine_module
from tllm.engines.torch.engine import TorchEngine
from tllm.engines.torch.kernels import build
from tllm.models.checkpoint import Checkpoint
from tllm.testing.checkpoints import tiny_checkpoint
from tllm.testing.quantized import plain_twin, quantized_checkpoint, write_gguf
from tllm.testing.stages import Stages, chunk, cut

LAYERS, BLOCK_SIZE, NUM_BLOCKS = 4, 8, 64
PROMPT = [(37 * i + 11) % 259 for i in range(45)]
OTHERS = [[(53 * i + 7 * n) % 259 for i in range(9 + 8 * n)] for n in range(4)]
SHAPE = {"layers": LAYERS, "hidden_size": 128, "intermediate_size": 192, "tied": True}

MADE = ("float32", "bfloat16", "float16", "int8", "int4", "int4-g32")  # of a plain checkpoint, while it is loaded
GGUF = ("Q4_0", "Q8_0", "F16")


@dataclass(frozen=True)
class Form:
    """A checkpoint and how it is held."""

    name: str
    directory: Path
    dtype: DType = DType.FLOAT32
    quantization: Quantization | None = None
    twin: Path | None = None  # the weights before this test quantized them, or spelled out, in float32
    # Mean differences of log-probabilities, which are -16 on average: these random models are as sharp as can be, and
    # one activation rounded the other way moves a row's answer by 0.1.
    error: float = 1e-4  # from the twin
    flips: float = 0.15  # between kernels and torch


# The others differ from these in how they are read, which tests/models compares.
STORED = ("mlx-4", "gptq-4-ordered", "awq", "tllm-int8")


@pytest.fixture(scope="module", params=[*MADE, *STORED, *GGUF])
def form(request, tmp_path_factory) -> Form:
    name, directory = request.param, tmp_path_factory.mktemp("form")
    if name in GGUF:
        write_gguf(directory / "m.gguf", types=name, **SHAPE)
        return Form(name, directory / "m.gguf", flips=0.15 if name.startswith("Q") else 1e-4)
    if name in STORED:
        weights = quantized_checkpoint(directory, name, **SHAPE)
        twin = plain_twin(tmp_path_factory.mktemp("twin"), directory, weights)
        return Form(name, directory, twin=twin, error=0.4)
    twin = tiny_checkpoint(directory, "llama", **SHAPE)
    if name in set(DType):
        exact = name == "float32"
        return Form(
            name, twin, dtype=DType(name), twin=twin, error=1e-4 if exact else 0.2, flips=1e-4 if exact else 0.15
        )
    error = 0.5 if name == "int8" else 4.0
    return Form(name, twin, quantization=Quantization.parse(name), twin=twin, error=error)


def loaded(form: Form, sizes: Sequence[int] = (LAYERS,)) -> Stages:
    checkpoint = Checkpoint.open(form.directory)
    engines = []
    for shard in cut(LAYERS, sizes):
        engine = TorchEngine(EngineConfig(shard=shard, dtype=form.dtype, quantization=form.quantization))
        engine.load(checkpoint, lambda done, total: None)
        engines.append(engine)
    return Stages(engines, num_blocks=NUM_BLOCKS, block_size=BLOCK_SIZE)


def scores(stages: Stages, sizes: Sequence[int] = (len(PROMPT),), *, company: bool = False) -> list[float]:
    """Log-probabilities of the prompt's tokens, computed in chunks of these sizes, perhaps beside others."""
    found: list[float] = []
    start = 0
    for number, size in enumerate(sizes):
        stop = start + size
        targets = PROMPT[start + 1 : stop + 1]
        chunks = [chunk(1, start, PROMPT[start:stop], range(8), targets=targets)]
        if company and number < len(OTHERS):
            other = OTHERS[number]
            chunks.insert(
                number % 2, chunk(2 + number, 0, other, range(8 * (number + 1), 8 * (number + 2)), targets=[1])
            )
        (scored,) = [s for s in stages.run(chunks).scored if s.seq == 1]
        found += [score.logprob for score in scored.scores]
        start = stop
    assert len(found) == len(PROMPT) - 1
    return found


CHUNKINGS = [(1,) * 45, (7,) * 6 + (3,), (16, 28, 1), (33, 1, 1, 10)]


@pytest.mark.skipif(build.library() is None, reason="there is no compiler")
def test_a_row_is_the_same_bits_in_every_cut_chunk_and_company(form: Form) -> None:
    stages = loaded(form)
    expected = scores(stages)
    for sizes in CHUNKINGS:
        assert scores(stages, sizes) == expected, sizes
        assert scores(stages, sizes, company=True) == expected, sizes
    for cuts in ((1, 3), (1, 1, 1, 1)):
        assert scores(loaded(form, cuts), (16, 28, 1), company=True) == expected, cuts


def test_kernels_and_torch_agree(form: Form, monkeypatch: pytest.MonkeyPatch) -> None:
    by_kernels = scores(loaded(form))
    monkeypatch.setattr(engine_module.kernels, "library", lambda: None)
    by_torch = scores(loaded(form))
    assert np.abs(np.subtract(by_kernels, by_torch)).mean() < form.flips


def test_answers_are_near_those_of_the_weights_spelled_out(form: Form) -> None:
    from transformers import AutoModelForCausalLM

    if form.twin is None:
        pytest.skip("has no twin")
    model = AutoModelForCausalLM.from_pretrained(form.twin, dtype=torch.float32, attn_implementation="eager")
    with torch.inference_mode():
        logprobs = model(torch.tensor([PROMPT])).logits[0].log_softmax(-1)
    expected = [float(logprobs[i, token]) for i, token in enumerate(PROMPT[1:])]
    assert np.abs(np.subtract(scores(loaded(form)), expected)).mean() < form.error


def test_a_shard_takes_the_bytes_that_were_planned(form: Form) -> None:
    stages, checkpoint = loaded(form, (1, 3)), Checkpoint.open(form.directory)
    for engine, shard in zip(stages.engines, cut(LAYERS, (1, 3)), strict=True):
        planned = checkpoint.weight_bytes(shard, form.dtype, form.quantization)
        assert engine.statistics().weight_bytes == planned
