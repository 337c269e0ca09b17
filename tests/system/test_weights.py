"""Weights that move between machines, end to end: only those of the shard, from whoever has them, once, and right.

The head computes nothing, has no torch, and is the only one that finds the model's files: it is started where their
relative path leads to them.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest

from tests.models.test_hub import Hub
from tests.system.machines import Machine, can_be_elsewhere, machine
from tests.system.processes import START_S, Server, poll, tllm
from tests.system.random_models import expected, greedy, remember_speed
from tllm.core.config import split_address, state_directory
from tllm.core.units import format_bytes
from tllm.models.checkpoint import Checkpoint
from tllm.models.headers import TensorInfo
from tllm.models.spec import Shard
from tllm.testing.checkpoints import tiny_checkpoint
from tllm.transport import rpc

JOIN_LINE = r"tllm join (\S+)"
FETCHED = r"(\S+) layers \d+\.\.\d+ .* (\S+ \S+) over the network"
NAME = "weights"  # of the model's directory, seen from the one above it
LAYERS = 6

pytestmark = pytest.mark.skipif(not can_be_elsewhere(), reason="another machine needs unshare and the right to use it")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """15 MB, of which the ends are little."""
    return tiny_checkpoint(tmp_path_factory.mktemp("origin") / NAME, layers=LAYERS, hidden_size=256)


@pytest.fixture(scope="module")
def answer(model: Path) -> list[int]:
    return expected(model)


@contextmanager
def head(model: Path, *arguments: str, name: str = NAME, **environment: str) -> Iterator[Server]:
    """A head that computes nothing, in the directory above the model's; not waited for."""
    with tllm(
        *("serve", name, "--port", "0", "--grpc-port", "0", "--no-local", "--dtype", "float32", *arguments),
        kind=Server,
        before=("sh", "-c", 'cd "$0" && exec "$@"', str(model.parent)),
        PYTHONPATH=str(_without_torch(model.parent)),
        **environment,
    ) as server:
        yield server


def _without_torch(directory: Path) -> Path:
    """A path on which `import torch` fails as where it is not installed."""
    place = directory / "without-torch"
    place.mkdir(exist_ok=True)
    (place / "torch.py").write_text("raise ModuleNotFoundError(\"No module named 'torch'\", name='torch')\n")
    return place


def address(server: Server) -> tuple[str, int]:
    return split_address(server.wait_for(JOIN_LINE)[1], default_port=0)


@contextmanager
def node(name: str, number: int, server: Server, model: Path, *, head_s: float = 1e-3) -> Iterator[Machine]:
    """Not started yet. It offers the same memory whenever it is, so that only what a test changes changes the plan."""
    token = rpc.TokenStore(rpc.Authority.open(state_directory() / "cluster")).default()
    with machine(name, number, head=address(server), token=token) as found:
        found.arguments = (*found.arguments, "--memory", "2GB")
        remember_speed(Path(found.environment["XDG_STATE_HOME"]) / "tllm", model, head_s=head_s)
        yield found


def shard_of(server: Server, one: Machine) -> Shard:
    (found,) = [each for each in httpx.get(f"{server.url}/tllm/v1/cluster").json()["nodes"] if each["name"] == one.name]
    (stage,) = found["stages"]
    return Shard(**{key: stage[key] for key in ("first_layer", "last_layer", "embed", "head")})


def tensors_of(model: Path, shard: Shard) -> dict[str, TensorInfo]:
    """By the SHA-256 of their bytes."""
    checkpoint = Checkpoint.open(model)
    infos = [checkpoint.tensors[name] for name in checkpoint.needed(shard)]
    return {hashlib.sha256(bytes_of(info)).hexdigest(): info for info in infos}


def bytes_of(info: TensorInfo) -> bytes:
    return info.file.read_bytes()[info.offset : info.offset + info.num_bytes]


def size_of(model: Path, shard: Shard) -> int:
    return sum(info.num_bytes for info in tensors_of(model, shard).values())


def blobs(one: Machine) -> list[Path]:
    """What its store holds, whole or begun."""
    directory = Path(one.environment["XDG_STATE_HOME"]) / "tllm" / "shards" / "blobs"
    return list(directory.iterdir()) if directory.is_dir() else []


def stored_bytes(one: Machine) -> int:
    total = 0
    for blob in blobs(one):
        with suppress(FileNotFoundError):  # it is whole by now, and has another name
            total += blob.stat().st_size
    return total


def assert_holds_exactly(one: Machine, model: Path, shard: Shard) -> None:
    found = {blob.name: blob.read_bytes() for blob in blobs(one)}
    assert found == {sha256: bytes_of(info) for sha256, info in tensors_of(model, shard).items()}


def fetched(server: Server) -> dict[str, str]:
    """What each node was given over the network, as the head prints it, by the node's name."""
    return {found[1]: found[2] for line in server.lines if (found := re.search(FETCHED, line))}


def cache(one: Machine, *arguments: str) -> str:
    command = [sys.executable, "-m", "tllm", "cache", *arguments]
    return subprocess.run(
        command, env={**os.environ, **one.environment}, check=True, capture_output=True, text=True
    ).stdout


@dataclass(frozen=True, kw_only=True)
class Filled:
    """A head and two nodes that have just been given their shards."""

    server: Server
    last: Machine  # the second half of the layers, and the head
    first: Machine


@pytest.fixture(scope="module")
def filled(model: Path) -> Iterator[Filled]:
    """Which node is last is no chance: projecting to tokens takes the other one long."""
    with ExitStack() as stack:
        server = stack.enter_context(head(model, "--use-all", "--nodes", "2"))
        last = stack.enter_context(node("last", 1, server, model))
        first = stack.enter_context(node("first", 2, server, model, head_s=1.0))
        last.start()
        first.start()
        server.wait_for(r"API\s+http")
        yield Filled(server=server, last=last, first=first)


def test_a_node_without_the_files_is_given_its_shard_and_nothing_else(filled, model, answer):
    server = filled.server
    assert server.workers() == []
    printed = fetched(server)
    for one in (filled.first, filled.last):
        shard = shard_of(server, one)
        assert 0 < shard.last_layer - shard.first_layer < LAYERS
        assert_holds_exactly(one, model, shard)
        assert printed[one.name] == format_bytes(size_of(model, shard))
    assert shard_of(server, filled.last).head
    assert greedy(server) == answer


def test_what_a_machine_keeps_is_listed_and_is_no_garbage(filled, model):
    before = sorted(blobs(filled.last))
    (listed,) = json.loads(cache(filled.last, "ls", "--json"))["checkpoints"]
    checkpoint = Checkpoint.open(model)
    assert listed["model"] == NAME
    assert listed["fingerprint"] == checkpoint.fingerprint
    assert listed["held_bytes"] == stored_bytes(filled.last) < listed["total_bytes"]
    assert listed["total_bytes"] == sum(info.num_bytes for info in checkpoint.tensors.values())
    assert cache(filled.last, "gc").startswith("0 B freed by removing 0 files")
    assert sorted(blobs(filled.last)) == before


@contextmanager
def rotten(one: Machine) -> Iterator[None]:
    """Every blob of its store with one bit that is not what it was; what it serves with is in its memory."""
    kept = {blob: blob.read_bytes() for blob in blobs(one)}

    def put(blob: Path, data: bytes) -> None:
        new = blob.with_name("new")
        new.write_bytes(data)
        new.replace(blob)

    for blob, data in kept.items():
        put(blob, bytes([*data[:-1], data[-1] ^ 1]))
    try:
        yield
    finally:
        for blob, data in kept.items():
            put(blob, data)


def test_a_third_node_takes_from_an_honest_peer_and_not_from_one_whose_bytes_are_wrong(filled, model, answer):
    """Its slow link to the head puts it between the two others, so that it needs a layer of each."""
    server, honest, liar = filled.server, filled.first, filled.last
    given = honest.to_it[0].statistics().bytes_to_client
    with node("third", 3, server, model) as third, rotten(liar):
        third.to_head.shape(delay_s=0.05)
        third.start()
        third.joined()
        poll(lambda: takes_part(server, third), deadline_s=START_S, what="the third takes part")
        shard = shard_of(server, third)
        assert not shard.embed
        assert not shard.head
        assert_holds_exactly(third, model, shard)
        third.lives[-1].wait_for(
            r"fetching from (n-\w+): \1 sent other bytes of \S+ than their hash says", deadline_s=5
        )
        largest = max(info.num_bytes for info in tensors_of(model, shard).values())
        assert honest.to_it[0].statistics().bytes_to_client - given > largest
        assert greedy(server) == answer
        assert third.leave() == 0


def takes_part(server: Server, one: Machine) -> bool:
    status = httpx.get(f"{server.url}/tllm/v1/cluster").json()
    return status["state"] == "serving" and any(each["name"] == one.name and each["stages"] for each in status["nodes"])


def test_a_second_start_moves_no_weights(filled, model, answer):
    before = {blob: blob.stat().st_mtime_ns for one in (filled.first, filled.last) for blob in blobs(one)}
    assert filled.server.interrupt() == 0
    with head(model, "--use-all", "--nodes", "2") as server:
        for one in (filled.first, filled.last):
            assert one.leave() == 0
            one.to_head.target = address(server)
            one.start()
        server.wait_for(r"API\s+http")
        assert "layers 0..2" in server.output
        assert fetched(server) == {}
        after = {blob: blob.stat().st_mtime_ns for one in (filled.first, filled.last) for blob in blobs(one)}
        assert after == before
        assert greedy(server) == answer
    assert "freed" in cache(filled.first, "gc", "--all")
    assert blobs(filled.first) == []


RATE = 20e6  # bits/s: half of the model in three seconds
WHOLE = Shard(first_layer=0, last_layer=1, embed=True, head=True)
WASTE = 1 << 19  # of bytes that were on their way when connections were reset, and of what is not weights


@pytest.fixture(scope="module")
def bulky(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """14 MB, most of it in three tensors, which are all on their way at once."""
    place = tmp_path_factory.mktemp("bulky") / NAME
    return tiny_checkpoint(place, layers=1, hidden_size=256, intermediate_size=4096)


@contextmanager
def half_way(model: Path) -> Iterator[tuple[Server, Machine]]:
    """A node that is being given the whole model over a slow link, and has half of it."""
    total = size_of(model, WHOLE)
    with head(model) as server, node("slow", 1, server, model) as one:
        one.to_head.shape(rate_bits_per_s=RATE)
        one.start()
        poll(lambda: stored_bytes(one) > total // 2, deadline_s=START_S, what="half of the weights moved")
        assert stored_bytes(one) < 0.9 * total
        yield server, one


def test_a_transfer_whose_connections_are_reset_goes_on_where_it_was(bulky):
    total = size_of(bulky, WHOLE)
    with half_way(bulky) as (server, one):
        one.to_head.reset_connections()
        one.to_head.shape(rate_bits_per_s=math.inf)
        server.wait_for(r"API\s+http")
        assert_holds_exactly(one, bulky, WHOLE)
        assert one.to_head.statistics().bytes_to_client < total + WASTE
        assert greedy(server) == expected(bulky)


def test_a_transfer_whose_head_is_killed_goes_on_with_the_next_head(bulky):
    total = size_of(bulky, WHOLE)
    with half_way(bulky) as (killed, one):
        killed.process.kill()
        with head(bulky) as server:
            one.to_head.target = address(server)
            one.to_head.shape(rate_bits_per_s=math.inf)
            server.wait_for(r"API\s+http")
            assert_holds_exactly(one, bulky, WHOLE)
            assert one.to_head.statistics().bytes_to_client < total + WASTE
            assert greedy(server) == expected(bulky)


def test_nodes_take_only_their_ranges_of_a_hub_model(tmp_path, model, answer):
    """The head has all but the weights of it, and nobody has a file."""
    hub = Hub(model)
    settings = {"HF_ENDPOINT": hub.endpoint, "HF_TOKEN": "", "HF_HUB_CACHE": "", "NO_PROXY": "localhost,127.0.0.1"}
    settings |= {"TLLM_OFFLINE": "0", "HF_HUB_OFFLINE": "0", "HF_HOME": str(tmp_path / "cache")}
    with ExitStack() as stack:
        stack.callback(hub.close)
        server = stack.enter_context(head(model, "--use-all", "--nodes", "2", name="org/name", **settings))
        nodes = [stack.enter_context(node(f"n{number}", number, server, model)) for number in (1, 2)]
        looking = hub.weights_sent  # at headers, and at samples for the fingerprint
        for one in nodes:
            one.environment.update(settings)
            one.start()
        server.wait_for(r"API\s+http")
        printed = fetched(server)
        total = 0
        for one in nodes:
            shard = shard_of(server, one)
            assert_holds_exactly(one, model, shard)
            assert printed[one.name] == format_bytes(size_of(model, shard))
            total += size_of(model, shard)
        assert hub.weights_sent <= looking * (1 + len(nodes)) + total
        assert looking * len(nodes) < total // 2  # or the line above would say little
        assert greedy(server) == answer
