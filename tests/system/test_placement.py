"""Models over nodes of uneven memory, and over more nodes than layers: what is cut where, that nobody is asked for more
than it offers, and that the answers are those of one machine.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

import httpx
import pytest

from tests.system.processes import Server, tllm
from tests.system.random_models import expected, greedy, remember_speed
from tllm.cluster.placement import model_profile
from tllm.core.config import state_directory
from tllm.core.types import DType
from tllm.models.checkpoint import Checkpoint
from tllm.planner.problem import activation_bytes
from tllm.planner.profile import Load
from tllm.testing.checkpoints import tiny_checkpoint

JOIN_LINE = r"tllm join (\S+)"
ROWS, POSITIONS = 64, 64  # of a step, and of a context
SERVE = ("--port", "0", "--grpc-port", "0", "--dtype", "float32")
SIZES = ("--max-batch-tokens", str(ROWS), "--max-model-len", str(POSITIONS))


def memory_of(model: Path, num_layers: int) -> int:
    """What a node must offer to hold so many layers and both ends, with KV for one context; not enough for one more."""
    profile = model_profile(Checkpoint.open(model), DType.FLOAT32, None, "")
    layer_bytes = max(profile.layer_bytes) + POSITIONS * profile.kv_bytes_per_position
    ends_bytes = profile.embed_bytes + profile.head_bytes
    assert ends_bytes < layer_bytes
    return num_layers * layer_bytes + ends_bytes + activation_bytes(profile, Load(max_batch_tokens=ROWS))


@contextmanager
def cluster(model: Path, memories: Sequence[int]) -> Iterator[Server]:
    """A head that computes nothing, and a node for each of these."""
    remember_speed(state_directory(), model)
    arguments = (str(model), *SERVE, *SIZES, "--no-local", "--use-all", "--nodes", str(len(memories)))
    with ExitStack() as stack:
        server = stack.enter_context(tllm("serve", *arguments, kind=Server))
        address = server.wait_for(JOIN_LINE)[1]
        for number, memory in enumerate(memories):
            offers = ("--name", f"node-{number}", "--threads", "1", "--memory", f"{memory}B")
            stack.enter_context(tllm("join", address, *offers))
        server.wait_for(r"API\s+http")
        yield server


def layers_of(server: Server) -> dict[str, range]:
    """By node; asserts that every node keeps within what it offers, and that all layers are there once."""
    layers = {}
    for node in httpx.get(f"{server.url}/tllm/v1/cluster").json()["nodes"]:
        for stage in node["stages"]:
            assert node["name"] not in layers, "two stages on one worker"
            assert stage["weight_bytes"] + stage["kv_bytes"] <= node["memory_bytes"]
            assert stage["kv_bytes"] > 0
            layers[node["name"]] = range(stage["first_layer"], stage["last_layer"])
    in_order = sorted(layers.values(), key=lambda part: part.start)
    assert [layer for part in in_order for layer in part] == list(range(in_order[-1].stop))
    return layers


@pytest.mark.parametrize(
    ("num_layers", "room"),
    [(28, (16, 4, 9)), (32, (3, 12, 6, 2, 10))],
    ids=["28 layers, 3 nodes", "32 layers, 5 nodes"],
)
def test_uneven_nodes_each_hold_what_they_can_and_answer_as_one(tmp_path, num_layers, room):
    """Together they have room for one layer more than there are, so every node is nearly full."""
    model = tiny_checkpoint(tmp_path / "model", layers=num_layers)
    assert sum(room) == num_layers + 1
    with cluster(model, [memory_of(model, num) for num in room]) as server:
        layers = layers_of(server)
        assert set(layers) == {f"node-{number}" for number in range(len(room))}
        held = [len(layers[f"node-{number}"]) for number in range(len(room))]
        assert sum(held) == num_layers
        assert all(num <= most and most - num <= 1 for num, most in zip(held, room, strict=True)), held
        assert len(server.workers()) == 0, "a head with --no-local computes nothing"
        found = greedy(server)
    assert found == expected(model)


def test_more_nodes_than_layers_leave_one_out_and_say_so_in_a_line(tmp_path):
    model = tiny_checkpoint(tmp_path / "model", layers=2)
    with cluster(model, [memory_of(model, 1)] * 3) as server:
        used = layers_of(server)
        assert sorted(map(len, used.values())) == [1, 1]
        (unused,) = {"node-0", "node-1", "node-2"} - set(used)
        assert [line for line in server.lines if "not used" in line] == [
            server.wait_for(rf"^  not used: {unused}: \S.*")[0]
        ]
        nodes = httpx.get(f"{server.url}/tllm/v1/cluster").json()["nodes"]
        assert [node["name"] for node in nodes if node["reason"]] == [unused]
        found = greedy(server)
    assert found == expected(model)


def test_too_little_memory_everywhere_is_one_line_and_status_1(tmp_path):
    model = tiny_checkpoint(tmp_path / "model", layers=28)
    arguments = (str(model), *SERVE, *SIZES, "--memory", f"{memory_of(model, 20)}B")
    done = subprocess.run([sys.executable, "-m", "tllm", "serve", *arguments], capture_output=True, text=True)
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert "does not fit" in line
    assert "--max-model-len" in line
