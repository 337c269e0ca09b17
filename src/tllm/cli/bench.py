"""`tllm bench`: speeds, each beside the hardware's limit and, where asked, a peer measured in turns with it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING, Annotated

import typer

from tllm.cli import options
from tllm.core.config import EMBEDDED_MODEL

if TYPE_CHECKING:
    from tllm.lab.latency import Series
    from tllm.lab.server import Server
    from tllm.lab.system import ChildSystem, Decode, Prefill

app = typer.Typer(help="Measure speeds beside the hardware's limits.", no_args_is_help=True)


@app.callback()
def bench() -> None:
    """Keeps `latency` a verb of its own while it is the only one."""


@app.command()
def latency(
    model: options.Model = EMBEDDED_MODEL,
    prompt_tokens: Annotated[int, typer.Option(help="Of the measured prefill.")] = 128,
    context: Annotated[int, typer.Option(help="Tokens before the measured decode steps.")] = 64,
    tokens: Annotated[int, typer.Option(help="Decoded in every turn.")] = 16,
    turns: Annotated[int, typer.Option(help="Counted ones, after one to warm up.")] = 5,
    against: Annotated[str | None, typer.Option(help="A peer measured in turns: transformers.")] = None,
    http: Annotated[bool, typer.Option("--http", help="Also one stream through the API, in turns.")] = False,
    pipeline: Annotated[
        bool, typer.Option("--pipeline", help="Also two one-core workers against one, --streams requests at once.")
    ] = False,
    streams: Annotated[int, typer.Option(help="Requests at once for --pipeline.")] = 16,
    dtype: options.ModelDType = None,
    threads: options.Threads = None,
    log_level: options.Log = options.LogLevel.ERROR,
) -> None:
    """Decode and prefill of one model on this machine: engine alone, through HTTP, through a pipeline."""
    options.set_up_logging(log_level)
    from rich.console import Console

    from tllm.cluster.agent import num_processors
    from tllm.cluster.head import model_profile
    from tllm.core.units import format_bytes
    from tllm.lab.latency import in_turns, stream_rate
    from tllm.lab.server import serving
    from tllm.lab.system import ChildSystem, Decode, Prefill
    from tllm.models.checkpoint import Checkpoint
    from tllm.models.repository import resolve_model

    arguments = [model, *(["--dtype", dtype] if dtype else [])]
    console = Console(highlight=False, soft_wrap=True, markup=False)
    num_threads = threads or num_processors()
    directory = resolve_model(model)
    checkpoint = Checkpoint.open(directory)
    served_dtype = dtype or checkpoint.dtype
    profile = model_profile(checkpoint, served_dtype, model)
    step_bytes = profile.read_bytes(0, profile.num_layers)
    kv_bytes = profile.kv_bytes_per_position * profile.num_layers * (context + tokens // 2)
    names = ["tllm"] + ([against] if against else [])
    with ExitStack() as stack:
        systems = [stack.enter_context(ChildSystem(name, directory, served_dtype, num_threads)) for name in names]
        bandwidth = systems[0].bandwidth(num_threads)
        limit = bandwidth / (step_bytes + kv_bytes)
        console.print(
            f"{model}: {served_dtype}, {num_threads} threads. Memory reads {format_bytes(bandwidth)}/s; a decode step "
            f"reads {format_bytes(step_bytes + kv_bytes)}, so that at most {limit:.2f} steps/s are possible."
        )
        request = Decode(batch=1, context=context, num_steps=tokens)
        decode = in_turns([(system.name, _decode_rate(system, request)) for system in systems], num_turns=turns)
        title = f"decode, batch 1, after {context} tokens [tokens/s]"
        _print_lines(console.print, title, decode, (limit,) * len(decode))
        prompt = Prefill(num_tokens=prompt_tokens)
        prefill = in_turns([(system.name, _prefill_rate(system, prompt)) for system in systems], num_turns=turns)
        _print_lines(console.print, f"prefill of {prompt_tokens} tokens [tokens/s]", prefill)
        if http:
            server = stack.enter_context(serving([*arguments, "--threads", str(num_threads)]))
            engine, ids = systems[0], [7 * at % 256 for at in range(context)]
            series = in_turns(
                [
                    ("through HTTP", lambda: stream_rate(server.url, server.model, prompt=ids, num_tokens=tokens + 1)),
                    ("engine alone", _decode_rate(engine, request)),
                ],
                num_turns=turns,
            )
            _print_lines(console.print, "one stream [tokens/s]", series, (limit, limit))
        bandwidths = (systems[0].bandwidth(1), systems[0].bandwidth(2)) if pipeline else None
    if bandwidths is not None:
        console.print(
            f"\nOne core reads {format_bytes(bandwidths[0])}/s, two together {format_bytes(bandwidths[1])}/s. "
            "One worker reads the weights once for a token of every stream; two do so twice, for half of them each."
        )
        series = _pipeline(arguments, context=context, tokens=tokens, streams=streams, turns=turns)
        limits = (bandwidths[1] / 2 * streams / step_bytes, bandwidths[0] * streams / step_bytes)
        _print_lines(console.print, f"{streams} streams together [tokens/s]", series, limits)


def _pipeline(arguments: list[str], *, context: int, tokens: int, streams: int, turns: int) -> list[Series]:
    """Two workers, each pinned to a core of its own, in turns with one such worker."""
    from tllm.lab.latency import aggregate_rate, in_turns
    from tllm.lab.server import serving

    ids = [7 * at % 256 for at in range(context)]
    with ExitStack() as stack:
        lines = []
        for workers in ("2", "1"):
            server = stack.enter_context(serving([*arguments, "--workers", workers, "--threads", workers, "--pin"]))

            def measure(server: Server = server) -> float:
                return aggregate_rate(server.url, server.model, prompt=ids, num_tokens=tokens, num_streams=streams)

            lines.append((f"{workers} one-core worker{'s' * (workers != '1')}", measure))
        return in_turns(lines, num_turns=turns)


def _decode_rate(system: ChildSystem, request: Decode) -> Callable[[], float]:
    return lambda: request.batch * request.num_steps / system.decode(request)


def _prefill_rate(system: ChildSystem, request: Prefill) -> Callable[[], float]:
    return lambda: request.num_tokens / system.prefill(request)


def _print_lines(
    say: Callable[[str], None], title: str, series: Sequence[Series], limits: Sequence[float] = ()
) -> None:
    """One line a system: median, range, share of what memory allows, and the first one's ratio to each other."""
    say(f"\n{title}")
    for index, line in enumerate(series):
        share = f"   {line.median / limits[index]:4.0%} of {limits[index]:.1f}" if limits else ""
        ratio = f"   {series[0].name} / {line.name} = {series[0].ratio_to(line):.2f}" if index else ""
        say(
            f"  {line.name:<18} {line.median:9.2f}   ({min(line.rates):.2f} .. {max(line.rates):.2f}, "
            f"{len(line.rates)} turns){share}{ratio}"
        )
