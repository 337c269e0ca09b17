"""Measured speeds are found again where they hold, and nothing else is taken for one."""

from __future__ import annotations

import math
import stat
from collections.abc import Mapping
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tllm.cluster import speeds
from tllm.cluster.speeds import SpeedCache, from_message, speed_key, to_message
from tllm.core.errors import FrameError, ModelError
from tllm.core.types import DType
from tllm.planner.profile import Speed
from tllm.testing.checkpoints import tiny_config
from tllm.transport import wire_pb2 as pb

SMALL = tiny_config("llama", layers=6, vocab_size=500, max_positions=1024)
# Layers of 436 MB and a head of 1 GB: two of 32 layers and a quarter of the vocabulary are measured.
LARGE = tiny_config(
    "llama", layers=32, hidden_size=4096, intermediate_size=14336, heads=32, kv_heads=8, vocab_size=128256,
    max_positions=8192, tied=False,
)  # fmt: skip


SPEED = Speed(rows=(1, 4), layer_s=(0.25, 0.5), head_s=(1e-3, 0.0), step_s=1e-5)


def key(config: Mapping[str, object] = SMALL, **changes: object) -> str:
    arguments = {
        "dtype": DType.BFLOAT16,
        "quantization": None,
        "device": "cpu",
        "num_threads": 2,
        "engine": "torch",
    } | changes
    return speed_key(config, **arguments)  # type: ignore[arg-type]


def test_models_of_one_shape_share_a_key_and_others_do_not() -> None:
    trained = dict(SMALL) | {"max_position_embeddings": 99, "eos_token_id": 5, "rms_norm_eps": 1e-3, "_name": "x"}
    assert key(trained) == key()
    shapes = (("num_hidden_layers", 7), ("intermediate_size", 99), ("num_key_value_heads", 1), ("vocab_size", 501))
    others = [key(dict(SMALL) | {name: value}) for name, value in shapes]
    others += [key(dtype=DType.FLOAT16), key(device="cuda"), key(num_threads=1), key(engine="other")]
    assert len({key(), *others}) == 9
    with pytest.raises(ModelError):
        key({"model_type": "dog"})


def test_a_speed_is_found_again_by_its_key_alone(tmp_path: Path) -> None:
    cache = SpeedCache(tmp_path / "speeds")
    assert cache.get("a") is None
    cache.put("a", to_message(SPEED))
    assert SpeedCache(tmp_path / "speeds").get("a") == to_message(SPEED)
    assert cache.get("b") is None
    (file,) = (tmp_path / "speeds").iterdir()
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert stat.S_IMODE(file.parent.stat().st_mode) == 0o700


def test_a_key_from_elsewhere_is_no_path(tmp_path: Path) -> None:
    cache = SpeedCache(tmp_path / "speeds")
    for hostile in ("../../x", "/etc/passwd", "a" * 5000, "\0", ""):
        cache.put(hostile, to_message(SPEED))
        assert cache.get(hostile) == to_message(SPEED)
    assert [path.name for path in tmp_path.iterdir()] == ["speeds"]


@pytest.mark.parametrize(
    "garbage",
    [b"", b"{", b"[]", b"{}", b"\xff", b'{"rows":[1],"layer_s":[1],"head_s":[1],"step_s":NaN}', b"[" * 100_000],
)
def test_a_damaged_file_is_no_speed(garbage: bytes, tmp_path: Path) -> None:
    cache = SpeedCache(tmp_path)
    cache.put("a", to_message(SPEED))
    (file,) = tmp_path.iterdir()
    file.write_bytes(garbage)
    assert cache.get("a") is None
    cache.put("a", to_message(SPEED))
    assert cache.get("a") == to_message(SPEED)


def test_another_processor_or_framework_has_other_speeds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    SpeedCache(tmp_path).put("a", to_message(SPEED))
    for name in ("processor_name", "_framework_version"):
        with monkeypatch.context() as patch:
            patch.setattr(speeds, name, lambda: "another")
            assert SpeedCache(tmp_path).get("a") is None
    assert SpeedCache(tmp_path).get("a") is not None


def test_a_cache_that_cannot_be_written_is_only_logged(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "file").write_text("")
    cache = SpeedCache(tmp_path / "file" / "speeds")
    cache.put("a", to_message(SPEED))
    assert "could not be kept" in caplog.text
    assert cache.get("a") is None


seconds = st.floats(0, 1e6)


@given(
    rows=st.sets(st.integers(2, 1 << 20), max_size=6).map(lambda more: (1, *sorted(more))),
    data=st.data(),
    step_s=seconds,
)
def test_a_speed_crosses_as_it_is(rows: tuple[int, ...], data: st.DataObject, step_s: float) -> None:
    each = st.lists(seconds, min_size=len(rows), max_size=len(rows)).map(tuple)
    speed = Speed(rows=rows, layer_s=data.draw(each), head_s=data.draw(each), step_s=step_s)
    assert from_message(pb.Speed.FromString(to_message(speed).SerializeToString())) == speed


@pytest.mark.parametrize(
    "wrong",
    [
        pb.Speed(),
        pb.Speed(rows=[2], layer_s=[1], head_s=[1]),
        pb.Speed(rows=[1, 4, 4], layer_s=[1, 1, 1], head_s=[1, 1, 1]),
        pb.Speed(rows=[1, 4], layer_s=[1], head_s=[1, 1]),
        pb.Speed(rows=[1], layer_s=[1], head_s=[]),
        pb.Speed(rows=[1], layer_s=[-1], head_s=[1]),
        pb.Speed(rows=[1], layer_s=[math.nan], head_s=[1]),
        pb.Speed(rows=[1], layer_s=[1], head_s=[1], step_s=math.inf),
    ],
)
def test_a_speed_that_contradicts_itself_is_refused(wrong: pb.Speed, tmp_path: Path) -> None:
    with pytest.raises(FrameError):
        from_message(wrong)
    with pytest.raises(FrameError):
        SpeedCache(tmp_path).put("a", wrong)
