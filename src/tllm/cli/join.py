"""`tllm join`: this machine computes for a head on another one, until Ctrl-C."""

from __future__ import annotations

import asyncio
import contextlib
import signal
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

import typer

from tllm.cli import options
from tllm.core.config import DEFAULT_GRPC_PORT, Deadlines, NodeConfig, is_loopback, join_address, split_address
from tllm.core.errors import ConfigError

_ANSWER_S = 1.0  # for a connection to one of a head's addresses
_FIND_S = 3.0  # for heads to answer on the network


def join(
    context: typer.Context,
    address: Annotated[
        str | None,
        typer.Argument(help="HOST:PORT of the head, as it prints them; looked for on the network by default."),
    ] = None,
    token: Annotated[
        str | None, typer.Option(help="As the head prints it; not needed on its own machine.", envvar="TLLM_TOKEN")
    ] = None,
    cluster: Annotated[
        str | None, typer.Option(help="Only a head of that cluster, where none is named.", envvar="TLLM_CLUSTER")
    ] = None,
    name: Annotated[str | None, typer.Option(help="Of this machine; its host name by default.")] = None,
    workers: options.Workers = 1,
    threads: options.Threads = None,
    device: options.Device = "cpu",
    memory: options.Memory = None,
    pin: options.Pin = False,
    listen: Annotated[
        str | None, typer.Option(help="Where this machine's workers listen; where it faces the head by default.")
    ] = None,
    advertise: Annotated[
        str | None, typer.Option(help="What other machines call this one, where that is another address.")
    ] = None,
    ports: options.Ports = None,
    silence: options.Silence = None,
    log_level: options.Log = options.LogLevel.WARNING,
) -> None:
    """Give this machine's memory and processors to the head at ADDRESS."""
    options.set_up_logging(log_level)
    if address is not None:
        host, port = split_address(address, default_port=DEFAULT_GRPC_PORT)
        options.checked_port("The port of ADDRESS", port)
        address = join_address(host, port)
        options.refuse_beside("an ADDRESS", context, "cluster")
    config = options.node_config(
        name=name,
        threads=threads,
        memory=memory,
        device=device,
        workers=workers,
        pin=pin,
        listen=listen,
        advertise=advertise,
        ports=ports,
    )
    run_node(address, token, config, cluster=cluster, deadlines=options.deadlines(silence))


def run_node(
    address: str | None,
    token: str | None,
    config: NodeConfig,
    *,
    cluster: str | None = None,
    deadlines: Deadlines | None = None,
) -> None:
    """Compute for the head at `address` (HOST:PORT; None: one that is found) until Ctrl-C or until it lets this
    machine go. Raises ConfigError when none is found, TransportError when it cannot be reached or refuses."""
    asyncio.run(_join(address, token, config, cluster, deadlines or Deadlines()))


@dataclass(frozen=True, slots=True, kw_only=True)
class _Target:
    address: str
    token: str | None  # None: at a Unix socket
    pin: str


async def _join(
    address: str | None, token: str | None, config: NodeConfig, cluster: str | None, deadlines: Deadlines
) -> None:
    from tllm.cluster.agent import Agent, own_identity
    from tllm.cluster.enrolled import place

    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stop.set)
    stopping = asyncio.create_task(stop.wait())
    target = await _find(address, token, cluster)
    with place() as own_place:
        identity = await own_identity(
            target.address, token=target.token, pin=target.pin, place=own_place, deadlines=deadlines
        )
        agent = Agent(config, address=target.address, identity=identity, deadlines=deadlines, tell=_say)
        async with agent.attached() as serving:
            where = "the head on this machine" if target.token is None else target.address
            _say(f"Joined {where} as {identity.name}. Ctrl-C leaves.")
            await asyncio.wait({serving, stopping}, return_when=asyncio.FIRST_COMPLETED)
            if serving.done():
                _say(f"Left: {serving.result()}.")
    stopping.cancel()


async def _find(address: str | None, token: str | None, cluster: str | None) -> _Target:
    """Whom to join, and with what. Raises ConfigError saying what is missing."""
    from tllm.cluster.discovery import find_heads
    from tllm.cluster.local import local_heads
    from tllm.core.config import state_directory
    from tllm.transport import rpc

    if address is None and token is None and (heads := local_heads(cluster)):
        if len(heads) > 1:
            names = ", ".join(f"{head.cluster} at {head.grpc_address}" for head in heads)
            raise ConfigError(f"Several heads run on this machine: {names}. Name one by its address, or --cluster.")
        return _Target(address=heads[0].control, token=None, pin=heads[0].pin)
    if address is None:
        found = await find_heads(cluster=cluster, timeout_s=_FIND_S)
        if not found:
            where = f" of cluster {cluster}" if cluster else ""
            raise ConfigError(
                f"No head{where} answered on this network. Networks often drop what machines call out to all others: "
                "join by address, with the line that `tllm serve` prints on the head."
            )
        if len({head.fingerprint for head in found}) > 1:
            names = ", ".join(sorted({head.cluster for head in found}))
            raise ConfigError(f"Several heads answered, of {names}. Name one with --cluster, or by its address.")
        address = await _first_that_answers([one for head in found for one in head.join_addresses])
    if token is None:
        if not is_loopback(split_address(address, default_port=DEFAULT_GRPC_PORT)[0]) and not local_heads():
            raise ConfigError(
                f"Joining {address} needs a token. `tllm serve` prints it on the head: give it with --token, or set "
                "TLLM_TOKEN."
            )
        token = rpc.TokenStore(rpc.Authority.open(state_directory() / "cluster")).default()
    return _Target(address=address, token=token, pin=rpc.JoinToken.parse(token).pin.hex())


async def _first_that_answers(addresses: Sequence[str]) -> str:
    """Of the several addresses of one head; the first where none does, for the error that comes of it."""
    for address in addresses:
        host, port = split_address(address, default_port=DEFAULT_GRPC_PORT)
        with contextlib.suppress(OSError):  # also a timeout
            async with asyncio.timeout(_ANSWER_S):
                _, writer = await asyncio.open_connection(host, port)
            writer.close()
            return address
    return addresses[0]


def _say(line: str) -> None:
    print(line, flush=True)
