"""Measuring: exact on a machine whose costs are known, and bounded in time on a slow one."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tllm.cluster import measure
from tllm.cluster.measure import BUDGET_S, measure_speed
from tllm.core.errors import EngineError, ModelError
from tllm.core.types import Activation, DType, Step, StepResult
from tllm.engines.base import Engine, EngineConfig
from tllm.engines.torch.engine import TorchEngine
from tllm.models.checkpoint import Checkpoint
from tllm.models.config import Config
from tllm.models.families import find_family, read_spec
from tllm.models.spec import Shard
from tllm.models.synthetic import shortened, write_zeros
from tllm.planner.profile import Speed
from tllm.testing.checkpoints import tiny_checkpoint, tiny_config
from tllm.testing.fake_engine import FakeBehaviour, FakeEngine
from tllm.transport import wire_pb2 as pb

SMALL = tiny_config("llama", layers=6, vocab_size=500, max_positions=1024)
# Layers of 436 MB and a head of 1 GB: two of 32 layers and a quarter of the vocabulary are measured.
LARGE = tiny_config(
    "llama", layers=32, hidden_size=4096, intermediate_size=14336, heads=32, kv_heads=8, vocab_size=128256,
    max_positions=8192, tied=False,
)  # fmt: skip

ROWS = (1, 4, 16, 64, 256)


@pytest.fixture(autouse=True)
def few_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a clock of its own a machine is never done sooner than after the most turns."""
    monkeypatch.setattr(measure, "_MAX_TURNS", 9)


class Clock:
    def __init__(self) -> None:
        self.now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


class Machine:
    """Engines whose every forward takes as long as these costs say, on a clock of its own."""

    read_s = 0.0
    pair_s = 0.0

    def __init__(self, *, scale: float = 1.0, memory_bytes: int = 1 << 40, load_s: float = 0.0) -> None:
        self.clock = Clock()
        self.shards: list[Shard] = []
        self.disturbed_every = 1 << 60
        self._scale = scale
        self._load_s = load_s
        self._memory_bytes = memory_bytes
        self._num_forwards = 0

    def step_s(self, rows: int) -> float:
        return self._scale * (50e-6 + 2e-6 * rows)

    def layer_s(self, rows: int) -> float:
        return self._scale * (900e-6 + 30e-6 * rows)

    def attention_s(self, step: Step) -> float:
        """Of one layer: KV is read at one speed, and rows look at it at another."""
        return self._scale * sum(
            max(
                self.read_s * (chunk.start + len(chunk.tokens)),
                self.pair_s * sum(chunk.start + row + 1 for row in range(len(chunk.tokens))),
            )
            for chunk in step.chunks
        )

    def head_s(self, sampled: int, vocab_size: int) -> float:
        return self._scale * (20e-9 + 3e-9 * sampled) * vocab_size if sampled else 0.0

    def engine(self, name: str, config: EngineConfig) -> Engine:
        machine = self

        class Timed(FakeEngine):
            def load(self, checkpoint: Checkpoint, progress: Callable[[int, int], None]) -> None:
                self.checkpoint = checkpoint
                machine.shards.append(config.shard)
                super().load(checkpoint, progress)

            def reload(self, checkpoint: Checkpoint, shard: Shard, progress: Callable[[int, int], None]) -> None:
                machine.shards.append(shard)
                machine.clock.now_s += machine._load_s
                super().reload(checkpoint, shard, progress)

            def forward(self, step: Step, hidden: Activation | None) -> Activation | StepResult:
                shard = machine.shards[-1]
                seconds = machine.step_s(step.num_tokens) + len(shard.layers) * (
                    machine.layer_s(step.num_tokens) + machine.attention_s(step)
                )
                if shard.head:
                    num_sampled = sum(chunk.sampling is not None for chunk in step.chunks)
                    seconds += machine.head_s(num_sampled, self.checkpoint.spec.vocab_size)
                machine._num_forwards += 1
                machine.clock.now_s += seconds * (20 if machine._num_forwards % machine.disturbed_every == 0 else 1)
                return super().forward(step, hidden)

        return Timed(config, FakeBehaviour(memory_bytes=self._memory_bytes))


def order(config: object, dtype: str = "bfloat16") -> pb.Measure:
    return pb.Measure(config=json.dumps(config), dtype=dtype, device="cpu", num_threads=1, engine="torch", key="k")


def measured(machine: Machine, config: object, directory: Path) -> Speed:
    return measure_speed(order(config), machine.engine, directory, clock=machine.clock)


def assert_right(speed: Speed, machine: Machine, num_layers: int, vocab_size: int) -> None:
    """To the last digits, for costs that are linear and a clock that is exact."""
    assert speed.step_s == pytest.approx(machine.step_s(1))
    for rows, layer_s, head_s in zip(speed.rows, speed.layer_s, speed.head_s, strict=True):
        whole_s = machine.step_s(rows) + num_layers * machine.layer_s(rows)
        assert speed.step_s + num_layers * layer_s == pytest.approx(whole_s)
        assert head_s == pytest.approx(machine.head_s(rows, vocab_size))


@pytest.mark.parametrize(("config", "num_layers", "vocab_size"), [(SMALL, 6, 500), (LARGE, 32, 128256)])
def test_what_a_machine_takes_is_found_out(config: object, num_layers: int, vocab_size: int, tmp_path: Path) -> None:
    machine = Machine()
    speed = measured(machine, config, tmp_path)
    assert speed.rows == ROWS
    assert_right(speed, machine, num_layers, vocab_size)


def test_attention_is_told_from_the_rest_of_a_layer(tmp_path: Path) -> None:
    machine = Machine()
    machine.read_s, machine.pair_s = 40e-9, 2e-9
    speed = measured(machine, LARGE, tmp_path)
    assert speed.read_s == pytest.approx(machine.read_s, rel=0.01)
    assert speed.pair_s == pytest.approx(machine.pair_s, rel=0.1)
    for rows, layer_s in zip(speed.rows, speed.layer_s, strict=True):
        assert layer_s == pytest.approx(machine.layer_s(rows), rel=0.02)


def test_a_model_of_short_contexts_has_its_attention_in_its_layers(tmp_path: Path) -> None:
    machine = Machine()
    machine.read_s, machine.pair_s = 40e-9, 2e-9
    speed = measured(machine, SMALL | {"max_position_embeddings": 256}, tmp_path)
    assert (speed.read_s, speed.pair_s) == (0.0, 0.0)
    assert speed.layer_s[0] == pytest.approx(machine.layer_s(1) + 129 * machine.read_s, rel=0.01)


def test_disturbances_of_a_moment_do_not_count(tmp_path: Path) -> None:
    machine = Machine()
    machine.disturbed_every = 7  # no divisor of how many steps take turns
    assert_right(measured(machine, SMALL, tmp_path), machine, 6, 500)


def test_of_a_large_model_a_few_layers_and_tokens_are_loaded(tmp_path: Path) -> None:
    machine = Machine()
    measured(machine, LARGE, tmp_path)
    assert max(shard.last_layer for shard in machine.shards) == 2
    assert [shard.head for shard in machine.shards if shard.layers] == [False, True]
    machine = Machine()
    measured(machine, SMALL, tmp_path)
    assert {(shard.last_layer, shard.head) for shard in machine.shards if shard.layers} == {(6, False), (6, True)}


def test_a_machine_with_little_memory_is_measured_with_fewer_layers(tmp_path: Path) -> None:
    machine = Machine(memory_bytes=900 << 20)
    speed = measured(machine, LARGE, tmp_path)
    assert max(shard.last_layer for shard in machine.shards) == 1
    assert_right(speed, machine, 32, 128256)


@settings(max_examples=15, deadline=None)
@given(scale=st.floats(1e-2, 1e4), load_s=st.sampled_from([0.0, 1.0, 10.0]))
def test_however_slow_the_machine_time_is_bounded_and_what_is_said_is_right(
    scale: float, load_s: float, tmp_path_factory: pytest.TempPathFactory
) -> None:
    machine = Machine(scale=scale, load_s=load_s)
    began = machine.clock()
    speed = measured(machine, SMALL, tmp_path_factory.mktemp("measure"))
    assert speed.rows == ROWS[: len(speed.rows)]
    assert_right(speed, machine, 6, 500)
    # A slow machine computes every kind of step once: context and one row with each shard, all rows with no layer.
    once_s = sum(machine.step_s(rows) for rows in ROWS) + 4 * 6 * machine.layer_s(16) + 5 * machine.head_s(16, 500)
    assert machine.clock() - began <= BUDGET_S + 3 * load_s + 0.6 * BUDGET_S + 3 * once_s
    if scale <= 1 and not load_s:
        assert speed.rows == ROWS


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen3"])
def test_a_real_engine_is_timed_and_nothing_is_left(family: str, tmp_path: Path) -> None:
    config = tiny_config(family, layers=2, vocab_size=300, max_positions=100)  # fewer than a prompt has rows
    made: list[TorchEngine] = []

    def make(name: str, config: EngineConfig) -> Engine:
        assert name == "torch"
        made.append(TorchEngine(config))
        return made[-1]

    speed = measure_speed(order(config), make, tmp_path / "new")
    assert speed.rows == ROWS
    assert len(speed.layer_s) == len(speed.head_s) == len(speed.rows)
    assert all(0 < seconds < 1 for seconds in (*speed.layer_s, speed.step_s))
    assert list((tmp_path / "new").iterdir()) == []
    assert [engine.statistics().weight_bytes for engine in made] == [0]


def test_what_is_no_model_is_refused(tmp_path: Path) -> None:
    machine = Machine()
    for wrong in (
        order([]),
        order({"model_type": "dog"}),
        order(SMALL, dtype="int4"),
        pb.Measure(config="{", dtype=""),
    ):
        with pytest.raises(ModelError):
            measure_speed(wrong, machine.engine, tmp_path)
    assert machine.shards == []


def test_an_engine_that_fails_is_closed_and_its_error_seen(tmp_path: Path) -> None:
    closed: list[bool] = []

    class Broken(FakeEngine):
        def load(self, checkpoint: Checkpoint, progress: Callable[[int, int], None]) -> None:
            raise EngineError("no memory")

        def close(self) -> None:
            closed.append(True)

    with pytest.raises(EngineError, match="no memory"):
        measure_speed(order(SMALL), lambda name, config: Broken(config), tmp_path)
    assert closed == [True]
    assert list(tmp_path.iterdir()) == []


# Checkpoints of zeros -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3", "gpt2"])
def test_a_checkpoint_of_zeros_is_one_of_the_family_in_name_and_shape(family: str, tied: bool, tmp_path: Path) -> None:
    overrides = {"attention_bias": True} if family in ("llama", "qwen3") else {}
    real = tiny_checkpoint(tmp_path / "real", family, layers=3, tied=tied, overrides=overrides, tokenizer=False)
    expected = Checkpoint.open(real)
    zeros = tmp_path / "zeros"
    zeros.mkdir()
    config = Config.read(real / "config.json")
    write_zeros(zeros, config, DType.FLOAT16)
    found = Checkpoint.open(zeros)
    assert found.spec == expected.spec
    assert {name: info.shape for name, info in found.tensors.items()} == {
        name: info.shape for name, info in expected.tensors.items()
    }
    assert found.dtype is DType.FLOAT16
    shorter = read_spec(shortened(config, 2, 50), find_family(config))
    assert shorter == replace(expected.spec, num_layers=2, vocab_size=50, windows=expected.spec.windows[:2])


def test_a_checkpoint_of_zeros_takes_no_disk(tmp_path: Path) -> None:
    write_zeros(tmp_path, Config(path="config", fields=LARGE), DType.BFLOAT16)
    status = (tmp_path / "model.safetensors").stat()
    assert status.st_size > 16e9
    assert status.st_blocks * 512 < 1 << 20


def test_layers_of_several_kinds_are_shortened_with_the_rest() -> None:
    types = ["full_attention", "sliding_attention"] * 2
    fields = dict(tiny_config("qwen3", layers=4)) | {"layer_types": types, "sliding_window": 8}
    fields["use_sliding_window"] = True
    config = shortened(Config(path="config", fields=fields), 3, 100)
    assert read_spec(config, find_family(config)).windows == (None, 8, None)
