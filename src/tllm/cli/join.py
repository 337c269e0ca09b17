"""`tllm join`: this machine computes for a head on another one, until Ctrl-C."""

from __future__ import annotations

import asyncio
import signal
from typing import Annotated

import typer

from tllm.cli import options
from tllm.core.config import DEFAULT_GRPC_PORT, Deadlines, NodeConfig, join_address, split_address


def join(
    address: Annotated[str, typer.Argument(help="HOST:PORT of the head, as it prints them.")],
    token: Annotated[
        str | None, typer.Option(help="As the head prints it; not needed on its own machine.", envvar="TLLM_TOKEN")
    ] = None,
    name: Annotated[str | None, typer.Option(help="Of this machine; its host name by default.")] = None,
    workers: options.Workers = 1,
    threads: options.Threads = None,
    device: options.Device = "cpu",
    memory: options.Memory = None,
    pin: options.Pin = False,
    log_level: options.Log = options.LogLevel.WARNING,
) -> None:
    """Give this machine's memory and processors to the head at ADDRESS."""
    options.set_up_logging(log_level)
    host, port = split_address(address, default_port=DEFAULT_GRPC_PORT)
    options.checked_port("The port of ADDRESS", port)
    config = options.node_config(name=name, threads=threads, memory=memory, device=device, workers=workers, pin=pin)
    asyncio.run(_join(join_address(host, port), token, config))


async def _join(address: str, token: str | None, config: NodeConfig) -> None:
    from tllm.cluster.agent import Agent
    from tllm.cluster.head import join_token

    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stop.set)
    agent = Agent(config, token=token or join_token(), deadlines=Deadlines())
    async with agent.attached(address) as serving:
        print(f"Joined {address}. Ctrl-C leaves.", flush=True)
        stopping = asyncio.create_task(stop.wait())
        await asyncio.wait({serving, stopping}, return_when=asyncio.FIRST_COMPLETED)
        stopping.cancel()
        if serving.done():
            print(f"Left: {serving.result()}.", flush=True)
