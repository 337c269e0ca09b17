"""The peer's files hold the checkpoint's weights: what reads GGUF reads the same model out of them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from tllm.core.types import DType
from tllm.lab.accuracy import engine_logits, texts_of
from tllm.testing.checkpoints import ROPES, tiny_checkpoint

gguf = pytest.importorskip("gguf")
make_gguf = pytest.importorskip("scripts.make_gguf")


@pytest.mark.parametrize(("family", "rope"), [("llama", "default"), ("llama", "llama3"), ("qwen3", "default")])
def test_a_gguf_file_holds_the_same_weights(tmp_path: Path, family: str, rope: str):
    model = tiny_checkpoint(tmp_path / "hf", family, rope=ROPES[rope], tied=True, dtype=DType.BFLOAT16)
    make_gguf.write_gguf(model, tmp_path / "model.gguf")
    reader = gguf.GGUFReader(tmp_path / "model.gguf")
    names = {tensor.name for tensor in reader.tensors}
    assert "output.weight" not in names  # tied
    assert ("rope_freqs.weight" in names) == (rope == "llama3")
    assert not list(tmp_path.glob("*.unfinished"))
    texts = texts_of(model)
    for ours, theirs in zip(
        engine_logits(model, texts, dtype=DType.FLOAT32),
        engine_logits(tmp_path / "model.gguf", texts, dtype=DType.FLOAT32),
        strict=True,
    ):
        np.testing.assert_allclose(theirs, ours, atol=1e-3)
