"""Matrices over real streams: what the receiver refuses, how a sweep is kept within its time, and what it finds."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tllm.core.errors import ConfigError, TransportError
from tllm.core.types import DType
from tllm.testing.identities import forged, members
from tllm.transport import link_bench
from tllm.transport.codecs import CodecName, MatrixCodec, MatrixShape, make_codec
from tllm.transport.link_bench import CodecUnusableError, LinkBench, MatrixClient, Timing
from tllm.transport.link_sweep import (
    LinkSample,
    Sweep,
    SweepSettings,
    extended,
    random_contents,
    sweep,
)
from tllm.transport.server import Server

SHAPE = MatrixShape(rows=3, columns=40, dtype=DType.BFLOAT16)
ZEROS = bytes(SHAPE.num_bytes)


@asynccontextmanager
async def served(directory: Path) -> AsyncIterator[tuple[str, LinkBench]]:
    bench = LinkBench()
    server = Server([bench], identity=None)
    (address,) = await server.start([f"unix:{directory}/link.sock"])
    try:
        yield address, bench
    finally:
        await server.aclose()


@pytest.fixture
async def client(tmp_path: Path) -> AsyncIterator[MatrixClient]:
    async with served(tmp_path) as (address, _), MatrixClient([address], identity=None) as client:
        yield client


@pytest.mark.parametrize("name", list(CodecName))
async def test_every_codec_crosses_in_one_message_and_in_many(client: MatrixClient, name: CodecName) -> None:
    settings = SweepSettings(rows=(1, 700), columns=512)
    matrix = random_contents(settings).data
    for rows in settings.rows:
        shape = settings.shape(rows)
        timing = await client.send(matrix[: shape.num_bytes], shape, name)
        assert timing.encoded_bytes == len(make_codec(name).encode(matrix[: shape.num_bytes], shape))
        assert min(timing.compress_s, timing.carry_s, timing.decompress_s) >= 0
    assert await client.round_trip_s() > 0


async def test_what_is_larger_than_a_matrix_may_be_is_refused_before_it_comes(client: MatrixClient) -> None:
    with pytest.raises(TransportError, match="at most 67108864 are allowed"):
        await client.send(b"", replace(SHAPE, rows=1 << 20, columns=1 << 12), CodecName.NONE)


@pytest.mark.parametrize(
    ("data", "why"),
    [
        (bytes(100_000), "no codec makes larger"),
        (ZEROS + b"x", "241 bytes where a matrix of 3 x 40 has 240"),
        (ZEROS[:-1], "239 bytes where"),
    ],
)
async def test_a_matrix_that_is_not_what_its_header_says_ends_the_stream(
    client: MatrixClient, data: bytes, why: str
) -> None:
    with pytest.raises(TransportError, match=why):
        await client.send(data, SHAPE, CodecName.NONE)
    with pytest.raises(TransportError):
        await client.round_trip_s()


@pytest.mark.parametrize(
    ("header", "why"),
    [
        (b"short", "without a header"),
        (link_bench._HEADER.pack(1, 1, 2, 99, 0), "unknown codec"),
        (link_bench._HEADER.pack(1, 1, 2, 0, 99), "unknown codec or dtype"),
        (link_bench._HEADER.pack(0, 1, 0, 0, 0), "without rows"),
        (link_bench._HEADER.pack(1, 8, 16, 0, 1) + bytes(15), "do not make up its length"),
        (link_bench._HEADER.pack(1, 8, 16, 0, 1) + bytes(17), "do not make up its length"),
    ],
)
async def test_nonsense_is_refused_with_a_reason(client: MatrixClient, header: bytes, why: str) -> None:
    with pytest.raises(TransportError, match=why):
        await client._exchange(header)


async def test_a_codec_that_one_end_has_not_leaves_the_stream_usable(
    client: MatrixClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    client.codec(CodecName.LZ4)

    def without_lz4(name: CodecName) -> MatrixCodec:
        if name in (CodecName.LZ4, CodecName.ZSTD):
            raise ConfigError("it needs something")
        return make_codec(name)

    monkeypatch.setattr(link_bench, "make_codec", without_lz4)
    with pytest.raises(CodecUnusableError, match="the peer: it needs something"):
        await client.send(ZEROS, SHAPE, CodecName.LZ4)
    with pytest.raises(CodecUnusableError, match=r"^it needs something"):
        await client.send(ZEROS, SHAPE, CodecName.ZSTD)
    await client.send(ZEROS, SHAPE, CodecName.INT8)
    sweeping = SweepSettings(rows=(1, 2), columns=8, repeats=2)
    found = await sweep(client, sweeping, [random_contents(sweeping)])
    assert found.missing == {CodecName.LZ4: "the peer: it needs something", CodecName.ZSTD: "it needs something"}
    assert {each.cell.codec for each in found.cells} == set(CodecName) - set(found.missing)


async def test_streams_beyond_a_few_are_refused(tmp_path: Path) -> None:
    async with (
        served(tmp_path) as (address, _),
        MatrixClient([address], identity=None) as one,
        MatrixClient([address], identity=None) as other,
    ):
        await one.round_trip_s()
        await other.round_trip_s()
        async with MatrixClient([address], identity=None) as third:
            with pytest.raises(TransportError, match="try again when they are done"):
                await third.round_trip_s()


async def test_who_waits_for_a_benchmark_hears_of_its_beginning_and_its_end(tmp_path: Path) -> None:
    async with served(tmp_path) as (address, bench), asyncio.timeout(10):
        waiting = asyncio.create_task(bench.wait_served())
        async with MatrixClient([address], identity=None) as client:
            await client.round_trip_s()
            await bench.wait_opened()
            assert not waiting.done()
        await waiting


async def test_only_members_send_matrices(tmp_path: Path) -> None:
    receiver, sender = members(tmp_path / "cluster", "n-00000001", "n-00000002")
    server = Server([LinkBench()], identity=receiver, enrols=True)
    addresses = await server.start(["127.0.0.1:0"])
    try:
        async with MatrixClient(addresses, identity=sender, peer="n-00000001") as client:
            await client.round_trip_s()
        stranger = forged("n-00000002", sender)
        async with MatrixClient(addresses, identity=stranger, peer="n-00000001") as client:
            with pytest.raises(TransportError, match="for members of the cluster"):
                await client.round_trip_s()
    finally:
        await server.aclose()


async def test_a_peer_that_is_not_there_or_goes_away_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(TransportError, match="did not answer"):
        async with MatrixClient([f"unix:{tmp_path}/nobody"], identity=None, timeout_s=0.1):
            pass
    with pytest.raises(TransportError, match="no address"):
        async with MatrixClient([], identity=None):
            pass
    async with served(tmp_path) as (address, _):
        client = await MatrixClient([address], identity=None).__aenter__()
        await client.round_trip_s()
    with pytest.raises(TransportError, match="the peer"):
        await client.round_trip_s()
    await client.__aexit__(None, None, None)


# Sweeps ---------------------------------------------------------------------------------------------------------------


class PlayedLink:
    """Takes time as a link of this rate does, on a clock of its own."""

    def __init__(self, bytes_per_s: float, latency_s: float) -> None:
        self.bytes_per_s = bytes_per_s
        self.latency_s = latency_s
        self.now = 0.0
        self.sent: list[tuple[int, CodecName]] = []

    async def round_trip_s(self) -> float:
        self.now += 2 * self.latency_s
        return 2 * self.latency_s

    async def send(self, data: bytes, shape: MatrixShape, name: CodecName) -> Timing:
        assert len(data) == shape.num_bytes
        await asyncio.sleep(0)
        carry_s = 2 * self.latency_s + len(data) / self.bytes_per_s
        self.now += carry_s
        self.sent.append((shape.rows, name))
        return Timing(encoded_bytes=len(data), compress_s=0.0, carry_s=carry_s, decompress_s=0.0)


def swept(link: PlayedLink, settings: SweepSettings) -> Sweep:
    return asyncio.run(sweep(link, settings, [random_contents(settings)], clock=lambda: link.now))


@settings(max_examples=60, deadline=None)
@given(
    rate=st.floats(3, 10).map(lambda exponent: 10.0**exponent),
    latency_s=st.floats(0, 0.3),
    repeats=st.integers(1, 8),
    budget_s=st.floats(0.1, 60),
    num_codecs=st.integers(1, 6),
)
def test_a_sweep_ends_in_time_and_says_which_sizes_it_left_out(
    rate: float, latency_s: float, repeats: int, budget_s: float, num_codecs: int
) -> None:
    link = PlayedLink(rate, latency_s)
    codecs = tuple(CodecName)[:num_codecs]
    asked = SweepSettings(rows=(1, 4, 16, 64, 256), columns=64, codecs=codecs, repeats=repeats, budget_s=budget_s)
    found = swept(link, asked)
    kept = sorted({each.cell.rows for each in found.cells})
    assert (*kept, *found.left_out_rows) == asked.rows
    assert {rows for rows, _ in link.sent} == set(kept), "what is left out is not tried first"
    assert len(kept) >= 2
    assert len(found.cells) == len(kept) * num_codecs
    assert len({len(each.timings) for each in found.cells}) == 1
    round_s = sum(each.timings[0].carry_s for each in found.cells)
    if len(kept) > 2:  # two are measured whatever they take
        assert round_s * (2 + repeats) <= 1.01 * budget_s
        assert all(len(each.timings) == repeats for each in found.cells)
    if found.left_out_rows and len(kept) > 2:
        next_s = num_codecs * (2 * latency_s + asked.shape(found.left_out_rows[0]).num_bytes / rate)
        assert (round_s + next_s) * (2 + repeats) > 0.99 * budget_s, "there was time for one more"


def test_a_link_that_becomes_slower_has_fewer_turns_but_three() -> None:
    class Slowing(PlayedLink):
        async def send(self, data: bytes, shape: MatrixShape, name: CodecName) -> Timing:
            self.bytes_per_s = 1e6 if len(self.sent) < 4 else 1e2
            return await super().send(data, shape, name)

    asked = SweepSettings(rows=(1, 2), columns=64, codecs=(CodecName.NONE,), repeats=50, budget_s=2)
    assert {len(each.timings) for each in swept(Slowing(1e6, 0.0), asked).cells} == {3}


def test_codecs_take_turns_in_an_order_drawn_from_the_seed() -> None:
    asked = SweepSettings(rows=(1, 4), columns=8, repeats=3, seed=1)
    orders = []
    for seed in (1, 1, 2):
        swept(link := PlayedLink(1e9, 0.0), replace(asked, seed=seed))
        orders.append(link.sent)
    kinds = 2 * len(CodecName)
    first, again, other = ([order[-kinds * turn :][:kinds] for turn in (3, 2, 1)] for order in orders)
    assert first == again != other
    assert first[0] != first[1] != first[2]
    assert all(sorted(turn) == sorted(first[0]) for turn in first)


async def test_others_may_measure_between_two_matrices() -> None:
    turn, asked = asyncio.Lock(), SweepSettings(rows=(1, 2), columns=8, repeats=5)
    link, between = PlayedLink(1e9, 0.0), []

    async def other() -> None:
        for _ in range(3):
            async with turn:
                between.append(len(link.sent))
            await asyncio.sleep(0)

    async with asyncio.timeout(10):
        await asyncio.gather(sweep(link, asked, [random_contents(asked)], turn=turn, clock=lambda: link.now), other())
    assert len(set(between)) == 3
    assert max(between) < len(link.sent)


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"rows": (4,)}, "at least two"),
        ({"rows": (4, 1)}, "at least two different numbers"),
        ({"rows": (0, 1)}, "from 1 to 65536"),
        ({"rows": (1, 65536), "columns": 8192}, "at most 64 MiB"),
        ({"columns": 0}, "smaller width"),
        ({"codecs": (CodecName.LZ4,)}, "with none among them"),
        ({"codecs": (CodecName.NONE, CodecName.NONE)}, "must be different"),
        ({"repeats": 0}, "repeats is 0"),
        ({"budget_s": 0.0}, "more than 0"),
        ({"budget_s": float("nan")}, "more than 0"),
        ({"seed": -1}, "seed is -1"),
    ],
)
def test_what_cannot_be_measured_is_refused(change: dict[str, object], why: str) -> None:
    with pytest.raises(ConfigError, match=why):
        replace(SweepSettings(columns=64), **change)


def test_a_sample_is_extended_by_rows_of_the_same_numbers_in_other_orders() -> None:
    asked = SweepSettings(rows=(1, 10), columns=48)
    sample = np.arange(3 * 16, dtype=np.uint16)
    data = extended(LinkSample(name="a", data=sample.tobytes(), width=16), asked).data
    rows = np.frombuffer(data, np.uint16).reshape(-1, 16)
    assert rows.shape == (30, 16)
    assert (rows[:3] == sample.reshape(3, 16)).all()
    assert (np.sort(rows.reshape(10, 48), axis=1) == sample).all()
    assert len({row.tobytes() for row in rows}) == 30
    with pytest.raises(ConfigError, match="no row of 16"):
        extended(LinkSample(name="a", data=bytes(30), width=16), asked)


async def test_an_int8_that_cannot_carry_the_numbers_says_so(client: MatrixClient) -> None:
    with pytest.raises(CodecUnusableError, match="not finite"):
        await client.send(b"\xff\x7f" * 120, SHAPE, CodecName.INT8)
    await client.send(ZEROS, SHAPE, CodecName.INT8)
