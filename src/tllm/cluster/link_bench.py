"""A link benchmark between two nodes of a cluster: what the head orders, what a node answers, and the sweep it runs.

    person ─▶ head ── BenchLink ─▶ source ══ matrices ══▶ target's server
                   ◀─ BenchedLink ──

Real hidden states come with the order as a small sample: an agent has no engine, and a model may not be at hand there.

This file does not know who asks, nor what the times mean.
"""

from __future__ import annotations

import asyncio
import itertools
import secrets
from collections.abc import Sequence

from tllm.cluster.membership import Member, bench_key
from tllm.cluster.status import LinkOrder
from tllm.core.errors import ConfigError, FrameError, TllmError, TransportError
from tllm.core.types import HEAD, DType
from tllm.transport import rpc
from tllm.transport import wire_pb2 as pb
from tllm.transport.codecs import CodecName, parse_codec_name
from tllm.transport.link_bench import MatrixClient, Timing
from tllm.transport.link_sweep import (
    Cell,
    Contents,
    LinkSample,
    Measured,
    Sweep,
    SweepSettings,
    extended,
    random_contents,
    sweep,
)

_numbers = itertools.count(secrets.randbits(32))  # not those of a head before this one

PATIENCE = 3.0  # times the budget that the answer is waited for: turns on a link that became slower take longer
SETUP_S = 20.0  # for what comes before the first matrix


async def run(
    settings: SweepSettings,
    sample: LinkSample | None,
    addresses: Sequence[str],
    *,
    identity: rpc.Identity,
    peer: str,
    turn: asyncio.Lock | None = None,
    liveness: rpc.Liveness | None = None,
) -> Sweep:
    """From this process. Raises TransportError, ConfigError for a sample that is none, TimeoutError when the link does
    not get anywhere near its budget."""
    contents = await asyncio.to_thread(contents_of, settings, sample)
    async with asyncio.timeout(PATIENCE * settings.budget_s + SETUP_S):
        async with MatrixClient(addresses, identity=identity, peer=peer, liveness=liveness) as client:
            return await sweep(client, settings, contents, turn=turn)


def contents_of(settings: SweepSettings, sample: LinkSample | None) -> tuple[Contents, ...]:
    """What both the sender and whoever reads its times fill matrices with: the same bytes for the same settings."""
    drawn = random_contents(settings)
    if sample is None:
        return (drawn,)
    return extended(sample, settings), drawn


async def ask(source: Member, target: Member | None, order: LinkOrder) -> Sweep:
    """From a node; None: towards the head. Raises TransportError, with the node's words when it could not measure, and
    TimeoutError."""
    node_id = HEAD if target is None else target.profile.id
    number = next(_numbers)
    addresses: Sequence[str] = () if target is None else target.addresses
    if target is not None and source.profile.machine != target.profile.machine:
        addresses = [address for address in addresses if not address.startswith("unix:")]
        if not addresses:
            raise TransportError(
                f"{target.profile.name} has no address for other machines; name the two the other way round"
            )
    message = pb.HeadMessage(bench_link=order_message(number, node_id, addresses, order))
    timeout_s = PATIENCE * order.settings.budget_s + 2 * SETUP_S
    answer = (await source.ask(message, bench_key(number), timeout_s, about=target)).benched_link
    if answer.failed:
        raise TransportError(f"{source.profile.name}: {answer.failed}")
    return read_answer(answer)


async def carry_out(
    order: pb.BenchLink, addresses: Sequence[str], *, identity: rpc.Identity, turn: asyncio.Lock, liveness: rpc.Liveness
) -> pb.BenchedLink:
    """A node's answer to an order; failures are in it."""
    try:
        settings, sample = _read_order(order)
        found = await run(
            settings, sample, addresses, identity=identity, peer=order.node_id, turn=turn, liveness=liveness
        )
        return _answer(order.number, found)
    except (TllmError, TimeoutError) as error:
        return pb.BenchedLink(number=order.number, failed=str(error) or "the link was too slow to measure")


def order_message(number: int, node_id: str, addresses: Sequence[str], order: LinkOrder) -> pb.BenchLink:
    settings, sample = order.settings, order.sample
    return pb.BenchLink(
        number=number,
        node_id=node_id,
        addresses=addresses,
        rows=settings.rows,
        columns=settings.columns,
        dtype=settings.dtype,
        codecs=settings.codecs,
        repeats=settings.repeats,
        seed=settings.seed,
        budget_s=settings.budget_s,
        sample=sample.data if sample else b"",
        sample_width=sample.width if sample else 0,
        sample_name=sample.name if sample else "",
    )


def _read_order(order: pb.BenchLink) -> tuple[SweepSettings, LinkSample | None]:
    """Raises ConfigError for what cannot be measured, FrameError for a dtype that does not exist."""
    try:
        dtype = DType(order.dtype)
    except ValueError as error:
        raise FrameError(f"no element type is called {order.dtype[:32]!r}") from error
    settings = SweepSettings(
        rows=tuple(order.rows),
        columns=order.columns,
        dtype=dtype,
        codecs=tuple(map(parse_codec_name, order.codecs)),
        repeats=order.repeats,
        seed=order.seed,
        budget_s=order.budget_s,
    )
    sample = LinkSample(name=order.sample_name, data=order.sample, width=order.sample_width) if order.sample else None
    return settings, sample


def _answer(number: int, found: Sweep) -> pb.BenchedLink:
    timings = [timing for measured in found.cells for timing in measured.timings]
    return pb.BenchedLink(
        number=number,
        round_trips_s=found.round_trips_s,
        rows=[measured.cell.rows for measured in found.cells],
        codecs=[measured.cell.codec for measured in found.cells],
        contents=[measured.cell.contents for measured in found.cells],
        num_timings=[len(measured.timings) for measured in found.cells],
        encoded_bytes=[timing.encoded_bytes for timing in timings],
        compress_s=[timing.compress_s for timing in timings],
        carry_s=[timing.carry_s for timing in timings],
        decompress_s=[timing.decompress_s for timing in timings],
        left_out_rows=found.left_out_rows,
        missing_codecs=list(found.missing),
        missing_reasons=list(found.missing.values()),
    )


def read_answer(answer: pb.BenchedLink) -> Sweep:
    """Raises FrameError for an answer that contradicts itself, or has no times."""
    kinds = (answer.rows, answer.codecs, answer.contents, answer.num_timings)
    each = (answer.encoded_bytes, answer.compress_s, answer.carry_s, answer.decompress_s)
    if len({len(column) for column in kinds}) > 1 or any(len(column) != sum(answer.num_timings) for column in each):
        raise FrameError("a link's times whose columns contradict each other")
    if not answer.round_trips_s or not answer.num_timings or 0 in answer.num_timings or 0 in answer.encoded_bytes:
        raise FrameError("a link's times without times")
    if any(not 0 <= seconds < float("inf") for column in (answer.round_trips_s, *each[1:]) for seconds in column):
        raise FrameError("a link's times that are none")
    try:
        timings = [
            Timing(encoded_bytes=size, compress_s=compress_s, carry_s=carry_s, decompress_s=decompress_s)
            for size, compress_s, carry_s, decompress_s in zip(*each, strict=True)
        ]
        cells: list[Measured] = []
        for rows, codec, contents, number in zip(*kinds, strict=True):
            cell = Cell(rows=rows, codec=parse_codec_name(codec), contents=contents)
            cells.append(Measured(cell=cell, timings=tuple(timings[:number])))
            del timings[:number]
        missing: dict[CodecName, str] = {
            parse_codec_name(codec): why
            for codec, why in zip(answer.missing_codecs, answer.missing_reasons, strict=True)
        }
    except (ValueError, ConfigError) as error:
        raise FrameError(f"a link's times that cannot be read: {error}") from error
    return Sweep(
        round_trips_s=tuple(answer.round_trips_s),
        cells=tuple(cells),
        left_out_rows=tuple(answer.left_out_rows),
        missing=missing,
    )
