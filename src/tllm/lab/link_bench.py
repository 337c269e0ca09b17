"""What a link gives and what codecs do on it: a sweep's times as a line, a verdict on every codec, and tables.

    transmission   there and back, less what the receiver took to decode, less half of the least empty round trip
    total          compress + transmission + decompress
    throughput     bytes before they were encoded, counted once, over the total
    the line       transmission(bytes) = latency + bytes / bandwidth, over what crossed as it is

The line goes through the least time of every size: whatever disturbs a message (a queue, another process, a lost
packet) makes it later and nothing makes it earlier, so that the least says what the link gives, and the median and the
95th percentile in the tables what one gets of it. The latency is the whole one-way delay of an empty step: that of the
network, and what both ends' software takes to hand a message over. Half of the round trip stands for the way back; a
link whose directions differ shows their mean in the latency, while the bandwidth is that of the direction measured.

This file does not know how matrices are sent, nor whose ends are measured.
"""

from __future__ import annotations

import asyncio
import json
import math
import sys
import tempfile
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from tllm.core.errors import TransportError
from tllm.core.types import BlockId, Chunk, DType, Epoch, SequenceId, Step, StepId
from tllm.core.units import format_bits_per_s, format_bytes_per_s, format_seconds
from tllm.engines.base import EngineConfig
from tllm.lab.pictures import COLOURS, figure
from tllm.lab.record import Record, utc_now
from tllm.lab.statistics import median, percentile
from tllm.models.checkpoint import Checkpoint
from tllm.models.repository import EMBEDDED, resolve_model
from tllm.models.spec import Shard
from tllm.planner.cost import fit_line
from tllm.planner.pipelines import codec_pays, least_codec_bytes_per_s
from tllm.transport import rpc
from tllm.transport.codecs import CodecName, make_codec, relative_error
from tllm.transport.link_bench import STREAM_BYTES, LinkBench
from tllm.transport.link_sweep import Contents, LinkSample, Measured, Sweep, SweepSettings

EXPERIMENT = "link"
ACTIVATIONS = "activations"

_MAX_TOKENS = 512  # whose activations are computed; larger matrices repeat them with their columns in another order
AT_ONCE_BYTES = STREAM_BYTES // 2  # the rest of what a stream keeps under way is for headers, and for being early
_NEAR = 0.4  # of what a stream can carry on a round trip, from where on large messages may wait for it
_SMALL = 4.0  # times an empty message's way, that the bytes of a small matrix take at most
_MIN_SMALL = 3  # sizes that the latency is read off
_READY_S = 30.0  # for the other process of a loopback to listen
_STOP_S = 5.0


# Activations ----------------------------------------------------------------------------------------------------------


def activations(model: Path, *, dtype: DType = DType.BFLOAT16, num_threads: int | None = None) -> LinkSample:
    """What crosses between two stages: the hidden states after the first half of this model, which reads the embedded
    model's questions and answers. Raises ModelError or EngineError."""
    from tllm.engines.torch.engine import TorchEngine
    from tllm.text.tokenizer import Tokenizer

    checkpoint = Checkpoint.open(model)
    spec = checkpoint.spec
    tokens = Tokenizer.load(model).encode(_text(), add_special_tokens=True)
    tokens = tokens[: min(_MAX_TOKENS, spec.max_positions)]
    shard = Shard(first_layer=0, last_layer=max(1, spec.num_layers // 2), embed=True, head=False)
    engine = TorchEngine(EngineConfig(shard=shard, dtype=dtype, num_threads=num_threads))
    try:
        engine.load(checkpoint, lambda done, total: None)
        engine.allocate(1, len(tokens))
        chunk = Chunk(seq=SequenceId(0), start=0, tokens=tokens, blocks=(BlockId(0),))
        hidden = engine.forward(Step(id=StepId(0), epoch=Epoch(1), chunks=(chunk,)), None)
    finally:
        engine.close()
    assert hasattr(hidden, "data"), "a shard without a head answers with hidden states"
    return LinkSample(name=ACTIVATIONS, data=bytes(hidden.data), width=spec.hidden_size)


def _text() -> str:
    entries = json.loads((resolve_model(EMBEDDED) / "golden.json").read_bytes())
    return "\n".join(f"{entry['question']}\n{entry['answer']}" for entry in entries)


# The other end of a loopback ------------------------------------------------------------------------------------------


@asynccontextmanager
async def other_process() -> AsyncIterator[str]:
    """A process of its own that receives matrices at the Unix socket whose address is yielded, as the next stage on
    the same machine would. Raises TransportError when it does not come up."""
    with tempfile.TemporaryDirectory(prefix="tllm-") as directory:
        address = f"unix:{directory}/link.sock"
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", __name__, address, stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE
        )
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            try:
                async with asyncio.timeout(_READY_S):
                    said = await process.stdout.readline()
            except TimeoutError:
                said = b""
            if said != b"ready\n":
                raise TransportError(f"The process at the other end did not listen within {_READY_S:g} s.")
            yield address
        finally:
            process.stdin.close()  # it ends with its input, and so also when this process is killed
            try:
                async with asyncio.timeout(_STOP_S):
                    await process.wait()
            except TimeoutError:
                process.kill()
                await process.wait()


async def _receive_until_input_ends(address: str) -> None:
    server = rpc.Server([LinkBench()], identity=None)
    await server.start([address])
    try:
        sys.stdout.write("ready\n")
        sys.stdout.flush()
        await asyncio.to_thread(sys.stdin.read)
    finally:
        await server.aclose()


# What a sweep says ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Fit:
    """The link as a line."""

    latency_s: float  # one way
    bytes_per_s: float  # inf: the sizes that were sent are too small to tell
    stream_bytes_per_s: float  # of what is larger than AT_ONCE_BYTES, where it waits for the receiver; else inf
    residual_s: float  # root mean square of what the line misses
    relative_residual: float  # the same of each time's share that it misses
    round_trip_s: float  # of an empty message: the median
    least_round_trip_s: float

    def rate(self, num_bytes: float) -> float:
        """Bytes per second of a message of that size."""
        return self.bytes_per_s if num_bytes <= AT_ONCE_BYTES else min(self.bytes_per_s, self.stream_bytes_per_s)


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One kind of matrix over its repeats: medians, and the 95th percentile of the total."""

    rows: int
    columns: int
    contents: str
    codec: CodecName
    num_bytes: int
    ratio: float  # of bytes before to bytes after
    transmission_s: float
    compress_s: float
    decompress_s: float
    total_s: float
    p95_s: float
    repeats: int

    @property
    def bytes_per_s(self) -> float:
        return self.num_bytes / self.total_s


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """Whether a codec pays for one kind of matrix, by the line: the difference of two noisy times would say yes by
    chance."""

    row: Row
    pays: bool
    below_bytes_per_s: float  # it pays on links slower than this; 0: on none


@dataclass(frozen=True, slots=True, kw_only=True)
class LinkReport:
    ends: str
    fit: Fit
    rows: tuple[Row, ...]
    verdicts: tuple[Verdict, ...]
    losses: Mapping[str, float]  # relative error of int8 by contents
    left_out_rows: tuple[int, ...]
    columns: int
    budget_s: float
    missing: Mapping[str, str]


def report(ends: str, found: Sweep, settings: SweepSettings, contents: Sequence[Contents]) -> LinkReport:
    back_s = min(found.round_trips_s) / 2
    fit = _fit(found, settings, back_s)
    rows = tuple(_row(measured, settings, back_s) for measured in found.cells)
    return LinkReport(
        ends=ends,
        fit=fit,
        rows=rows,
        verdicts=tuple(_verdict(row, fit) for row in rows if row.codec is not CodecName.NONE),
        losses=_losses(found, settings, contents),
        left_out_rows=found.left_out_rows,
        columns=settings.columns,
        budget_s=settings.budget_s,
        missing={str(codec): why for codec, why in found.missing.items()},
    )


def _fit(found: Sweep, settings: SweepSettings, back_s: float) -> Fit:
    """The slope is that of all sizes, which the large ones rule. Their noise alone may be more than the latency, so
    that is where a line through the small sizes begins: those whose bytes do not take much longer than nothing does.

    A stream keeps so many bytes under way and no more: on a long fast link what is larger waits for the receiver, and
    the slope is the stream's. Where it comes near that, the link's own is the slope of the sizes that go at once.
    """
    least: dict[int, float] = {}
    for measured in found.cells:
        if measured.cell.codec is CodecName.NONE:
            carry_s = min(timing.carry_s for timing in measured.timings) - back_s
            num_bytes = settings.shape(measured.cell.rows).num_bytes
            least[num_bytes] = min(carry_s, least.get(num_bytes, carry_s))
    sizes, stream_bytes_per_s = sorted(least), math.inf
    slope = _slope(sizes, least)
    at_once = [size for size in sizes if size <= AT_ONCE_BYTES]
    if slope * STREAM_BYTES < 2 * back_s / _NEAR and 2 <= len(at_once) < len(sizes):
        stream_bytes_per_s = _rate(slope)
        sizes, slope = at_once, _slope(at_once, least)
    small = [size for size in sizes if slope * size <= _SMALL * back_s]
    small = sizes[: max(len(small), _MIN_SMALL)]
    latency_s = fit_line(small, [least[size] for size in small]).intercept
    misses = [least[size] - latency_s - slope * size for size in sizes]
    return Fit(
        latency_s=latency_s,
        bytes_per_s=_rate(slope),
        stream_bytes_per_s=stream_bytes_per_s,
        residual_s=_root_mean_square(misses),
        relative_residual=_root_mean_square(
            [miss / least[size] if least[size] else 0.0 for miss, size in zip(misses, sizes, strict=True)]
        ),
        round_trip_s=median(found.round_trips_s),
        least_round_trip_s=min(found.round_trips_s),
    )


def _slope(sizes: Sequence[int], seconds: Mapping[int, float]) -> float:
    return max(0.0, fit_line(sizes, [seconds[size] for size in sizes]).slope)


def _rate(slope: float) -> float:
    return 1 / slope if slope else math.inf


def _root_mean_square(values: Sequence[float]) -> float:
    return math.sqrt(math.fsum(value**2 for value in values) / len(values))


def _row(measured: Measured, settings: SweepSettings, back_s: float) -> Row:
    cell, timings = measured.cell, measured.timings
    sent_s = [timing.carry_s - back_s for timing in timings]
    totals_s = [
        timing.compress_s + there_s + timing.decompress_s for timing, there_s in zip(timings, sent_s, strict=True)
    ]
    num_bytes = settings.shape(cell.rows).num_bytes
    return Row(
        rows=cell.rows,
        columns=settings.columns,
        contents=cell.contents,
        codec=cell.codec,
        num_bytes=num_bytes,
        ratio=num_bytes / timings[0].encoded_bytes,
        transmission_s=median(sent_s),
        compress_s=median([timing.compress_s for timing in timings]),
        decompress_s=median([timing.decompress_s for timing in timings]),
        total_s=median(totals_s),
        p95_s=percentile(totals_s, 95),
        repeats=len(timings),
    )


def _verdict(row: Row, fit: Fit) -> Verdict:
    codec_bytes_per_s = row.num_bytes / (row.compress_s + row.decompress_s)
    return Verdict(
        row=row,
        pays=codec_pays(codec_bytes_per_s, fit.rate(row.num_bytes), row.ratio),
        # What a codec must do is proportional to the link's rate, so its own rate says for which link it is enough.
        below_bytes_per_s=codec_bytes_per_s / least_codec_bytes_per_s(1.0, row.ratio),
    )


def _losses(found: Sweep, settings: SweepSettings, contents: Sequence[Contents]) -> Mapping[str, float]:
    """Of the largest matrix that was sent."""
    losses: dict[str, float] = {}
    sent = [each.cell.rows for each in found.cells if each.cell.codec is CodecName.INT8]
    if sent:
        shape, codec = settings.shape(max(sent)), make_codec(CodecName.INT8)
        for each in contents:
            data = each.data[: shape.num_bytes]
            losses[each.name] = relative_error(data, codec.decode(codec.encode(data, shape), shape), shape)
    return losses


# How it is told -------------------------------------------------------------------------------------------------------


def lines(found: LinkReport) -> Iterator[str]:
    """Markdown."""
    fit = found.fit
    yield f"Link: {found.ends}"
    yield (
        f"One-way latency {fit.latency_s * 1e3:.3f} ms, bandwidth {_rate_text(fit)}; the line misses the times by "
        f"{format_seconds(fit.residual_s)}, or {fit.relative_residual:.1%} (root mean square)."
    )
    if math.isfinite(fit.stream_bytes_per_s):
        yield (
            f"Messages of more than {AT_ONCE_BYTES >> 10} KiB get {format_bits_per_s(fit.stream_bytes_per_s)} of it: "
            f"one stream keeps {STREAM_BYTES >> 20} MiB under way, and waits a round trip for the rest."
        )
    yield (
        f"Empty round trip: {fit.round_trip_s * 1e3:.3f} ms in the median, "
        f"{fit.least_round_trip_s * 1e3:.3f} ms at least."
    )
    if found.left_out_rows:
        shapes = ", ".join(f"({rows}, {found.columns})" for rows in found.left_out_rows)
        yield f"Left out, for they do not fit into {found.budget_s:g} s on this link: {shapes}"
    for codec, why in found.missing.items():
        yield f"Left out: {codec}. {why}"
    for codec in dict.fromkeys(row.codec for row in found.rows):
        yield ""
        yield f"### {codec}"
        if codec.lossy and found.losses:
            losses = ", ".join(f"{loss:.2%} of {name}" for name, loss in found.losses.items())
            yield f"Lossy; relative error (root mean square): {losses}"
        yield ""
        yield from _table(row for row in found.rows if row.codec is codec)
    if found.verdicts:
        yield ""
        yield "### Which codec pays here"
        yield ""
        yield from _verdict_table(found)


def _rate_text(fit: Fit) -> str:
    if math.isinf(fit.bytes_per_s):
        return "beyond what matrices of these sizes can tell"
    return f"{format_bits_per_s(fit.bytes_per_s)} = {format_bytes_per_s(fit.bytes_per_s)}"


_COLUMNS = (
    "Matrix Shape",
    "Data",
    "Ratio",
    "Transmission(ms)",
    "Compress(ms)",
    "Decompress(ms)",
    "Total(ms)",
    "p95(ms)",
    "Throughput(MB/s)",
)


def _table(rows: Iterator[Row]) -> Iterator[str]:
    yield from _markdown(
        _COLUMNS,
        [
            (
                f"({row.rows}, {row.columns})",
                row.contents,
                f"{row.ratio:.2f}",
                *(
                    f"{seconds * 1e3:.2f}"
                    for seconds in (row.transmission_s, row.compress_s, row.decompress_s, row.total_s, row.p95_s)
                ),
                f"{row.bytes_per_s / 1e6:.2f}",
            )
            for row in rows
        ],
    )


def _verdict_table(found: LinkReport) -> Iterator[str]:
    """By shape and contents, one column a codec."""
    codecs = tuple(dict.fromkeys(verdict.row.codec for verdict in found.verdicts))
    by_kind: dict[tuple[int, str], dict[CodecName, Verdict]] = {}
    for verdict in found.verdicts:
        by_kind.setdefault((verdict.row.rows, verdict.row.contents), {})[verdict.row.codec] = verdict
    yield from _markdown(
        ("Matrix Shape", "Data", *codecs),
        [
            (f"({rows}, {found.columns})", contents, *(_verdict_text(verdicts[codec]) for codec in codecs))
            for (rows, contents), verdicts in by_kind.items()
        ],
    )


def _verdict_text(verdict: Verdict) -> str:
    if not verdict.below_bytes_per_s:
        return "no, nowhere"
    return f"{'yes' if verdict.pays else 'no'}, below {format_bits_per_s(verdict.below_bytes_per_s)}"


def _markdown(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> Iterator[str]:
    widths = [max(len(str(row[place])) for row in (columns, *rows)) for place in range(len(columns))]
    yield "| " + " | ".join(name.ljust(width) for name, width in zip(columns, widths, strict=True)) + " |"
    yield "| " + " | ".join("-" * (width - 1) + ":" for width in widths) + " |"
    for row in rows:
        yield "| " + " | ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) + " |"


def as_json(found: LinkReport) -> str:
    return json.dumps(
        {
            "ends": found.ends,
            "fit": asdict(found.fit)
            | {
                name: rate if math.isfinite(rate) else None
                for name, rate in (
                    ("bytes_per_s", found.fit.bytes_per_s),
                    ("stream_bytes_per_s", found.fit.stream_bytes_per_s),
                )
            },
            "rows": [asdict(row) | {"bytes_per_s": row.bytes_per_s} for row in found.rows],
            "verdicts": [
                {
                    "rows": verdict.row.rows,
                    "contents": verdict.row.contents,
                    "codec": verdict.row.codec,
                    "pays": verdict.pays,
                    "below_bytes_per_s": verdict.below_bytes_per_s,
                }
                for verdict in found.verdicts
            ],
            "int8_relative_error": dict(found.losses),
            "left_out_rows": found.left_out_rows,
            "missing": dict(found.missing),
        },
        indent=1,
    )


def records(
    found: Sweep, settings: SweepSettings, *, ends: str, run: str, environment: Mapping[str, str]
) -> Iterator[Record]:
    """One for every matrix that was sent."""
    back_s, at = min(found.round_trips_s) / 2, utc_now()
    for measured in found.cells:
        cell = measured.cell
        for repeat, timing in enumerate(measured.timings):
            yield Record(
                experiment=EXPERIMENT,
                run=run,
                at=at,
                environment=environment,
                settings={
                    "ends": ends,
                    "rows": cell.rows,
                    "columns": settings.columns,
                    "dtype": str(settings.dtype),
                    "codec": str(cell.codec),
                    "contents": cell.contents,
                },
                repeat=repeat,
                seed=settings.seed,
                metrics={
                    "payload_bytes": settings.shape(cell.rows).num_bytes,
                    "encoded_bytes": timing.encoded_bytes,
                    "compress_s": timing.compress_s,
                    "transmission_s": timing.carry_s - back_s,
                    "decompress_s": timing.decompress_s,
                    "round_trip_s": 2 * back_s,
                },
            )


def draw(found: LinkReport, path: Path) -> None:
    """Total time by size, one line a codec, and the fitted line. Raises ConfigError where matplotlib is missing."""
    name = found.rows[0].contents
    with figure(
        path,
        title=f"{found.ends}: {name}",
        x_label="bytes before they are encoded",
        y_label="seconds in all",
        x_log=True,
        y_log=True,
    ) as axes:
        for colour, codec in zip(COLOURS, dict.fromkeys(row.codec for row in found.rows), strict=False):
            rows = [row for row in found.rows if row.codec is codec and row.contents == name]
            xs, ys = [row.num_bytes for row in rows], [row.total_s for row in rows]
            axes.plot(xs, ys, color=colour, label=str(codec), linestyle="-", marker="o", markersize=4)
            if codec is CodecName.NONE:
                fitted = [found.fit.latency_s + each / found.fit.bytes_per_s for each in xs]
                label = f"{found.fit.latency_s * 1e3:.3g} ms + bytes / {format_bits_per_s(found.fit.bytes_per_s)}"
                axes.plot(xs, fitted, color="#777777", label=label, linestyle="--")


if __name__ == "__main__":
    asyncio.run(_receive_until_input_ends(sys.argv[1]))
