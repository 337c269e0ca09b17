"""What is made of a sweep: the line through it, verdicts on codecs, tables and records; and that an emulated link's
rate and delay are found again."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tllm.cluster.link_bench import contents_of
from tllm.core.errors import TransportError
from tllm.lab.link_bench import (
    LinkReport,
    activations,
    as_json,
    draw,
    lines,
    other_process,
    records,
    report,
)
from tllm.lab.record import Records
from tllm.models.repository import resolve_model
from tllm.testing.identities import members
from tllm.testing.links import emulated_link
from tllm.transport.codecs import CodecName
from tllm.transport.link_bench import LinkBench, MatrixClient, Timing
from tllm.transport.link_sweep import Cell, Measured, Sweep, SweepSettings, random_contents, sweep
from tllm.transport.server import Server

SETTINGS = SweepSettings(rows=(1, 4, 16, 64, 256), columns=512, repeats=3)


def played(
    latency_s: float, bytes_per_s: float, *, noise_s: float = 0.0, code_bytes_per_s: float = 1e9, ratio: float = 2.0
) -> Sweep:
    """Of a perfect link; every repeat but one is late. A codec that halves, and takes as long for both its ends."""
    cells = []
    for rows in SETTINGS.rows:
        num_bytes = SETTINGS.shape(rows).num_bytes
        for codec in (CodecName.NONE, CodecName.ZSTD):
            encoded, code_s = num_bytes, 0.0
            if codec is not CodecName.NONE:
                encoded, code_s = int(num_bytes / ratio), num_bytes / code_bytes_per_s / 2
            timings = tuple(
                Timing(
                    encoded_bytes=encoded,
                    compress_s=code_s,
                    carry_s=2 * latency_s + encoded / bytes_per_s + repeat * noise_s,
                    decompress_s=code_s,
                )
                for repeat in range(SETTINGS.repeats)
            )
            cells.append(Measured(cell=Cell(rows=rows, codec=codec, contents="random"), timings=timings))
    trips = (2 * latency_s, 2 * latency_s + noise_s, 2 * latency_s + 2 * noise_s)
    return Sweep(round_trips_s=trips, cells=tuple(cells), left_out_rows=(1024,), missing={CodecName.LZ4: "not here"})


def reported(found: Sweep) -> LinkReport:
    return report("a to b", found, SETTINGS, [random_contents(SETTINGS)])


@given(
    latency_s=st.floats(1e-5, 0.3), rate=st.floats(4, 10).map(lambda exponent: 10.0**exponent), late=st.floats(0, 0.1)
)
def test_a_perfect_link_is_found_again_however_late_other_messages_are(
    latency_s: float, rate: float, late: float
) -> None:
    fit = reported(played(latency_s, rate, noise_s=late)).fit
    assert fit.latency_s == pytest.approx(latency_s, rel=1e-6, abs=1e-9)
    assert fit.bytes_per_s == pytest.approx(rate, rel=1e-3)
    assert fit.residual_s < 1e-9
    assert fit.least_round_trip_s == 2 * latency_s
    assert fit.round_trip_s == 2 * latency_s + late


def test_noise_of_large_matrices_does_not_become_the_latency() -> None:
    found = played(0.5e-3, 125e6)
    wide = SweepSettings(rows=(1, 4, 16, 64, 256, 1024, 4096), columns=8192)
    cells = []
    for rows, miss in zip(wide.rows, (0, 0, 0, 0, 1, -1, 1), strict=True):
        carry_s = 1e-3 + wide.shape(rows).num_bytes / 125e6 * (1 + 0.02 * miss)
        timing = Timing(encoded_bytes=1, compress_s=0.0, carry_s=carry_s, decompress_s=0.0)
        cells.append(Measured(cell=Cell(rows=rows, codec=CodecName.NONE, contents="random"), timings=(timing,)))
    found = Sweep(round_trips_s=(1e-3,), cells=tuple(cells), left_out_rows=(), missing={})
    fit = report("a to b", found, wide, []).fit
    assert fit.latency_s == pytest.approx(0.5e-3, rel=0.05)
    assert fit.bytes_per_s == pytest.approx(125e6, rel=0.03)
    assert 0.005 < fit.relative_residual < 0.02


def test_messages_that_wait_for_the_receiver_do_not_make_a_long_fast_link_look_slow() -> None:
    """1 Gb/s and 25 ms: what exceeds the stream's window takes another round trip for every MiB."""
    wide = SweepSettings(rows=(1, 4, 16, 64, 256, 1024), columns=2048)
    cells = []
    for rows in wide.rows:
        num_bytes = wide.shape(rows).num_bytes
        carry_s = 50e-3 + num_bytes / 125e6 + 50e-3 * (num_bytes >> 20)
        timing = Timing(encoded_bytes=num_bytes, compress_s=0.0, carry_s=carry_s, decompress_s=0.0)
        cells.append(Measured(cell=Cell(rows=rows, codec=CodecName.NONE, contents="random"), timings=(timing,)))
    found = report("a to b", Sweep(round_trips_s=(50e-3,), cells=tuple(cells), left_out_rows=(), missing={}), wide, [])
    assert found.fit.latency_s == pytest.approx(25e-3, rel=1e-6)
    assert found.fit.bytes_per_s == pytest.approx(125e6, rel=1e-6)
    assert found.fit.rate(100_000) == found.fit.bytes_per_s
    assert found.fit.rate(4 << 20) == pytest.approx((1 << 20) / 58.4e-3, rel=0.1)
    assert "Messages of more than 512 KiB get" in "\n".join(lines(found))


@given(
    rate=st.floats(5, 9).map(lambda exponent: 10.0**exponent),
    code_rate=st.floats(6, 10).map(lambda exponent: 10.0**exponent),
    ratio=st.floats(0.9, 4),
)
def test_a_codec_pays_exactly_where_its_total_is_less(rate: float, code_rate: float, ratio: float) -> None:
    found = reported(played(1e-3, rate, code_bytes_per_s=code_rate, ratio=ratio))
    totals = {(row.rows, row.codec): row.total_s for row in found.rows}
    for verdict in found.verdicts:
        plain_s, coded_s = (totals[verdict.row.rows, codec] for codec in (CodecName.NONE, CodecName.ZSTD))
        if abs(plain_s - coded_s) > 1e-6 * plain_s:
            assert verdict.pays == (coded_s < plain_s)
            assert verdict.pays == (found.fit.bytes_per_s < verdict.below_bytes_per_s)


def test_the_table_has_the_columns_of_old_and_counts_a_direction_once() -> None:
    text = list(lines(reported(played(10e-3, 1e6, noise_s=1e-3))))
    [header] = {line for line in text if "Throughput" in line}
    columns = [column.strip() for column in header.strip("|").split("|")]
    assert columns[:5] == ["Matrix Shape", "Data", "Ratio", "Transmission(ms)", "Compress(ms)"]
    assert columns[5:] == ["Decompress(ms)", "Total(ms)", "p95(ms)", "Throughput(MB/s)"]
    row = next(line for line in text if line.startswith("|") and "(256, 512)" in line)
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    # 262,144 B at 1 MB/s and 10 ms; repeats are 0, 1 and 2 ms late.
    assert cells == ["(256, 512)", "random", "1.00", "273.14", "0.00", "0.00", "273.14", "274.04", "0.96"]
    said = "\n".join(text)
    assert "One-way latency 10.000 ms, bandwidth 8 Mb/s = 1 MB/s" in said
    assert "Left out, for they do not fit into 30 s on this link: (1024, 512)" in said
    assert "Left out: lz4. not here" in said
    assert "yes, below 4 Gb/s" in said  # 1e9 B/s through both ends, halved


def test_a_link_too_fast_for_these_sizes_has_no_rate() -> None:
    found = reported(played(1e-3, math.inf))
    assert found.fit.bytes_per_s == math.inf
    assert "beyond what matrices of these sizes can tell" in "\n".join(lines(found))
    assert json.loads(as_json(found))["fit"]["bytes_per_s"] is None
    assert not any(verdict.pays for verdict in found.verdicts)


def test_what_int8_loses_is_told() -> None:
    cells = tuple(
        Measured(
            cell=Cell(rows=rows, codec=codec, contents="random"),
            timings=(Timing(encoded_bytes=100, compress_s=1e-4, carry_s=1e-3, decompress_s=1e-4),),
        )
        for rows in (1, 4)
        for codec in (CodecName.NONE, CodecName.INT8)
    )
    found = reported(Sweep(round_trips_s=(1e-3,), cells=cells, left_out_rows=(), missing={}))
    assert 0.004 < found.losses["random"] < 0.007
    assert "relative error (root mean square): 0.5" in "\n".join(lines(found))


def test_every_matrix_is_a_record(tmp_path: Path) -> None:
    found = played(10e-3, 1e6, noise_s=1e-3)
    made = list(records(found, SETTINGS, ends="a to b", run="link-1", environment={"machine": "m"}))
    with Records(tmp_path / "records.sqlite") as kept:
        for record in made[:4]:
            kept.add(record)
        assert kept.find("link", "link-1") == tuple(made[:4])
    assert len(made) == 2 * len(SETTINGS.rows) * SETTINGS.repeats
    first, second = made[0], made[1]
    assert (first.repeat, second.repeat) == (0, 1)
    assert first.metrics["transmission_s"] == pytest.approx(10e-3 + 1024 / 1e6)
    assert second.metrics["transmission_s"] == pytest.approx(11e-3 + 1024 / 1e6)
    assert first.settings["codec"] == "none"


def test_the_picture_is_drawn(tmp_path: Path) -> None:
    draw(reported(played(1e-3, 1e7)), tmp_path / "link.png")
    assert (tmp_path / "link.png").read_bytes().startswith(b"\x89PNG")


def test_activations_are_the_hidden_states_between_two_halves_of_the_model() -> None:
    sample = activations(resolve_model("embedded"))
    values = (np.frombuffer(sample.data, np.uint16).astype(np.uint32) << 16).view(np.float32).reshape(-1, sample.width)
    assert values.shape == (512, 192)
    assert np.isfinite(values).all()
    assert len({row.tobytes() for row in values}) > 500
    contents = contents_of(SweepSettings(rows=(1, 4096), columns=192), sample)
    assert [each.name for each in contents] == ["activations", "random"]
    assert {len(each.data) for each in contents} == {4096 * 192 * 2}


async def test_the_other_end_of_a_loopback_is_a_process_that_goes_with_us() -> None:
    async with other_process() as address, MatrixClient([address], identity=None) as client:
        assert await client.round_trip_s() > 0
    with pytest.raises(TransportError):
        await MatrixClient([address], identity=None, timeout_s=0.1).__aenter__()


_MAX_ROUND_TRIPS = 80  # some 15 come with each sweep


def together(one: Sweep, other: Sweep) -> Sweep:
    """What both measured of the sizes that the first one had time for."""
    more = {each.cell: each.timings for each in other.cells}
    cells = [Measured(cell=each.cell, timings=each.timings + more.get(each.cell, ())) for each in one.cells]
    return replace(one, cells=tuple(cells), round_trips_s=one.round_trips_s + other.round_trips_s)


@pytest.mark.parametrize(("mbit_per_s", "delay_s"), [(10, 0.025), (50, 0.02), (100, 0.015)])
async def test_the_rate_and_delay_of_an_emulated_link_are_recovered_within_a_tenth(
    tmp_path: Path, mbit_per_s: float, delay_s: float
) -> None:
    """Over TLS and the streams of steps. The sweep is of the sizes that a second has room for.

    Sound on a busy machine: a message can only be late, so a size's time is that of the least of its messages, and
    where all of a size's messages were late more are sent. What remains is what two ends and the emulator, all in this
    process, take to hand a message over: half a millisecond, hence no smaller delays.

    Sizes go at once: what exceeds the stream's window waits for the receiver, here as in steps (the test above). Slow
    start does not matter: the proxy's sockets are loopbacks. Its queue (QUEUE_S) holds up the sender,
    loses nothing and lets the last byte out when the rate says.
    """

    def misses(found: Sweep) -> str:
        fit = report("emulated", found, settings, ()).fit
        rate_miss, delay_miss = fit.bytes_per_s * 8e-6 / mbit_per_s - 1, fit.latency_s / delay_s - 1
        near = max(abs(rate_miss), abs(delay_miss)) < 0.1
        return "" if near else f"the rate is off by {rate_miss:.1%}, the delay by {delay_miss:.1%}"

    receiver, sender = members(tmp_path / "cluster", "n-00000001", "n-00000002")
    settings = SweepSettings(rows=(16, 256, 1024), columns=256, codecs=(CodecName.NONE,), repeats=5, budget_s=0.8)
    server = Server([LinkBench()], identity=receiver)
    (address,) = await server.start(["127.0.0.1:0"])
    host, _, port = address.rpartition(":")
    try:
        with emulated_link(target=(host, int(port))) as link:
            link.shape(delay_s=delay_s, rate_bits_per_s=mbit_per_s * 1e6)
            async with MatrixClient([link.address], identity=sender, peer="n-00000001") as client:
                found = await sweep(client, settings, [random_contents(settings)])
                while (missed := misses(found)) and found.round_trips_s[_MAX_ROUND_TRIPS:] == ():
                    found = together(found, await sweep(client, settings, [random_contents(settings)]))
        assert not missed
    finally:
        await server.aclose()
