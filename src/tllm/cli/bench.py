"""`tllm bench`: speeds, each beside the hardware's limit and, where asked, a peer measured in turns with it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated

import typer

from tllm.cli import options
from tllm.core.config import EMBEDDED_MODEL, ModelConfig, ServeConfig

if TYPE_CHECKING:
    from tllm.lab.latency import Series
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
    from tllm.lab.system import ChildSystem, Decode, Prefill
    from tllm.models.checkpoint import Checkpoint
    from tllm.models.repository import resolve_model

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
        _print_lines(console.print, f"decode, batch 1, after {context} tokens [tokens/s]", decode, limit)
        prompt = Prefill(num_tokens=prompt_tokens)
        prefill = in_turns([(system.name, _prefill_rate(system, prompt)) for system in systems], num_turns=turns)
        _print_lines(console.print, f"prefill of {prompt_tokens} tokens [tokens/s]", prefill)
        if http:
            url, name = _service(
                stack, ServeConfig(port=0, grpc_port=0, model=ModelConfig(model=model, dtype=dtype)), threads
            )
            engine, ids = systems[0], [7 * at % 256 for at in range(context)]
            series = in_turns(
                [
                    ("engine alone", _decode_rate(engine, request)),
                    ("through HTTP", lambda: stream_rate(url, name, prompt=ids, num_tokens=tokens + 1)),
                ],
                num_turns=turns,
            )
            _print_lines(console.print, "one stream [tokens/s]", series, limit)
    if pipeline:
        _pipeline(model, dtype, context=context, tokens=tokens, streams=streams, turns=turns)


def _pipeline(model: str, dtype: options.ModelDType, *, context: int, tokens: int, streams: int, turns: int) -> None:
    """Two workers, each pinned to a core of its own, in turns with one such worker."""
    from rich.console import Console

    from tllm.lab.latency import aggregate_rate, in_turns

    ids = [7 * at % 256 for at in range(context)]
    config = ServeConfig(port=0, grpc_port=0, model=ModelConfig(model=model, dtype=dtype))
    with ExitStack() as stack:
        lines = []
        for workers in (1, 2):
            local = options.node_config(threads=workers, workers=workers, pin=True)
            url, name = _service(stack, replace(config, local_node=local), None)

            def measure(url: str = url, name: str = name) -> float:
                return aggregate_rate(url, name, prompt=ids, num_tokens=tokens, num_streams=streams)

            lines.append((f"{workers} one-core worker{'s' * (workers > 1)}", measure))
        series = in_turns(lines, num_turns=turns)
    _print_lines(
        Console(highlight=False, soft_wrap=True, markup=False).print,
        f"{streams} streams together [tokens/s]",
        series[::-1],
    )


def _service(stack: ExitStack, config: ServeConfig, threads: int | None) -> tuple[str, str]:
    from tllm.cli.serving import background_service

    if threads is not None:
        config = replace(config, local_node=options.node_config(threads=threads))
    service = stack.enter_context(background_service(config, lambda event: None))
    return service.url, service.deployment.names[0]


def _decode_rate(system: ChildSystem, request: Decode) -> Callable[[], float]:
    return lambda: request.batch * request.num_steps / system.decode(request)


def _prefill_rate(system: ChildSystem, request: Prefill) -> Callable[[], float]:
    return lambda: request.num_tokens / system.prefill(request)


def _print_lines(say: Callable[[str], None], title: str, series: Sequence[Series], limit: float | None = None) -> None:
    """One line a system: median, range, share of the limit, and the first one's ratio to each other."""
    say(f"\n{title}")
    for line in series:
        share = f"   {line.median / limit:4.0%} of the limit" if limit else ""
        ratio = f"   {series[0].name} / {line.name} = {series[0].ratio_to(line):.2f}" if line is not series[0] else ""
        say(
            f"  {line.name:<18} {line.median:9.2f}   ({min(line.rates):.2f} .. {max(line.rates):.2f}, "
            f"{len(line.rates)} turns){share}{ratio}"
        )
