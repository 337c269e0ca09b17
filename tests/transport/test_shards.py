"""The shard service over a real server: what peers ask is answered in bounds, and nothing else is."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Sequence
from pathlib import Path

import pytest

from tllm.core.errors import TransportError
from tllm.transport import wire_pb2 as pb
from tllm.transport.server import Server
from tllm.transport.shards import (
    MAX_ECHO_BYTES,
    MAX_PIECE_BYTES,
    Extent,
    NotHeldError,
    ShardClient,
    ShardService,
)
from tllm.transport.trust import Authority

FINGERPRINT = "ab" * 32


class OneFile:
    """A provider of one checkpoint with one tensor, which fills a file but for its first and last byte."""

    def __init__(self, file: Path, manifest: pb.Manifest) -> None:
        self.file = file
        self.described = manifest

    async def manifest(self, fingerprint: str) -> pb.Manifest | None:
        return self.described if fingerprint == FINGERPRINT else None

    async def hashes(self, fingerprint: str, names: Sequence[str]) -> Sequence[str]:
        return ["cd" * 32 if name == "a" else "" for name in names]

    async def locate(self, fingerprint: str, name: str) -> Extent | None:
        if (fingerprint, name) != (FINGERPRINT, "a"):
            return None
        return Extent(file=self.file, offset=1, num_bytes=self.file.stat().st_size - 2)


@pytest.fixture
def data() -> bytes:
    return os.urandom(3 * MAX_PIECE_BYTES + 1000)


@pytest.fixture
def provider(tmp_path: Path, data: bytes) -> OneFile:
    (tmp_path / "file").write_bytes(b"<" + data + b">")
    tensors = [pb.Tensor(name=f"tensor {number}" * 20, dtype="F32", shape=[number]) for number in range(3000)]
    return OneFile(tmp_path / "file", pb.Manifest(fingerprint=FINGERPRINT, config="{}", tensors=tensors))


@pytest.fixture
async def client(provider: OneFile, tmp_path: Path) -> AsyncIterator[ShardClient]:
    server = Server([ShardService(provider)], identity=None)
    addresses = await server.start([f"unix:{tmp_path}/shards.sock"])
    async with ShardClient(addresses, identity=None) as client:
        yield client
    await server.aclose()


async def test_a_manifest_larger_than_a_piece_arrives_whole(client: ShardClient, provider: OneFile) -> None:
    assert provider.described.ByteSize() > 2 * MAX_PIECE_BYTES
    assert await client.describe(FINGERPRINT) == provider.described


@pytest.mark.parametrize("offset", [0, 1, MAX_PIECE_BYTES, -1])
async def test_a_tensor_is_read_from_any_offset_in_bounded_pieces(
    client: ShardClient, data: bytes, offset: int
) -> None:
    offset %= len(data) + 1
    pieces = [piece async for piece in client.read(FINGERPRINT, "a", offset)]
    assert b"".join(pieces) == data[offset:]
    assert all(0 < len(piece) <= MAX_PIECE_BYTES for piece in pieces)


async def test_what_a_peer_does_not_have_is_told_from_a_peer_that_is_gone(client: ShardClient) -> None:
    with pytest.raises(NotHeldError):
        await client.describe("00" * 32)
    for fingerprint, name in ((FINGERPRINT, "b"), ("00" * 32, "a"), ("../../etc", "passwd")):
        with pytest.raises(NotHeldError):
            await anext(client.read(fingerprint, name))


async def test_an_offset_beyond_the_tensor_is_refused(client: ShardClient, data: bytes) -> None:
    with pytest.raises(TransportError, match=f"has only {len(data)} bytes"):
        await anext(client.read(FINGERPRINT, "a", len(data) + 1))


async def test_a_file_that_became_shorter_is_a_loss_and_no_short_answer(
    client: ShardClient, provider: OneFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def locate(fingerprint: str, name: str) -> Extent:
        return Extent(file=provider.file, offset=0, num_bytes=10 * provider.file.stat().st_size)

    monkeypatch.setattr(provider, "locate", locate)
    with pytest.raises(TransportError, match="has become shorter"):
        async for _ in client.read(FINGERPRINT, "a"):
            pass
    provider.file.unlink()


async def test_hashes_come_in_the_order_asked(client: ShardClient) -> None:
    assert await client.hashes(FINGERPRINT, ["b", "a", "c"]) == ("", "cd" * 32, "")
    with pytest.raises(TransportError, match="at a time"):
        await client.hashes(FINGERPRINT, ["a"] * 5000)


@pytest.mark.parametrize("num_bytes", [0, 1, MAX_ECHO_BYTES])
async def test_an_echo_comes_back(client: ShardClient, num_bytes: int) -> None:
    await client.echo(bytes(num_bytes))


async def test_an_echo_is_bounded(client: ShardClient) -> None:
    with pytest.raises(TransportError):
        await client.echo(bytes(2 * MAX_ECHO_BYTES))


async def test_a_reader_that_stops_leaves_the_connection_usable(client: ShardClient, data: bytes) -> None:
    reading = client.read(FINGERPRINT, "a")
    first = await anext(reading)
    await reading.aclose()
    assert data.startswith(first)
    assert b"".join([piece async for piece in client.read(FINGERPRINT, "a")]) == data


async def test_a_slow_reader_holds_the_sender_back(
    client: ShardClient, provider: OneFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing is read from disk far ahead of what the reader took."""
    with provider.file.open("r+b") as file:
        file.truncate(256 << 20)
    num_blocks = 0
    from tllm.transport import shards

    read_block = shards._read_block

    def counted(path: Path, offset: int, num_bytes: int) -> bytes:
        nonlocal num_blocks
        num_blocks += 1
        return read_block(path, offset, num_bytes)

    monkeypatch.setattr(shards, "_read_block", counted)
    reading = client.read(FINGERPRINT, "a")
    await anext(reading)
    seen = -1
    while seen != num_blocks:  # until it stands still
        seen = num_blocks
        await client.hashes(FINGERPRINT, ["a"] * 100)
        await asyncio.to_thread(lambda: None)
    await reading.aclose()
    assert num_blocks < 64


async def test_between_machines_the_peer_must_be_who_it_should_be(
    provider: OneFile, data: bytes, tmp_path: Path
) -> None:
    authority = Authority.open(tmp_path / "keys")
    server = Server([ShardService(provider)], identity=authority.identity("n-1"))
    addresses = await server.start(["127.0.0.1:0"])
    me = authority.identity("n-2")
    try:
        async with ShardClient(addresses, identity=me, peer="n-1") as client:
            assert b"".join([piece async for piece in client.read(FINGERPRINT, "a")]) == data
        with pytest.raises(TransportError, match="did not answer"):
            async with ShardClient(addresses, identity=me, peer="n-3", timeout_s=0.5):
                pass
        stranger = Authority.open(tmp_path / "others").identity("n-2")
        with pytest.raises(TransportError, match="did not answer"):
            async with ShardClient(addresses, identity=stranger, peer="n-1", timeout_s=0.5):
                pass
    finally:
        await server.aclose()
