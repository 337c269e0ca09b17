"""`tllm bench link`: what the network between two machines gives, and whether a codec pays on it.

    tllm bench link                           two processes of this machine, over a Unix socket
    tllm bench link --listen 0.0.0.0:25002    waits; prints the command for the other machine
    tllm bench link HOST:PORT --token TOKEN   that command
    tllm bench link NODE NODE                 two nodes of a running cluster, or `head` and a node

This file does not know how anything is measured.
"""

from __future__ import annotations

import asyncio
import base64
import signal
import socket
import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tllm.cli import options
from tllm.cli.nodes import Key, Url, ask, local_url
from tllm.core.config import EMBEDDED_MODEL, is_unspecified, join_address, split_address
from tllm.core.errors import ConfigError, TransportError

if TYPE_CHECKING:
    from tllm.transport.link_bench import MatrixClient
    from tllm.transport.link_sweep import LinkSample, Sweep, SweepSettings

_DEFAULT_PORT = 25002
_CONNECT_S = 10.0
_TOKEN_S = 3600.0  # that the other machine has to come


def link(
    ends: Annotated[
        list[str] | None,
        typer.Argument(help="HOST:PORT of a machine that listens, or two nodes of a cluster; none: this machine."),
    ] = None,
    listen: Annotated[
        str | None, typer.Option(help="HOST:PORT: wait here for the other machine, and print what to run there.")
    ] = None,
    token: Annotated[str | None, typer.Option(help="As the machine that listens prints it.")] = None,
    model: Annotated[
        str, typer.Option(help="Whose hidden states are sent, after half of its layers.", envvar="TLLM_MODEL")
    ] = EMBEDDED_MODEL,
    rows: Annotated[str, typer.Option(help="Of the matrices: tokens of a step.")] = "1,4,16,64,256,1024,4096",
    hidden: Annotated[int | None, typer.Option(help="Width of the matrices; the model's own by default.")] = None,
    codecs: Annotated[
        str | None, typer.Option(help="Of none, lz4, zstd, lz4-shuffled, zstd-shuffled, int8; all by default.")
    ] = None,
    repeats: Annotated[int, typer.Option(help="Matrices of each kind, after one to warm up.")] = 7,
    seconds: Annotated[float, typer.Option(help="For all of it; sizes that do not fit are left out.")] = 30.0,
    seed: Annotated[int, typer.Option(help="Of the order and of random numbers.")] = 0,
    json: Annotated[bool, typer.Option("--json", help="For programs.")] = False,
    picture: Annotated[Path | None, typer.Option(help="A PNG file to draw the times into.")] = None,
    url: Url = None,
    api_key: Key = None,
    log_level: options.Log = options.LogLevel.ERROR,
) -> None:
    """Time matrices of hidden states over a link, plain and encoded, and fit its latency and bandwidth."""
    options.set_up_logging(log_level)
    names = tuple(ends or ())
    if listen is not None:
        if names or token:
            raise ConfigError("--listen waits for the other machine: it takes neither ends nor --token.")
        asyncio.run(_listen(listen))
        return
    if token and len(names) != 1:
        raise ConfigError("--token belongs to the HOST:PORT of one machine that listens.")
    if len(names) == 1 and not token:
        raise ConfigError(
            f"{names[0]} alone is no link. Give the --token that `tllm bench link --listen` prints there, two nodes of "
            "a cluster, or nothing for this machine."
        )
    if len(names) > 2:
        raise ConfigError(f"A link has two ends; {len(names)} were given.")

    from tllm.lab.link_bench import activations
    from tllm.models.repository import resolve_model
    from tllm.transport.codecs import CodecName, parse_codec_name
    from tllm.transport.link_sweep import SweepSettings

    chosen = tuple(CodecName) if codecs is None else tuple(map(parse_codec_name, codecs.split(",")))
    sample = activations(resolve_model(model))
    settings = SweepSettings(
        rows=_numbers("--rows", rows),
        columns=sample.width if hidden is None else hidden,
        codecs=chosen if CodecName.NONE in chosen else (CodecName.NONE, *chosen),
        repeats=repeats,
        seed=seed,
        budget_s=seconds,
    )
    if len(names) == 2:
        sample = _portable(sample, settings)
        title, found = _between_nodes(names[0], names[1], settings, sample, url, api_key)
    elif names:
        assert token is not None
        title, found = asyncio.run(_towards(names[0], token, settings, sample))
    else:
        title, found = asyncio.run(_loopback(settings, sample))
    _tell(title, found, settings, sample, json=json, picture=picture)


def _numbers(flag: str, text: str) -> tuple[int, ...]:
    try:
        return tuple(sorted({int(part) for part in text.split(",")}))
    except ValueError:
        raise ConfigError(f"{flag} is {text!r}; give whole numbers such as 1,16,256.") from None


async def _swept(client: MatrixClient, settings: SweepSettings, sample: LinkSample) -> Sweep:
    from tllm.cluster.link_bench import contents_of
    from tllm.transport.link_sweep import sweep

    return await sweep(client, settings, contents_of(settings, sample))


async def _loopback(settings: SweepSettings, sample: LinkSample) -> tuple[str, Sweep]:
    from tllm.lab.link_bench import other_process
    from tllm.transport.link_bench import MatrixClient

    async with other_process() as address, MatrixClient([address], identity=None) as client:
        return "two processes of this machine, over a Unix socket", await _swept(client, settings, sample)


async def _towards(address: str, token: str, settings: SweepSettings, sample: LinkSample) -> tuple[str, Sweep]:
    from tllm.core.types import HEAD
    from tllm.transport import rpc
    from tllm.transport.link_bench import MatrixClient

    host, port = split_address(address, default_port=_DEFAULT_PORT)
    address = join_address(host, options.checked_port("The port", port))
    identity = await rpc.enrol(address, token, timeout_s=_CONNECT_S)
    async with MatrixClient([address], identity=identity, peer=HEAD, timeout_s=_CONNECT_S) as client:
        return f"this machine to {address}", await _swept(client, settings, sample)


def _portable(sample: LinkSample, settings: SweepSettings) -> LinkSample:
    """As many whole rows as may be sent to a node."""
    from tllm.transport.link_sweep import MAX_SAMPLE_BYTES

    row_bytes = sample.width * settings.dtype.num_bytes
    return replace(sample, data=sample.data[: MAX_SAMPLE_BYTES // row_bytes * row_bytes])


def _between_nodes(
    source: str, target: str, settings: SweepSettings, sample: LinkSample, url: str | None, api_key: str | None
) -> tuple[str, Sweep]:
    """The head has one node measure towards the other. Raises UnavailableError in the words of the server."""
    from pydantic import TypeAdapter, ValidationError

    from tllm.cli.client import connected
    from tllm.cluster.link_bench import PATIENCE, SETUP_S
    from tllm.transport.link_sweep import Sweep

    body = {
        "source": source,
        "target": target,
        "rows": settings.rows,
        "columns": settings.columns,
        "dtype": settings.dtype,
        "codecs": settings.codecs,
        "repeats": settings.repeats,
        "seed": settings.seed,
        "seconds": settings.budget_s,
        "sample": base64.b64encode(sample.data).decode(),
        "sample_width": sample.width,
        "sample_name": sample.name,
    }
    silence_s = PATIENCE * settings.budget_s + 3 * SETUP_S
    with connected(url or local_url(), api_key=api_key, silence_s=silence_s) as client:
        response = ask(client, "POST", "/tllm/v1/links", body)
    try:
        return f"{source} to {target}", TypeAdapter(Sweep).validate_json(response.content)
    except ValidationError as error:
        raise TransportError(
            f"{response.url} answers otherwise than this version of tllm expects. Use the server's version here."
        ) from error


async def _listen(listen: str) -> None:
    """For one machine, once."""
    host, port = split_address(listen, default_port=_DEFAULT_PORT)
    options.checked_port("--listen's port", port)
    loop = asyncio.get_running_loop()
    stop = asyncio.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stop.set)
    async with _listening(host, port) as (address, token, served):
        host, port = split_address(address, default_port=port)
        named = join_address(socket.gethostname() if is_unspecified(host) else host, port)
        print(f"Run this on the other machine, within {_TOKEN_S / 60:g} minutes and once:", flush=True)
        print(f"  tllm bench link {named} --token {token}", flush=True)
        stopping = asyncio.create_task(stop.wait())
        await asyncio.wait({served, stopping}, return_when=asyncio.FIRST_COMPLETED)
        stopping.cancel()
        print("Done." if served.done() else "Stopped; nobody can come any more.", flush=True)


@asynccontextmanager
async def _listening(host: str, port: int) -> AsyncIterator[tuple[str, str, asyncio.Task[None]]]:
    """Address, token, and what is done when one benchmark was served. The authority, and with it the token, lives as
    long as the context: who came by it belongs to no cluster."""
    from tllm.core.types import HEAD
    from tllm.transport import rpc
    from tllm.transport.link_bench import LinkBench

    with tempfile.TemporaryDirectory(prefix="tllm-") as directory:
        authority = rpc.Authority.open(Path(directory) / "authority")
        tokens = rpc.TokenStore(authority)
        bench = LinkBench()
        server = rpc.Server([rpc.Enrolment(authority, tokens), bench], identity=authority.identity(HEAD), enrols=True)
        (address,) = await server.start([join_address(host, port)])
        token = tokens.new("link benchmark", ttl_s=_TOKEN_S)

        async def serve_once() -> None:
            await bench.wait_opened()
            tokens.revoke(rpc.JoinToken.parse(token).token_id)
            await bench.wait_served()

        served = asyncio.create_task(serve_once(), name="link benchmark")
        try:
            yield address, token, served
        finally:
            served.cancel()
            await asyncio.wait({served})
            await server.aclose()


def _tell(
    title: str, found: Sweep, settings: SweepSettings, sample: LinkSample, *, json: bool, picture: Path | None
) -> None:
    import secrets

    from tllm.cluster.link_bench import contents_of
    from tllm.lab import link_bench
    from tllm.lab.environment import environment
    from tllm.lab.record import Records, records_path

    told = link_bench.report(title, found, settings, contents_of(settings, sample))
    print(link_bench.as_json(told) if json else "\n".join(link_bench.lines(told)))
    run = f"link-{secrets.token_hex(4)}"
    with Records(records_path()) as records:
        for record in link_bench.records(found, settings, ends=title, run=run, environment=environment()):
            records.add(record)
    if picture is not None:
        link_bench.draw(told, picture)
