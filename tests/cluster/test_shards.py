"""The shard store over real servers: what is fetched, from whom, how often, and what is left when things go wrong."""

from __future__ import annotations

import asyncio
import errno
import hashlib
import json
import os
import shutil
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tllm.cluster import shards as shards_module
from tllm.cluster.shard_fetch import Job, JobQueue
from tllm.cluster.shard_files import StoreFiles
from tllm.cluster.shards import ShardStore
from tllm.core.errors import EngineError, FrameError, ModelError, TransportError
from tllm.core.types import DType
from tllm.models.checkpoint import Checkpoint
from tllm.models.repository import resolve_model
from tllm.models.spec import Shard
from tllm.testing.checkpoints import tiny_checkpoint
from tllm.transport import wire_pb2 as pb
from tllm.transport.server import Server
from tllm.transport.shards import Extent, ShardService

DAY_S = 24 * 3600.0


def ignore(done_bytes: int, total_bytes: int) -> None:
    pass


class Machine:
    """A store, and the server by which others reach it."""

    def __init__(self, directory: Path) -> None:
        self.store = ShardStore(directory / "store")
        self.reads: Counter[str] = Counter()
        self._socket = f"unix:{directory}/s"
        self._server = Server([ShardService(self)], identity=None)

    @property
    def source(self) -> pb.Source:
        return pb.Source(name=Path(self._socket).parent.name, addresses=[self._socket])

    async def start(self) -> None:
        await self._server.start([self._socket])

    async def aclose(self) -> None:
        await self._server.aclose()

    # The provider, counted.
    async def manifest(self, fingerprint: str) -> pb.Manifest | None:
        return await self.store.manifest(fingerprint)

    async def hashes(self, fingerprint: str, names: Sequence[str]) -> Sequence[str]:
        return await self.store.hashes(fingerprint, names)

    async def locate(self, fingerprint: str, name: str) -> Extent | None:
        self.reads[name] += 1
        return await self.store.locate(fingerprint, name)


class Cluster:
    """Machines made by name, closed at the end."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._machines: list[Machine] = []

    async def machine(self, name: str, checkpoint: Checkpoint | None = None) -> Machine:
        (self._directory / name).mkdir()
        machine = Machine(self._directory / name)
        if checkpoint is not None:
            machine.store.offer(checkpoint)
        await machine.start()
        self._machines.append(machine)
        return machine

    async def aclose(self) -> None:
        for machine in self._machines:
            await machine.aclose()


class Proxy:
    """A Unix socket before another, which cuts the connection once after so many bytes of answers."""

    def __init__(self, path: Path, target: pb.Source, *, cut_after: int) -> None:
        self.source = pb.Source(name="proxy", addresses=[f"unix:{path}"])
        self.num_bytes = 0
        self.num_cuts = 0
        self._path = path
        self._target = target.addresses[0].removeprefix("unix:")
        self._cut_after = cut_after

    async def __aenter__(self) -> Proxy:
        self._server = await asyncio.start_unix_server(self._serve, self._path)
        return self

    async def __aexit__(self, *exc: object) -> None:
        self._server.close()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        there, out = await asyncio.open_unix_connection(self._target)
        up = asyncio.create_task(self._pass(reader, out))
        try:
            while data := await there.read(65536):
                self.num_bytes += len(data)
                if not self.num_cuts and self.num_bytes > self._cut_after:
                    self.num_cuts += 1
                    writer.transport.abort()
                    return
                writer.write(data)
                await writer.drain()
        except ConnectionError:
            pass
        finally:
            up.cancel()
            out.close()
            writer.close()

    async def _pass(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(65536):
            writer.write(data)
            await writer.drain()


@pytest.fixture
async def cluster(tmp_path: Path) -> AsyncIterator[Cluster]:
    cluster = Cluster(tmp_path)
    yield cluster
    await cluster.aclose()


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return tiny_checkpoint(tmp_path / "model", layers=4, tokenizer=False)


@pytest.fixture
def checkpoint(model: Path) -> Checkpoint:
    return Checkpoint.open(model)


def load_of(checkpoint: Checkpoint, *sources: pb.Source, layers: tuple[int, int] = (0, 2), model: str = "m") -> pb.Load:
    return pb.Load(
        model=model,
        fingerprint=checkpoint.fingerprint,
        first_layer=layers[0],
        last_layer=layers[1],
        embed=layers[0] == 0,
        head=layers[1] == checkpoint.spec.num_layers,
        dtype="float32",
        sources=sources,
    )


def shard_of(load: pb.Load) -> Shard:
    return Shard(first_layer=load.first_layer, last_layer=load.last_layer, embed=load.embed, head=load.head)


def needed_bytes(checkpoint: Checkpoint, load: pb.Load) -> int:
    """Equal tensors, such as a fresh model's norms, cross once."""
    contents = {content(checkpoint, name) for name in checkpoint.needed(shard_of(load))}
    return sum(map(len, contents))


def content(checkpoint: Checkpoint, name: str) -> bytes:
    info = checkpoint.tensors[name]
    return info.file.read_bytes()[info.offset : info.offset + info.num_bytes]


def assert_same_weights(path: str, checkpoint: Checkpoint, load: pb.Load) -> None:
    """Every slice of the shard has the bytes of the original."""
    opened = Checkpoint.open(Path(path))
    assert opened.fingerprint == checkpoint.fingerprint
    assert opened.spec == checkpoint.spec
    for name in checkpoint.needed(shard_of(load)):
        assert content(opened, name) == content(checkpoint, name), name


async def test_a_shard_is_fetched_from_the_head_and_a_second_time_moves_nothing(
    cluster: Cluster, checkpoint: Checkpoint
) -> None:
    head, node = await cluster.machine("head", checkpoint), await cluster.machine("node")
    load = load_of(checkpoint, head.source)
    seen: list[tuple[int, int]] = []
    path, fetched = await node.store.provide(load, None, lambda done, total: seen.append((done, total)))
    assert fetched == needed_bytes(checkpoint, load)
    assert_same_weights(path, checkpoint, load)
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)
    assert seen[-1][0] == seen[-1][1] == sum(len(content(checkpoint, n)) for n in checkpoint.needed(shard_of(load)))
    head.reads.clear()
    assert await node.store.provide(load, None, ignore) == (path, 0)
    assert not head.reads
    # Nor does it need the head any more.
    assert await node.store.provide(load_of(checkpoint), None, ignore) == (path, 0)


async def test_another_shard_fetches_only_what_is_not_there(cluster: Cluster, checkpoint: Checkpoint) -> None:
    head, node = await cluster.machine("head", checkpoint), await cluster.machine("node")
    _, first = await node.store.provide(load_of(checkpoint, head.source, layers=(0, 3)), None, ignore)
    both = load_of(checkpoint, head.source, layers=(0, 4))
    path, second = await node.store.provide(both, None, ignore)
    assert first + second == needed_bytes(checkpoint, both)
    assert_same_weights(path, checkpoint, both)


@pytest.mark.parametrize("name", ["directory", "embedded"])
async def test_local_files_of_the_same_fingerprint_are_used_as_they_are(
    name: str, tmp_path: Path, checkpoint: Checkpoint
) -> None:
    if name == "directory":
        name = str(checkpoint.directory)
    else:
        checkpoint = Checkpoint.open(resolve_model("embedded"))
    store = ShardStore(tmp_path / "store")
    path, fetched = await store.provide(load_of(checkpoint, model=name), None, ignore)
    assert (Path(path), fetched) == (checkpoint.directory, 0)
    assert not (tmp_path / "store").exists()
    # and are given to others from then on
    assert await store.locate(checkpoint.fingerprint, next(iter(checkpoint.tensors))) is not None


async def test_local_files_of_another_fingerprint_are_left_alone(
    cluster: Cluster, checkpoint: Checkpoint, tmp_path: Path
) -> None:
    other = tiny_checkpoint(tmp_path / "other", seed=1, tokenizer=False)
    head, node = await cluster.machine("head", checkpoint), await cluster.machine("node")
    load = load_of(checkpoint, head.source, model=str(other))
    path, fetched = await node.store.provide(load, None, ignore)
    assert fetched == needed_bytes(checkpoint, load)
    assert_same_weights(path, checkpoint, load)


@pytest.mark.parametrize(
    "name", ["../../etc", "/etc/passwd", "/dev/zero", "~", ".", "", "\0", "a" * 5000, "/proc/1/fd"]
)
async def test_a_name_from_the_head_that_is_no_model_opens_nothing(
    name: str, cluster: Cluster, checkpoint: Checkpoint
) -> None:
    head, node = await cluster.machine("head", checkpoint), await cluster.machine("node")
    load = load_of(checkpoint, head.source, layers=(3, 4), model=name)
    path, _ = await node.store.provide(load, None, ignore)
    assert_same_weights(path, checkpoint, load)


@pytest.mark.parametrize("fingerprint", ["", "../x", "AB" * 32, "ab" * 31, "ab" * 32 + "/"])
async def test_what_is_no_fingerprint_becomes_no_name(fingerprint: str, tmp_path: Path) -> None:
    store = ShardStore(tmp_path / "store")
    with pytest.raises(FrameError):
        await store.provide(pb.Load(model="m", fingerprint=fingerprint), None, ignore)
    assert await store.manifest(fingerprint) is None
    assert await store.locate(fingerprint, "a") is None
    assert await store.hashes(fingerprint, ["a"]) == [""]


async def test_two_sources_are_both_used(cluster: Cluster, tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(tiny_checkpoint(tmp_path / "m", layers=24, tokenizer=False))
    head = await cluster.machine("head", checkpoint)
    peer = await cluster.machine("peer")
    whole = load_of(checkpoint, head.source, layers=(0, 24))
    await peer.store.provide(whole, None, ignore)
    head.reads.clear()
    node = await cluster.machine("node")
    load = load_of(checkpoint, head.source, peer.source, layers=(0, 24))
    path, fetched = await node.store.provide(load, None, ignore)
    assert fetched == needed_bytes(checkpoint, load)
    assert head.reads
    assert peer.reads
    assert max((head.reads + peer.reads).values()) == 1
    assert_same_weights(path, checkpoint, load)


async def test_a_peer_that_has_a_part_gives_that_part(cluster: Cluster, checkpoint: Checkpoint) -> None:
    """The head only says the hashes here: its own files are behind a provider that gives nothing away."""
    head, peer = await cluster.machine("head", checkpoint), await cluster.machine("peer")
    await peer.store.provide(load_of(checkpoint, head.source, layers=(0, 2)), None, ignore)

    async def nothing(fingerprint: str, name: str) -> Extent | None:
        return None

    head.locate = nothing  # type: ignore[method-assign]
    node = await cluster.machine("node")
    part = load_of(checkpoint, head.source, peer.source, layers=(1, 2))
    path, _ = await node.store.provide(part, None, ignore)
    assert_same_weights(path, checkpoint, part)
    with pytest.raises(
        TransportError, match=r"No source is left for \d+ of the \d+ tensors that this shard of m needs"
    ):
        await node.store.provide(load_of(checkpoint, head.source, peer.source, layers=(1, 3)), None, ignore)


async def test_a_peer_that_is_gone_does_not_matter(
    cluster: Cluster, checkpoint: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shards_module, "_CONNECT_S", 0.3)
    head, node = await cluster.machine("head", checkpoint), await cluster.machine("node")
    gone = pb.Source(name="gone", addresses=[f"unix:{tmp_path}/nobody"])
    load = load_of(checkpoint, head.source, gone)
    path, _ = await node.store.provide(load, None, ignore)
    assert_same_weights(path, checkpoint, load)


async def test_without_any_source_the_error_says_so(
    cluster: Cluster, checkpoint: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shards_module, "_CONNECT_S", 0.3)
    node = await cluster.machine("node")
    with pytest.raises(TransportError, match="nobody could describe it: the head named no source"):
        await node.store.provide(load_of(checkpoint), None, ignore)
    gone = pb.Source(name="gone", addresses=[f"unix:{tmp_path}/nobody"])
    with pytest.raises(TransportError, match=r"nobody could describe it \(gone: gone did not answer at"):
        await node.store.provide(load_of(checkpoint, gone), None, ignore)


async def test_a_source_with_wrong_bytes_is_dropped_and_its_tensors_come_from_another(
    cluster: Cluster, checkpoint: Checkpoint, tmp_path: Path
) -> None:
    head, node = await cluster.machine("head", checkpoint), await cluster.machine("node")
    bad_files = shutil.copytree(checkpoint.directory, tmp_path / "bad")
    for file in bad_files.glob("*.safetensors"):
        data = bytearray(file.read_bytes())
        start = 8 + int.from_bytes(data[:8], "little")
        data[start:] = bytes(byte ^ 1 for byte in data[start:])
        file.write_bytes(data)
    bad = await cluster.machine("bad-peer", replace(Checkpoint.open(bad_files), fingerprint=checkpoint.fingerprint))
    load = load_of(checkpoint, head.source, bad.source)
    path, _ = await node.store.provide(load, None, ignore)
    assert_same_weights(path, checkpoint, load)
    assert sum(bad.reads.values()) <= 4  # its streams at the time
    files = node.store.files
    for blob in (files.directory / "blobs").iterdir():
        assert hashlib.sha256(blob.read_bytes()).hexdigest() == blob.name


async def test_a_cut_connection_goes_on_where_it_was(cluster: Cluster, tmp_path: Path) -> None:
    """One tensor of 16 MB makes up most of the shard, and crosses once although the connection was cut amid it."""
    big = tiny_checkpoint(tmp_path / "big", layers=1, vocab_size=60_000, hidden_size=64, shards=1, tokenizer=False)
    checkpoint = Checkpoint.open(big)
    head, node = await cluster.machine("head", checkpoint), await cluster.machine("node")
    load = load_of(checkpoint, head.source, layers=(0, 1))
    size = needed_bytes(checkpoint, load)
    async with Proxy(tmp_path / "p", head.source, cut_after=size // 2) as proxy:
        del load.sources[:]
        load.sources.append(proxy.source)
        path, fetched = await node.store.provide(load, None, ignore)
        assert proxy.num_cuts == 1
    assert_same_weights(path, checkpoint, load)
    # What was on its way is lost: at most a window for each stream, and what the proxy held.
    assert size <= fetched < size + (4 << 20)
    assert max(head.reads.values()) == 2


async def test_a_fetch_that_was_ended_goes_on_at_the_next(cluster: Cluster, tmp_path: Path) -> None:
    big = tiny_checkpoint(tmp_path / "big", layers=1, vocab_size=60_000, hidden_size=64, shards=1, tokenizer=False)
    checkpoint = Checkpoint.open(big)
    head, node = await cluster.machine("head", checkpoint), await cluster.machine("node")
    load = load_of(checkpoint, head.source, layers=(0, 1))
    size = needed_bytes(checkpoint, load)
    reached = asyncio.Event()
    providing = asyncio.create_task(
        node.store.provide(load, None, lambda done, total: reached.set() if done > size // 2 else None)
    )
    await reached.wait()
    providing.cancel()
    with pytest.raises(asyncio.CancelledError):
        await providing
    blobs = node.store.files.directory / "blobs"
    kept = sum(path.stat().st_size for path in blobs.iterdir())
    assert kept > size // 4
    path, fetched = await node.store.provide(load, None, ignore)
    assert fetched == size - kept
    assert_same_weights(path, checkpoint, load)
    assert not list(blobs.glob("*.part"))


async def test_what_was_kept_of_a_tensor_is_not_believed(cluster: Cluster, checkpoint: Checkpoint) -> None:
    head, node = await cluster.machine("head", checkpoint), await cluster.machine("node")
    load = load_of(checkpoint, head.source)
    files = node.store.files
    files.prepare()
    for number, name in enumerate(checkpoint.needed(shard_of(load))):
        data = content(checkpoint, name)
        part = files.part(hashlib.sha256(data).hexdigest())
        part.write_bytes(os.urandom((0, len(data) // 2, len(data), len(data) + 1)[number % 4]))
    path, fetched = await node.store.provide(load, None, ignore)
    assert fetched >= needed_bytes(checkpoint, load)
    assert_same_weights(path, checkpoint, load)


async def test_a_blob_that_a_power_cut_shortened_is_fetched_again(cluster: Cluster, checkpoint: Checkpoint) -> None:
    head, node = await cluster.machine("head", checkpoint), await cluster.machine("node")
    load = load_of(checkpoint, head.source)
    await node.store.provide(load, None, ignore)
    blob = max((node.store.files.directory / "blobs").iterdir(), key=lambda path: path.stat().st_size)
    size = blob.stat().st_size
    os.truncate(blob, 0)
    path, fetched = await node.store.provide(load, None, ignore)
    assert fetched == size
    assert_same_weights(path, checkpoint, load)


@pytest.mark.parametrize("num_stores", [1, 2])
async def test_who_fetches_at_once_fetches_each_tensor_once(
    num_stores: int, cluster: Cluster, checkpoint: Checkpoint
) -> None:
    """Two workers of one agent, or two agents of one machine."""
    head, node = await cluster.machine("head", checkpoint), await cluster.machine("node")
    stores = [node.store, ShardStore(node.store.files.directory)]
    loads = [load_of(checkpoint, head.source, layers=layers) for layers in ((0, 3), (1, 4), (0, 4))]
    answers = await asyncio.gather(
        *(stores[index % num_stores].provide(load, None, ignore) for index, load in enumerate(loads))
    )
    for (path, _), load in zip(answers, loads, strict=True):
        assert_same_weights(path, checkpoint, load)
    assert sum(fetched for _, fetched in answers) == needed_bytes(checkpoint, loads[2])


async def test_a_manifest_that_is_not_what_was_asked_for_is_refused(
    cluster: Cluster, checkpoint: Checkpoint, tmp_path: Path
) -> None:
    good = await ShardStore(tmp_path / "s").manifest(checkpoint.fingerprint)
    assert good is None
    head, node = await cluster.machine("head", checkpoint), await cluster.machine("node")
    good = await head.store.manifest(checkpoint.fingerprint)
    assert good is not None
    for change in ("config", "digest", "shape", "dtype", "name", "config syntax"):
        bad = pb.Manifest()
        bad.CopyFrom(good)
        match change:
            case "config":
                bad.config = json.dumps(json.loads(good.config) | {"rms_norm_eps": 0.5})
            case "digest":
                bad.digest = bytes(32)
            case "shape":
                bad.tensors[0].shape[0] = 1 << 60
            case "dtype":
                bad.tensors[0].dtype = "../F32"
            case "name":
                bad.tensors[0].name = "../../blob"
            case "config syntax":
                bad.config = "[" * 100_000

        async def lie(fingerprint: str, answer: pb.Manifest = bad) -> pb.Manifest:
            return answer

        head.manifest = lie  # type: ignore[method-assign]
        with pytest.raises(TransportError, match="nobody could describe it"):
            await node.store.provide(load_of(checkpoint, head.source), None, ignore)
        assert not list((node.store.files.directory / "manifests").glob("*.json"))


async def test_a_full_disk_is_said_and_what_came_is_kept(
    cluster: Cluster, checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    head, node = await cluster.machine("head", checkpoint), await cluster.machine("node")
    load = load_of(checkpoint, head.source)
    usage = shutil.disk_usage(node.store.files.directory.parent)
    with monkeypatch.context() as patch:
        patch.setattr(shards_module.shutil, "disk_usage", lambda path: usage._replace(free=10))
        with pytest.raises(EngineError, match=r"more in the shard store at .*, where 10 B are free"):
            await node.store.provide(load, None, ignore)
    written = 0
    write = os.write

    def fills_up(descriptor: int, data: bytes) -> int:
        nonlocal written
        if len(data) > 1000:
            written += len(data)
            if written > 100_000:
                raise OSError(errno.ENOSPC, "No space left on device")
        return write(descriptor, data)

    with monkeypatch.context() as patch:
        patch.setattr(os, "write", fills_up)
        with pytest.raises(EngineError, match="cannot be written: No space left on device"):
            await node.store.provide(load, None, ignore)
    path, fetched = await node.store.provide(load, None, ignore)
    assert fetched < needed_bytes(checkpoint, load)
    assert_same_weights(path, checkpoint, load)


async def test_hashes_are_computed_once_for_as_long_as_a_file_stays(
    cluster: Cluster, checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    head = await cluster.machine("head", checkpoint)
    names = list(checkpoint.tensors)
    expected = [hashlib.sha256(content(checkpoint, name)).hexdigest() for name in names]
    assert await head.store.hashes(checkpoint.fingerprint, names) == expected
    again = ShardStore(head.store.files.directory)
    again.offer(checkpoint)
    from tllm.cluster import shard_files

    with monkeypatch.context() as patch:
        patch.setattr(shard_files, "hash_extent", None)
        assert await again.hashes(checkpoint.fingerprint, names) == expected
    for file in checkpoint.directory.glob("*.safetensors"):
        data = bytearray(file.read_bytes())
        data[-1] ^= 1
        file.write_bytes(data)
        os.utime(file, ns=(1, 1))
    changed = [hashlib.sha256(content(checkpoint, name)).hexdigest() for name in names]
    assert await again.hashes(checkpoint.fingerprint, names) == changed != expected


async def test_a_tensor_of_a_file_that_is_gone_has_no_hash_and_no_place(
    cluster: Cluster, checkpoint: Checkpoint
) -> None:
    head = await cluster.machine("head", checkpoint)
    for file in checkpoint.directory.glob("*.safetensors"):
        file.unlink()
    name = next(iter(checkpoint.tensors))
    assert await head.store.hashes(checkpoint.fingerprint, [name, "nothing"]) == ["", ""]
    assert await head.store.locate(checkpoint.fingerprint, name) is None


# ----------------------------------------------------------------------------------------------- garbage


async def test_garbage_is_what_no_manifest_names_and_what_is_old(cluster: Cluster, tmp_path: Path) -> None:
    one = Checkpoint.open(tiny_checkpoint(tmp_path / "one", tokenizer=False))
    two = Checkpoint.open(tiny_checkpoint(tmp_path / "two", tokenizer=False, seed=1))
    head, node = await cluster.machine("head", one), await cluster.machine("node")
    head.store.offer(two)
    for checkpoint in (one, two):
        await node.store.provide(
            load_of(checkpoint, head.source, layers=(0, 4), model=checkpoint.directory.name), None, ignore
        )
    files = node.store.files
    now = files.manifest_path(one.fingerprint).stat().st_mtime
    kept = files.checkpoints()
    assert {item.model for item in kept} == {"one", "two"}
    assert all(0 < item.held_bytes <= item.total_bytes for item in kept)
    assert files.garbage(now=now) == files.garbage(now=now + 10 * DAY_S)  # nothing
    assert not files.garbage(now=now).files

    stray = files.blob("ee" * 32)
    part = files.part("ff" * 32)
    stray.write_bytes(b"stray")
    part.write_bytes(b"part")
    assert not files.garbage(now=stray.stat().st_mtime + 60).files  # it may yet be named, and that be resumed
    assert set(files.garbage(now=now + 2 * DAY_S).files) == {stray, part}

    os.utime(files.manifest_path(two.fingerprint), (now - 9 * DAY_S,) * 2)
    garbage = files.garbage(now=now, older_than_s=7 * DAY_S)
    assert files.manifest_path(two.fingerprint) in garbage.files
    assert files.manifest_path(one.fingerprint) not in garbage.files
    files.remove(garbage)
    assert [item.model for item in files.checkpoints()] == ["one"]
    path, fetched = await node.store.provide(load_of(one, head.source, layers=(0, 4)), None, ignore)
    assert fetched == 0
    assert_same_weights(path, one, load_of(one, layers=(0, 4)))

    files.remove(files.garbage(now=now, everything=True))
    assert not files.checkpoints()
    assert not list((files.directory / "blobs").iterdir())


async def test_nothing_is_removed_while_the_store_is_filled(cluster: Cluster, checkpoint: Checkpoint) -> None:
    node = await cluster.machine("node")
    files = node.store.files
    files.prepare()
    stray = files.blob("ee" * 32)
    stray.write_bytes(b"stray")
    garbage = files.garbage(now=0.0, everything=True)
    async with files.filling():
        with pytest.raises(EngineError, match="being fetched"):
            StoreFiles(files.directory).remove(garbage)
    assert stray.exists()
    files.remove(garbage)
    assert not stray.exists()


# ------------------------------------------------------------------------------------------------- queue


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.sets(st.sampled_from("abc")), max_size=12),  # per job: who has it
    st.lists(st.tuples(st.sampled_from("abc"), st.integers(0, 3)), max_size=3, unique_by=lambda pair: pair[0]),
)
def test_every_job_is_done_by_somebody_who_has_it_unless_all_of_those_are_out(
    holders: list[set[str]], failing: list[tuple[str, int]]
) -> None:
    fails_after = dict(failing)

    async def run() -> None:
        queue = JobQueue()
        jobs = [Job(name=str(index), num_bytes=1, sha256="") for index in range(len(holders))]
        done: dict[str, str] = {}
        out: set[str] = set()

        async def draw(source: str) -> None:
            left = fails_after.get(source, 10**9)
            while (job := await queue.take(source)) is not None:
                await asyncio.sleep(0)
                if not left:
                    queue.put_back(job)
                    out.add(source)
                    return
                if source in holders[int(job.name)]:
                    left -= 1
                    assert job.name not in done
                    done[job.name] = source
                    queue.done()
                else:
                    job.lacking.add(source)
                    queue.put_back(job)

        async def feed() -> None:
            for job in jobs:
                queue.put(job)
                await asyncio.sleep(0)
            queue.end()

        async with asyncio.timeout(5):
            await asyncio.gather(feed(), *(draw(source) for source in "abcc"))
        assert {job.name for job in queue.pending} == {job.name for job in jobs} - done.keys()
        for job in queue.pending:
            assert holders[int(job.name)] <= out

    asyncio.run(run())


def test_a_load_without_a_shard_of_the_model_is_refused(checkpoint: Checkpoint) -> None:
    with pytest.raises(ModelError):
        checkpoint.needed(Shard(first_layer=2, last_layer=9, embed=False, head=False))
    assert checkpoint.dtype is DType.FLOAT32
