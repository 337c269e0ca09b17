"""Weights from files: the right bytes, in the right place, in the right type, once."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tllm.core.errors import EngineError, ModelError
from tllm.core.types import DType
from tllm.engines.base import EngineConfig
from tllm.engines.torch import linears, reading
from tllm.engines.torch.engine import TorchEngine
from tllm.engines.torch.kernels import build
from tllm.engines.torch.linear import Table
from tllm.engines.torch.loader import load_weights
from tllm.models.checkpoint import Checkpoint
from tllm.models.spec import Shard
from tllm.testing.checkpoints import tiny_checkpoint
from tllm.testing.stages import Stages, chunk, cut

CPU = torch.device("cpu")


def ignore(done: int, total: int) -> None:
    pass


def stored(directory: Path) -> dict[str, torch.Tensor]:
    tensors: dict[str, torch.Tensor] = {}
    for file in sorted(directory.glob("*.safetensors")):
        tensors |= load_file(file)
    return tensors


def table(embedding: Table, num_rows: int = 259) -> torch.Tensor:
    return embedding.rows(torch.arange(num_rows))


def identity(linear: object, num_inputs: int, dtype: torch.dtype) -> torch.Tensor:
    """The weight of a linear, read off its answers."""
    with torch.inference_mode():
        return linear(torch.eye(num_inputs, dtype=dtype)).t()  # type: ignore[operator,no-any-return]


@pytest.mark.parametrize("kernels", [True, False], ids=["kernels", "torch"])
@pytest.mark.parametrize("run_bytes", [1 << 20, 5000], ids=["whole", "in runs of rows"])
@pytest.mark.parametrize("staging_bytes", [1 << 20, 1000], ids=["at once", "bit by bit"])
@pytest.mark.parametrize("file_dtype", [DType.FLOAT32, DType.BFLOAT16, DType.FLOAT16])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_weights_are_those_of_the_files(
    family: str,
    file_dtype: DType,
    staging_bytes: int,
    run_bytes: int,
    kernels: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(reading, "_STAGING_BYTES", staging_bytes)
    monkeypatch.setattr(reading, "_RUN_BYTES", run_bytes)
    monkeypatch.setattr(linears, "PACK_BYTES", run_bytes)
    checkpoint = Checkpoint.open(tiny_checkpoint(tmp_path, family, dtype=file_dtype, layers=2))
    shard = Shard(first_layer=0, last_layer=2, embed=True, head=True)
    with torch.inference_mode():
        library = build.library() if kernels else None
        weights = load_weights(checkpoint, shard, DType.FLOAT32, CPU, ignore, library=library)
    files = stored(tmp_path)
    layer = weights.layers[1]
    width, inner = checkpoint.spec.hidden_size, checkpoint.spec.intermediate_size
    assert weights.embed is not None
    zero = torch.zeros(1, width)
    if family == "llama":
        names = [f"model.layers.1.self_attn.{name}_proj.weight" for name in "qkv"]
        expected_qkv = torch.cat([files[name] for name in names]).float()
        expected_down = files["model.layers.1.mlp.down_proj.weight"].float()
        assert torch.equal(table(weights.embed), files["model.embed_tokens.weight"].float())
    else:
        expected_qkv = files["transformer.h.1.attn.c_attn.weight"].float().t()
        expected_down = files["transformer.h.1.mlp.c_proj.weight"].float().t()
        assert torch.equal(table(weights.embed), files["transformer.wte.weight"].float())
        bias = files["transformer.h.1.attn.c_attn.bias"].float()
        with torch.inference_mode():
            assert torch.allclose(layer.qkv(zero)[0], bias)
        expected_qkv = expected_qkv + bias.unsqueeze(1)  # identity adds it to every column
        expected_down = expected_down + files["transformer.h.1.mlp.c_proj.bias"].float().unsqueeze(1)
    torch.testing.assert_close(identity(layer.qkv, width, torch.float32), expected_qkv, atol=1e-6, rtol=0)
    torch.testing.assert_close(identity(layer.down, inner, torch.float32), expected_down, atol=1e-6, rtol=0)
    assert weights.num_bytes == checkpoint.weight_bytes(shard, DType.FLOAT32)


def test_a_stage_needs_only_the_files_that_hold_its_slices(tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(tiny_checkpoint(tmp_path, layers=4, shards=12))
    shard = cut(4, (2, 2))[1]
    needed = {checkpoint.tensors[piece.source].file.name for piece in checkpoint.slices(shard)}
    unrelated = [file for file in tmp_path.glob("*.safetensors") if file.name not in needed]
    assert unrelated
    for file in unrelated:
        file.unlink()
    assert set(load_weights(checkpoint, shard, DType.FLOAT32, CPU, ignore).layers) == {2, 3}


def test_tied_embeddings_are_held_once_where_both_ends_are_and_on_both_ends_where_not(tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(tiny_checkpoint(tmp_path, tied=True, layers=2))
    table_bytes = 4 * checkpoint.spec.vocab_size * checkpoint.spec.hidden_size
    sizes = {
        name: [load_weights(checkpoint, s, DType.FLOAT32, CPU, ignore).num_bytes for s in cut(2, stages)]
        for name, stages in (("one", (2,)), ("two", (1, 1)))
    }
    assert sum(sizes["two"]) == sizes["one"][0] + table_bytes
    (whole,) = cut(2, (2,))
    weights = load_weights(checkpoint, whole, DType.FLOAT32, CPU, ignore)
    assert weights.embed is not None
    assert weights.head is not None
    with torch.inference_mode():
        assert torch.allclose(weights.head(torch.eye(checkpoint.spec.hidden_size)), table(weights.embed).t(), atol=1e-6)


def test_a_stage_in_the_middle_has_no_ends(tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(tiny_checkpoint(tmp_path, "gpt2", layers=3))
    weights = load_weights(checkpoint, cut(3, (1, 1, 1))[1], DType.FLOAT32, CPU, ignore)
    assert (weights.embed, weights.positions, weights.norm, weights.head) == (None, None, None, None)


def test_a_file_that_ends_early_is_a_model_error_that_names_it(tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(tiny_checkpoint(tmp_path, shards=1))
    file = tmp_path / "model.safetensors"
    with file.open("r+b") as opened:
        opened.truncate(file.stat().st_size - 10)
    with pytest.raises(ModelError, match=r"model\.safetensors ends"):
        load_weights(checkpoint, cut(4, (4,))[0], DType.FLOAT32, CPU, ignore)


def test_a_file_that_vanished_is_a_model_error_that_names_it(tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(tiny_checkpoint(tmp_path, shards=1))
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(ModelError, match=r"model\.safetensors cannot be read"):
        load_weights(checkpoint, cut(4, (4,))[0], DType.FLOAT32, CPU, ignore)


def test_a_shard_larger_than_memory_is_refused_before_it_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = Checkpoint.open(tiny_checkpoint(tmp_path, shards=1))
    engine = TorchEngine(EngineConfig(shard=cut(4, (4,))[0], dtype=DType.FLOAT32, num_threads=1))
    monkeypatch.setattr(engine, "free_bytes", lambda: 1000)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(EngineError, match="1000 left"):
        engine.load(checkpoint, ignore)


def test_biases_of_merged_linears_lie_where_their_rows_are(tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(tiny_checkpoint(tmp_path, overrides={"attention_bias": True}, layers=1))
    files = stored(tmp_path)
    layer = load_weights(checkpoint, cut(1, (1,))[0], DType.FLOAT32, CPU, ignore).layers[0]
    expected = torch.cat([files[f"model.layers.0.self_attn.{name}_proj.bias"] for name in "qkv"])
    with torch.inference_mode():
        assert torch.allclose(layer.qkv(torch.zeros(1, checkpoint.spec.hidden_size))[0], expected)


def test_weights_saved_by_safetensors_itself_load(tmp_path: Path) -> None:
    directory = tiny_checkpoint(tmp_path, shards=1, layers=2)
    before = stored(directory)
    save_file(before, directory / "model.safetensors", metadata={"format": "pt"})
    engine = TorchEngine(EngineConfig(shard=cut(2, (2,))[0], dtype=DType.FLOAT32, num_threads=1))
    engine.load(Checkpoint.open(directory), ignore)
    result = Stages([engine], num_blocks=2, block_size=8).run([chunk(1, 0, [1, 2], [0], targets=[2])])
    assert len(result.scored) == 1
