"""`tllm serve`: a head, up until Ctrl-C."""

from __future__ import annotations

import asyncio
import signal
import socket
from typing import TYPE_CHECKING, Annotated

import typer

from tllm.cli import options
from tllm.core.config import (
    DEFAULT_BLOCK_SIZE,
    DEFAULT_CLUSTER,
    DEFAULT_GRPC_PORT,
    DEFAULT_HTTP_PORT,
    DEFAULT_MAX_BATCH_TOKENS,
    EMBEDDED_MODEL,
    ServeConfig,
    is_loopback,
    is_unspecified,
    join_address,
    split_address,
)

if TYPE_CHECKING:
    from rich.console import Console

    from tllm.cli.serving import Service
    from tllm.cluster.events import Listening


def serve(
    context: typer.Context,
    model: options.Model = EMBEDDED_MODEL,
    host: Annotated[str, typer.Option(help="Where HTTP and nodes are listened for.", envvar="TLLM_HOST")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="HTTP; 0 takes any free one.", envvar="TLLM_PORT")] = DEFAULT_HTTP_PORT,
    grpc_port: Annotated[int, typer.Option(help="For nodes.", envvar="TLLM_GRPC_PORT")] = DEFAULT_GRPC_PORT,
    workers: options.Workers = 1,
    nodes: Annotated[int | None, typer.Option(help="Wait for that many nodes, this one included.")] = None,
    use_all: Annotated[
        bool, typer.Option("--use-all", help="Every node gets a part of the model, also where that is slower.")
    ] = False,
    streams: Annotated[int, typer.Option(help="Answers at once that the plan is to be best for.")] = 1,
    cluster: Annotated[
        str, typer.Option(help="Its name, by which nodes find it.", envvar="TLLM_CLUSTER")
    ] = DEFAULT_CLUSTER,
    no_local: Annotated[bool, typer.Option("--no-local", help="This machine computes nothing.")] = False,
    name: Annotated[str | None, typer.Option(help="Of this machine; its host name by default.")] = None,
    dtype: options.ModelDType = None,
    quantize: options.Quantize = None,
    device: options.Device = "cpu",
    threads: options.Threads = None,
    memory: options.Memory = None,
    pin: options.Pin = False,
    ports: options.Ports = None,
    max_model_len: options.MaxModelLen = None,
    kv_memory: options.KVMemory = None,
    block_size: options.BlockSize = DEFAULT_BLOCK_SIZE,
    max_batch_tokens: options.MaxBatchTokens = DEFAULT_MAX_BATCH_TOKENS,
    served_model_name: Annotated[
        list[str] | None, typer.Option(help="What clients ask for; may be given several times.")
    ] = None,
    api_key: Annotated[str | None, typer.Option(help="Clients must show it.", envvar="TLLM_API_KEY")] = None,
    insecure: Annotated[
        bool, typer.Option("--insecure", help="Answer everybody who reaches HTTP, without a key.")
    ] = False,
    seed: options.Seed = None,
    silence: options.Silence = None,
    log_level: options.Log = options.LogLevel.WARNING,
) -> None:
    """Serve a model to OpenAI-compatible clients, from this machine and those that join."""
    options.set_up_logging(log_level)
    if no_local:
        options.refuse_beside("--no-local", context, "workers", "threads", "memory", "device", "pin", "name", "ports")
    config = ServeConfig(
        host=host,
        port=options.checked_port("--port", port),
        grpc_port=options.checked_port("--grpc-port", grpc_port),
        cluster=cluster,
        api_key=api_key,
        insecure=insecure,
        model=options.model_config(
            model=model,
            served_names=tuple(served_model_name or ()),
            dtype=dtype,
            quantize=quantize,
            max_model_len=max_model_len,
            kv_memory=kv_memory,
            block_size=block_size,
            max_batch_tokens=max_batch_tokens,
            seed=seed,
        ),
        local_node=None
        if no_local
        else options.node_config(
            name=name, threads=threads, memory=memory, device=device, workers=workers, pin=pin, ports=ports
        ),
        num_nodes=nodes,
        use_all=use_all,
        streams=streams,
        deadlines=options.deadlines(silence),
    )
    run_server(config)


def run_server(config: ServeConfig) -> None:
    """Serve until Ctrl-C. Raises what kept the model from being served."""
    from tllm.models.repository import resolve_headers, resolve_model

    computes = config.local_node is not None
    (resolve_model if computes else resolve_headers)(
        config.model.model
    )  # a download happens here, where Ctrl-C still ends it
    asyncio.run(_serve(config))


async def _serve(config: ServeConfig) -> None:
    from rich.console import Console
    from rich.text import Text

    from tllm.cli.serving import serving
    from tllm.cli.view import StartView
    from tllm.cluster.events import HeadEvent, Listening, Serving

    console = Console()
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stop.set)
    ready = asyncio.Event()

    with StartView(console) as view:

        def observe(event: HeadEvent) -> None:
            view(event)
            if isinstance(event, Listening):
                console.print(Text(_how_to_join(config, event)), soft_wrap=True)
            if isinstance(event, Serving):
                ready.set()

        async with serving(config, observe) as service:
            waits = [asyncio.create_task(event.wait()) for event in (ready, stop)]
            await asyncio.wait({*waits, service.serving}, return_when=asyncio.FIRST_COMPLETED)
            if ready.is_set():
                _invite(console, config, service)
                await asyncio.wait({waits[1], service.serving}, return_when=asyncio.FIRST_COMPLETED)
            for wait in waits:
                wait.cancel()
            if stop.is_set():
                console.print("Finishing what runs; Ctrl-C again stops at once.")
                for number in (signal.SIGINT, signal.SIGTERM):
                    loop.remove_signal_handler(number)
                draining = asyncio.create_task(service.deployment.drain(config.deadlines.drain_s))
                for number in (signal.SIGINT, signal.SIGTERM):
                    loop.add_signal_handler(number, draining.cancel)
                await asyncio.wait({draining})
            else:
                service.serving.result()


def _how_to_join(config: ServeConfig, event: Listening) -> str:
    """The line to paste on another machine; on this one the token is at hand."""
    host, port = split_address(event.grpc_address, default_port=config.grpc_port)
    if is_loopback(host):
        return f"Nodes of this machine can join: tllm join {join_address(host, port)}"
    if is_unspecified(host):
        host = socket.gethostname()
    return f"On another machine: tllm join {join_address(host, port)} --token {event.token}"


def _invite(console: Console, config: ServeConfig, service: Service) -> None:
    """Never wrapped: people copy these lines, and programs read them."""
    from rich.text import Text

    name = service.deployment.names[0]
    key = f' -H "Authorization: Bearer {config.api_key}"' if config.api_key else ""
    body = f'{{"model": "{name}", "messages": [{{"role": "user", "content": "What is tllm?"}}]}}'
    curl = f"curl {service.url}/v1/chat/completions{key} -H 'content-type: application/json' -d '{body}'"
    console.print(Text.assemble("\n", ("API", "bold"), f"   {service.url}/v1   model {name}\n"), soft_wrap=True)
    console.print(Text(f"{curl}\n"), soft_wrap=True)
