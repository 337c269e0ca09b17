"""A worker's memory: its shard, the interpreter with torch, and little else; its reads: its shard and nothing else."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tllm.engines.torch import memory
from tllm.testing.checkpoints import checkpoint_tensors, tiny_config, uneven_parts, write_config

MEGABYTE = 10**6

CHILD = """
import json, sys
from pathlib import Path
from tllm.core.types import Activation, DType, Epoch, Step, StepId
from tllm.engines.base import EngineConfig
from tllm.engines.torch.engine import TorchEngine
from tllm.models.checkpoint import Checkpoint
from tllm.models.spec import Shard
from tllm.testing.stages import GREEDY, chunk

def bytes_read():
    return int(dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())["rchar"])

directory, first, last, dtype = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), DType(sys.argv[4])
checkpoint = Checkpoint.open(directory)
head = last == checkpoint.spec.num_layers
shard = Shard(first_layer=first, last_layer=last, embed=first == 0, head=head)
engine = TorchEngine(EngineConfig(shard=shard, dtype=dtype, num_threads=1))
before = bytes_read()
engine.load(checkpoint, lambda done, total: None)
read = bytes_read() - before
engine.allocate(8, 16)
step = Step(id=StepId(0), epoch=Epoch(1), chunks=(chunk(1, 0, range(40), range(3), sample=GREEDY),))
width = checkpoint.spec.hidden_size
data = bytes(40 * width * dtype.num_bytes)
engine.forward(step, None if shard.embed else Activation(data=data, dtype=dtype, shape=(40, width)))
status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
print(json.dumps({
    "peak": int(status["VmHWM"].split()[0]) * 1024,
    "read": read,
    "shard": checkpoint.weight_bytes(shard, dtype),
    "weights": engine.statistics().weight_bytes,
}))
"""


RELOADING_CHILD = """
import json, sys
from pathlib import Path
from tllm.core.types import DType
from tllm.engines.base import EngineConfig
from tllm.engines.torch.engine import TorchEngine
from tllm.models.checkpoint import Checkpoint
from tllm.models.spec import Shard

def bytes_read():
    return int(dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())["rchar"])

def status(name):
    return int(dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())[name].split()[0])

checkpoint = Checkpoint.open(Path(sys.argv[1]))
engine = None
moments = []
for first, last in json.loads(sys.argv[2]):
    shard = Shard(first_layer=first, last_layer=last, embed=first == 0, head=last == checkpoint.spec.num_layers)
    before = bytes_read()
    if engine is None:
        engine = TorchEngine(EngineConfig(shard=shard, dtype=DType.BFLOAT16, num_threads=1))
        engine.load(checkpoint, lambda done, total: None)
        read = 0
    else:
        read = -engine.statistics().read_bytes
        engine.reload(checkpoint, shard, lambda done, total: None)
    read += engine.statistics().read_bytes
    moments.append({
        "shard": checkpoint.weight_bytes(shard, DType.BFLOAT16),
        "weights": engine.statistics().weight_bytes,
        "told": read,
        "read": bytes_read() - before,
        "resident": status("VmRSS") * 1024,
        "peak": status("VmHWM") * 1024,
    })
print(json.dumps(moments))
"""


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """570 MB of zeros in the shape of a small model; sparse on disk."""
    directory = tmp_path_factory.mktemp("large")
    config = tiny_config(
        "llama", layers=14, hidden_size=1024, intermediate_size=4096, heads=16, kv_heads=4, vocab_size=32000
    )
    write_config(directory, config | {"dtype": "bfloat16"})
    weight_map = {}
    for number, part in enumerate(uneven_parts(list(checkpoint_tensors(config)), 3)):
        header: dict[str, object] = {}
        offset = 0
        for tensor in part:
            stop = offset + 2 * tensor.num_elements
            header[tensor.name] = {"dtype": "BF16", "shape": list(tensor.shape), "data_offsets": [offset, stop]}
            offset = stop
            weight_map[tensor.name] = f"model-{number}.safetensors"
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        with (directory / f"model-{number}.safetensors").open("wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            file.truncate(8 + len(text) + offset)
    index = {"metadata": {}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    return directory


@pytest.mark.skipif(sys.platform != "linux", reason="peak memory is read from /proc")
@pytest.mark.parametrize(
    ("first", "last", "dtype", "stored_bytes_per_byte"),
    [(0, 8, "bfloat16", 1.0), (8, 14, "bfloat16", 1.0), (8, 14, "float32", 0.5)],
    ids=["first stage", "last stage", "last stage, widened to fp32"],
)
def test_a_stage_takes_its_shard_and_reads_its_shard(
    checkpoint: Path, first: int, last: int, dtype: str, stored_bytes_per_byte: float
) -> None:
    command = [sys.executable, "-c", CHILD, str(checkpoint), str(first), str(last), dtype]
    result = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
    measured = json.loads(result.stdout)
    assert measured["weights"] == measured["shard"] > 200 * MEGABYTE
    assert measured["read"] == pytest.approx(measured["shard"] * stored_bytes_per_byte, rel=0.01, abs=MEGABYTE)
    assert measured["peak"] <= 1.15 * measured["shard"] + 300 * MEGABYTE, measured


@pytest.mark.skipif(sys.platform != "linux", reason="memory and reads are those of /proc")
def test_a_reloaded_stage_has_given_back_what_it_dropped_and_reads_what_it_lacks(checkpoint: Path) -> None:
    path = [(0, 8), (2, 4), (2, 8), (8, 14)]
    command = [sys.executable, "-c", RELOADING_CHILD, str(checkpoint), json.dumps(path)]
    result = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
    moments = json.loads(result.stdout)
    for moment in moments:
        assert moment["weights"] == moment["shard"]
        assert moment["read"] == pytest.approx(moment["told"], rel=0.01, abs=MEGABYTE)
        assert moment["resident"] <= 1.05 * moment["shard"] + 300 * MEGABYTE, moments
    largest = max(moment["shard"] for moment in moments)
    assert moments[-1]["peak"] <= 1.15 * largest + 300 * MEGABYTE, moments
    layer = moments[1]["shard"] // 2
    assert [moment["told"] for moment in moments] == [moments[0]["shard"], 0, 4 * layer, moments[3]["shard"]]
    assert moments[1]["resident"] < moments[0]["resident"] - 0.9 * (moments[0]["shard"] - moments[1]["shard"])


def test_free_memory_of_the_machine_is_known() -> None:
    assert 0 < memory.free_bytes(torch.device("cpu")) < 1 << 50


def test_a_control_group_with_a_limit_has_what_it_does_not_use(tmp_path: Path) -> None:
    (tmp_path / "memory.max").write_text("1000\n")
    (tmp_path / "memory.current").write_text("700\n")
    (tmp_path / "memory.stat").write_text("anon 500\ninactive_file 150\n")
    assert memory.cgroup_free_bytes(tmp_path) == 450
    (tmp_path / "memory.max").write_text("max\n")
    assert memory.cgroup_free_bytes(tmp_path) > 1 << 50
    assert memory.cgroup_free_bytes(tmp_path / "none") > 1 << 50
