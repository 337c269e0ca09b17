"""`tllm bench`: speeds, each beside the hardware's limit and, where asked, a peer measured in turns with it."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING, Annotated

import typer

from tllm.cli import bench_link, bench_serve, options
from tllm.core.config import EMBEDDED_MODEL
from tllm.core.types import DType, Quantization

if TYPE_CHECKING:
    from tllm.lab.accuracy import Divergence
    from tllm.lab.inside import Part
    from tllm.lab.latency import Series
    from tllm.lab.server import Server
    from tllm.lab.system import ChildSystem, Decode, Prefill

_BUS = "the memory bus"  # reading a step's bytes and doing nothing with them
_FORMS = ("int8", "int4-g32", "int4", "int4-g128")

app = typer.Typer(
    help="Measure speeds beside the hardware's limits, and what weights of fewer bits cost.", no_args_is_help=True
)
app.command("link")(bench_link.link)
app.command("serve")(bench_serve.serve)


@app.command()
def latency(
    model: options.Model = EMBEDDED_MODEL,
    prompt_tokens: Annotated[int, typer.Option(help="Of the measured prefill.")] = 128,
    context: Annotated[int, typer.Option(help="Tokens before the measured decode steps.")] = 64,
    tokens: Annotated[int, typer.Option(help="Decoded in every turn.")] = 16,
    turns: Annotated[int, typer.Option(help="Counted ones, after one to warm up.")] = 5,
    against: Annotated[str | None, typer.Option(help="A peer measured in turns: transformers.")] = None,
    profile: Annotated[bool, typer.Option("--profile", help="Where the time of a decode step goes.")] = False,
    http: Annotated[bool, typer.Option("--http", help="Also one stream through the API, in turns.")] = False,
    pipeline: Annotated[
        bool, typer.Option("--pipeline", help="Also two one-core workers against one, --streams requests at once.")
    ] = False,
    streams: Annotated[int, typer.Option(help="Requests at once for --pipeline.")] = 16,
    dtype: options.ModelDType = None,
    quantize: options.Quantize = None,
    threads: options.Threads = None,
    log_level: options.Log = options.LogLevel.ERROR,
) -> None:
    """Decode and prefill of one model on this machine: engine alone, through HTTP, through a pipeline."""
    options.set_up_logging(log_level)
    from rich.console import Console

    from tllm.cluster.machine import num_processors
    from tllm.core.units import format_bytes
    from tllm.lab.latency import in_turns, stream_rate
    from tllm.lab.server import serving
    from tllm.lab.system import ChildSystem, Decode, Prefill
    from tllm.models.checkpoint import Checkpoint
    from tllm.models.repository import resolve_model

    quantization = options.quantization(quantize)
    arguments = [model, *(["--dtype", dtype] if dtype else []), *(["--quantize", quantize] if quantize else [])]
    console = Console(highlight=False, soft_wrap=True, markup=False)
    num_threads = threads or num_processors()
    directory = resolve_model(model)
    checkpoint = Checkpoint.open(directory)
    served_dtype = dtype or checkpoint.dtype
    spec = checkpoint.spec
    kv_bytes = spec.kv_bytes_per_position(spec.num_layers, served_dtype) * (context + tokens // 2)
    with ExitStack() as stack:
        engine = stack.enter_context(ChildSystem("tllm", directory, served_dtype, num_threads, quantization))
        peers = [stack.enter_context(ChildSystem(against, directory, served_dtype, num_threads))] if against else []
        step_bytes = engine.step_bytes()
        console.print(
            f"{model}: {quantization or served_dtype}, {num_threads} threads; "
            f"a decode step reads {format_bytes(step_bytes + kv_bytes)}"
        )

        def bus() -> float:
            return engine.bandwidth(num_threads) / (step_bytes + kv_bytes)

        request = Decode(batch=1, context=context, num_steps=tokens)
        decode = in_turns(
            [*((system.name, _decode_rate(system, request)) for system in (engine, *peers)), (_BUS, bus)],
            num_turns=turns,
        )
        _print_lines(console.print, f"decode, batch 1, after {context} tokens [tokens/s]", decode)
        prompt = Prefill(num_tokens=prompt_tokens)
        prefill = in_turns(
            [(system.name, _prefill_rate(system, prompt)) for system in (engine, *peers)], num_turns=turns
        )
        _print_lines(console.print, f"prefill of {prompt_tokens} tokens [tokens/s]", prefill)
        if profile:
            bandwidth = engine.bandwidth(num_threads)
            parts = engine.profile(Decode(batch=1, context=context, num_steps=tokens * turns))
            console.print("\n" + "\n".join(_profile_lines(parts, bandwidth)))
        if http:
            server = stack.enter_context(serving([*arguments, "--threads", str(num_threads)]))
            ids = [7 * at % 256 for at in range(context)]
            series = in_turns(
                [
                    ("through HTTP", lambda: stream_rate(server.url, server.model, prompt=ids, num_tokens=tokens + 1)),
                    ("engine alone", _decode_rate(engine, request)),
                    (_BUS, bus),
                ],
                num_turns=turns,
            )
            _print_lines(console.print, "one stream [tokens/s]", series)
            through, alone, _ = series
            outside_s = [1 / one - 1 / other for one, other in zip(through.rates, alone.rates, strict=True)]
            console.print(
                f"  a token takes {1e3 / through.median:.3g} ms, "
                f"of them outside of the engine {1e3 * statistics.median(outside_s):.3g} ms"
            )
    if pipeline:
        series = _pipeline(arguments, step_bytes, context=context, tokens=tokens, streams=streams, turns=turns)
        _print_lines(console.print, f"{streams} streams together [tokens/s]", series)


@app.command()
def accuracy(
    model: options.Model = EMBEDDED_MODEL,
    threads: options.Threads = None,
    log_level: options.Log = options.LogLevel.ERROR,
) -> None:
    """What weights of fewer bits do to a model's answers: every form beside the checkpoint's own."""
    options.set_up_logging(log_level)
    from tllm.lab.accuracy import divergence, engine_logits, lines, texts_of
    from tllm.models.checkpoint import Checkpoint
    from tllm.models.repository import resolve_model

    directory = resolve_model(model)
    dtype, texts = Checkpoint.open(directory).dtype, texts_of(directory)
    plain = list(engine_logits(directory, texts, dtype=dtype, num_threads=threads))

    def measured(form: str) -> tuple[str, str, Divergence]:
        quantization = Quantization.parse(form)
        logits = engine_logits(directory, texts, dtype=dtype, quantization=quantization, num_threads=threads)
        return form, dtype.value, divergence(plain, list(logits))

    print("\n".join(lines([measured(form) for form in _FORMS])))


def _pipeline(
    arguments: list[str], step_bytes: int, *, context: int, tokens: int, streams: int, turns: int
) -> list[Series]:
    """Two workers, each pinned to a core of its own, in turns with one such worker.

    For a token of every stream one worker reads the weights once. Two do so twice, for half of the streams each.
    """
    from tllm.lab.latency import aggregate_rate, in_turns
    from tllm.lab.server import serving
    from tllm.lab.system import ChildSystem
    from tllm.models.repository import resolve_model

    ids = [7 * at % 256 for at in range(context)]
    with ExitStack() as stack:
        lines: list[tuple[str, Callable[[], float]]] = []
        for workers in ("2", "1"):
            server = stack.enter_context(serving([*arguments, "--workers", workers, "--threads", workers, "--pin"]))

            def measure(server: Server = server) -> float:
                return aggregate_rate(server.url, server.model, prompt=ids, num_tokens=tokens, num_streams=streams)

            lines.append((f"{workers} one-core worker{'s' * (workers != '1')}", measure))
        reader = stack.enter_context(ChildSystem("memory", resolve_model(EMBEDDED_MODEL), DType.BFLOAT16, 2))
        lines.append(("bus for two cores", lambda: reader.bandwidth(2) / step_bytes * streams / 2))
        lines.append(("bus for one core", lambda: reader.bandwidth(1) / step_bytes * streams))
        return in_turns(lines, num_turns=turns)


def _decode_rate(system: ChildSystem, request: Decode) -> Callable[[], float]:
    return lambda: request.batch * request.num_steps / system.decode(request)


def _prefill_rate(system: ChildSystem, request: Prefill) -> Callable[[], float]:
    return lambda: request.num_tokens / system.prefill(request)


def _print_lines(say: Callable[[str], None], title: str, series: Sequence[Series]) -> None:
    """One line a system: median, range, share of what the memory bus allows in the same turns, ratio of the first."""
    say(f"\n{title}")
    bus = next((line for line in series if line.name == _BUS), None)
    for line in series:
        share = f"   {line.ratio_to(bus):4.0%} of it" if bus is not None and line is not bus else ""
        ratio = f"   {series[0].name} / {line.name} = {series[0].ratio_to(line):.2f}" if line is not series[0] else ""
        say(
            f"  {line.name:<18} {line.median:9.2f}   ({min(line.rates):.2f} .. {max(line.rates):.2f}, "
            f"{len(line.rates)} turns){share}{ratio if line is not bus else ''}"
        )


def _profile_lines(parts: Sequence[Part], bandwidth: float) -> Iterator[str]:
    """A step's time by kind of operation, and for those that read much, how near to the memory's speed they do."""
    total_s, total_bytes = sum(part.seconds for part in parts), sum(part.num_bytes for part in parts)
    yield f"a decode step   [plain reads: {bandwidth / 1e9:.1f} GB/s]"
    yield f"  {'':<22}{'ms':>9}{'of the step':>13}{'MB read':>10}{'GB/s':>8}{'of the bus':>12}"
    for name, seconds, num_bytes in (
        *((part.name, part.seconds, part.num_bytes) for part in parts),
        ("the step", total_s, total_bytes),
    ):
        reading = ""
        if num_bytes:
            speed = num_bytes / seconds
            reading = f"{num_bytes / 1e6:>10.1f}{speed / 1e9:>8.1f}{speed / bandwidth:>12.0%}"
        yield f"  {name:<22}{seconds * 1e3:>9.3f}{seconds / total_s:>13.1%}{reading}"
