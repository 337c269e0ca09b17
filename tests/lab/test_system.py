"""What a child is asked it answers, over and over, and what is watched of an engine leaves it as it was."""

from __future__ import annotations

from pathlib import Path

import pytest

from tllm.core.errors import EngineError
from tllm.core.types import DType
from tllm.lab.inside import REST, SAMPLING, step_bytes, weights_of
from tllm.lab.system import ChildSystem, Decode, Prefill, TllmSystem, read_files
from tllm.testing.checkpoints import tiny_checkpoint

REQUEST = Decode(batch=2, context=70, num_steps=3)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("model"), shards=1)


def system(model: Path) -> TllmSystem:
    return TllmSystem(model, DType.FLOAT32, None, 1)


def test_a_context_is_computed_once_and_decoded_again(model: Path):
    engine = system(model)
    engine.decode(REQUEST)
    num_tokens = engine._engine.statistics().num_tokens
    assert num_tokens == 2 * 70 + 2 * 3
    engine.decode(REQUEST)
    assert engine._engine.statistics().num_tokens == num_tokens + 2 * 3
    engine.prefill(Prefill(num_tokens=20))
    engine.decode(REQUEST)  # the prompt took the context's place
    assert engine._engine.statistics().num_tokens == 2 * num_tokens + 2 * 3 + 20


def test_a_profile_names_every_part_and_leaves_the_engine_as_it_was(model: Path):
    engine = system(model)
    weights, attention = engine._engine._weights, engine._engine._decoder._attention
    parts = engine.profile(REQUEST)
    assert [part.name for part in parts] == [
        *("embed", "qkv", "attention", "o", "gate·up", "down", "head"),
        *(SAMPLING, REST),
    ]
    assert all(part.seconds >= 0 for part in parts)
    linears = sum(part.num_bytes for part in parts if part.name != "attention")
    norms = 4 * (2 * 4 + 1) * 64  # two a layer and the last one, in fp32
    assert linears == step_bytes(engine._engine) - norms
    assert engine._engine._decoder._weights is weights
    assert engine._engine._decoder._attention is attention


def test_a_step_reads_all_but_an_embedding_of_its_own(tmp_path: Path, model: Path):
    untied, tied = system(model), system(tiny_checkpoint(tmp_path, tied=True, shards=1))
    embed = weights_of(untied._engine).embed
    assert embed is not None
    assert untied.step_bytes() == untied._engine.statistics().weight_bytes - embed.num_bytes
    assert tied.step_bytes() == tied._engine.statistics().weight_bytes


def test_a_child_answers_and_one_that_ended_is_named(model: Path):
    with ChildSystem("tllm", model, DType.FLOAT32, 1) as child:
        assert child.decode(REQUEST) > 0
        assert child.prefill(Prefill(num_tokens=20)) > 0
        assert child.load_again() > 0
        assert child.step_bytes() == system(model).step_bytes()
        assert child.profile(REQUEST)[0].name == "embed"
        with pytest.raises(EngineError, match="tllm ended with 1 while it was asked to dance"):
            child.ask("dance")


@pytest.mark.parametrize("keep", [True, False])
def test_files_are_read_to_their_ends(tmp_path: Path, keep: bool):
    paths = [tmp_path / "empty", tmp_path / "some"]
    for path, size in zip(paths, (0, 5_000_000), strict=True):
        path.write_bytes(bytes(size))
    assert read_files([str(path) for path in paths], keep=keep) > 0
