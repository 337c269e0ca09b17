"""`tllm.server` and `tllm.client`: the commands of tllm's first version, mapped onto `tllm serve` and `tllm join`.

    tllm.server --is_local --client_size 2       one machine, cut into 2 stages
    tllm.server --client_size 2                  a head that computes nothing itself and waits for 2 nodes
    tllm.client --hostname http://HEAD:8022      a node; the head's HTTP port says where nodes join
    --config FILE                                the same from a file, in which the clients are counted

Rules:
    What an option meant it means here. One that would have no effect is refused.
    A file and a flag never say the same thing.

This file does not know how a model is served, nor what a node does after it has joined.
"""

from __future__ import annotations

import ipaddress
import json
import socket
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, TypeVar

import typer

from tllm.cli import options
from tllm.cli.reporting import reported
from tllm.core.config import (
    DEFAULT_GRPC_PORT,
    DEFAULT_HTTP_PORT,
    ModelConfig,
    NodeConfig,
    ServeConfig,
    is_loopback,
    join_address,
    split_address,
)
from tllm.core.errors import ConfigError, TransportError

_ANSWER_S = 10.0

_T = TypeVar("_T")
_D = TypeVar("_D")


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerEntry:
    """`server` of a configuration file."""

    hostname: str
    http_port: int
    grpc_port: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ClientEntry:
    """One of `client`: how others call that machine, and the first of the ports that it takes."""

    hostname: str
    grpc_port: int | None


@dataclass(frozen=True, slots=True, kw_only=True)
class ClusterFile:
    server: ServerEntry
    clients: tuple[ClientEntry, ...]


def server_main() -> None:
    """Entry point of `tllm.server`."""
    with reported():
        _server_app()


def client_main() -> None:
    """Entry point of `tllm.client`."""
    with reported():
        _client_app()


Config = Annotated[Path | None, typer.Option("--config", help="A file such as examples/config.json, instead of flags.")]
Debug = Annotated[bool, typer.Option("--is_debug", help="Say more on stderr.")]


def server(
    context: typer.Context,
    model_path: Annotated[str, typer.Option("--model_path", help="A directory, a hub id, or the embedded model.")],
    hostname: Annotated[
        str, typer.Option("--hostname", help="Where clients reach this machine; localhost: from here only.")
    ] = "localhost",
    is_local: Annotated[bool, typer.Option("--is_local", help="Compute on this machine alone.")] = False,
    client_size: Annotated[
        int | None,
        typer.Option("--client_size", help="Parts of the model: nodes to wait for, or with --is_local here."),
    ] = None,
    http_port: Annotated[int, typer.Option("--http_port", help="Of the API.")] = DEFAULT_HTTP_PORT,
    grpc_port: Annotated[int, typer.Option("--grpc_port", help="For nodes.")] = DEFAULT_GRPC_PORT,
    config: Config = None,
    api_key: Annotated[
        str | None, typer.Option("--api-key", "--api_key", help="Clients must show it.", envvar="TLLM_API_KEY")
    ] = None,
    insecure: Annotated[
        bool, typer.Option("--insecure", help="Let everybody who reaches --hostname use the model.")
    ] = False,
    is_debug: Debug = False,
) -> None:
    """Serve a model, as tllm's first version was told to. New: tllm serve."""
    options.set_up_logging(options.LogLevel.DEBUG if is_debug else options.LogLevel.WARNING)
    if config is not None:
        _refuse_beside("--config", context, "hostname", "is_local", "client_size", "http_port", "grpc_port")
        file = read_config(config)
        hostname, http_port, grpc_port = file.server.hostname, file.server.http_port, file.server.grpc_port
        client_size = len(file.clients)
    made = server_config(
        model_path=model_path,
        hostname=hostname,
        is_local=is_local,
        client_size=client_size,
        http_port=http_port,
        grpc_port=grpc_port,
        api_key=api_key,
        insecure=insecure,
    )
    from tllm.cli.serve import run_server

    run_server(made)


def client(
    context: typer.Context,
    hostname: Annotated[
        str | None,
        typer.Option(
            "--hostname", help="http://HOST:8022 of the server; beside --master_addr, this machine's address."
        ),
    ] = None,
    master_addr: Annotated[str | None, typer.Option("--master_addr", help="http://HOST:8022 of the server.")] = None,
    grpc_port: Annotated[
        int | None, typer.Option("--grpc_port", help="Of this node, and the next one too; any free ones by default.")
    ] = None,
    config: Config = None,
    index: Annotated[
        int | None, typer.Option("--index", "--client_idx", help="Which client of --config this machine is, from 0.")
    ] = None,
    token: Annotated[str | None, typer.Option("--token", help="As the server prints it.", envvar="TLLM_TOKEN")] = None,
    is_debug: Debug = False,
) -> None:
    """Compute for a server, as tllm's first version was told to. New: tllm join."""
    options.set_up_logging(options.LogLevel.DEBUG if is_debug else options.LogLevel.WARNING)
    own_host: str | None
    if config is not None:
        _refuse_beside("--config", context, "hostname", "master_addr", "grpc_port")
        file = read_config(config)
        entry = own_entry(file.clients, index, own_names())
        own_host, grpc_port = entry.hostname, entry.grpc_port
        address = join_address(file.server.hostname, file.server.grpc_port)
    else:
        if index is not None:
            raise ConfigError(
                "--index would have no effect without --config: it says which client of that file this is."
            )
        url, own_host = head_url(hostname, master_addr)
        address = ask_where_to_join(url)
    from tllm.cli.join import run_node

    run_node(address, token, NodeConfig(advertised_host=own_host, ports=node_ports(grpc_port)))


def server_config(
    *,
    model_path: str,
    hostname: str,
    is_local: bool,
    client_size: int | None,
    http_port: int,
    grpc_port: int,
    api_key: str | None,
    insecure: bool,
) -> ServeConfig:
    """What `tllm serve` is to do. Raises ConfigError in the words of these options."""
    if client_size is not None and client_size < 1:
        raise ConfigError(f"--client_size is {client_size}; it must be at least 1.")
    host = bind_host(hostname)
    if is_loopback(host):
        if insecure:
            raise ConfigError(f"--insecure would have no effect: only this machine reaches {hostname}. Leave it out.")
    elif insecure and api_key:
        raise ConfigError("--insecure would have no effect beside an API key. Leave out one or the other.")
    elif not (insecure or api_key):
        raise ConfigError(
            f"--hostname {hostname} can be reached from other machines, and there is no key. Set one with --api-key or "
            "TLLM_API_KEY; or say --insecure, and everybody who reaches this machine may use the model, unseen."
        )
    num_parts = client_size or 1
    return ServeConfig(
        host=host,
        port=options.checked_port("--http_port", http_port),
        grpc_port=options.checked_port("--grpc_port", grpc_port),
        api_key=api_key,
        insecure=insecure,
        model=ModelConfig(model=model_path),
        local_node=NodeConfig(num_workers=num_parts) if is_local else None,
        num_nodes=None if is_local else num_parts,
        use_all=not is_local,  # the number of clients decides into how many parts the model is cut
    )


def bind_host(hostname: str) -> str:
    """The address of this machine that `hostname` means. Raises ConfigError where others could not use it."""
    if "/" in hostname:
        raise ConfigError(f"--hostname is {hostname}; a server takes a name or an address, such as 192.168.1.10.")
    if hostname == "localhost":
        return "127.0.0.1"
    try:
        return str(ipaddress.ip_address(hostname.strip("[]")))
    except ValueError:
        pass  # a name
    try:
        found = socket.getaddrinfo(hostname, None, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:
        raise ConfigError(f"{hostname} is not a name that this machine knows. Give its address instead.") from error
    hosts = [str(entry[4][0]) for entry in found]
    reached = next((host for host in hosts if not is_loopback(host)), None)
    if reached is None:
        raise ConfigError(
            f"{hostname} means {hosts[0]} on this machine, which no other machine reaches (see /etc/hosts). "
            "Give this machine's address instead, such as 192.168.1.10; or localhost, if that is meant."
        )
    return reached


def head_url(hostname: str | None, master_addr: str | None) -> tuple[str, str | None]:
    """The server's URL, and this machine's own address, if that was said. Raises ConfigError."""
    given = master_addr or hostname
    if given is None:
        raise ConfigError("Which server? Give --hostname http://HOST:8022, as the server prints it, or --config FILE.")
    own_host = hostname if master_addr else None
    if own_host is not None and "/" in own_host:
        raise ConfigError(
            f"--hostname {own_host} and --master_addr {master_addr} are both a server's URL. Leave out one of them."
        )
    scheme = "https" if given.startswith("https://") else "http"
    host, port = split_address(given, default_port=443 if scheme == "https" else DEFAULT_HTTP_PORT)
    if "/" in host:
        raise ConfigError(f"{given} is not a server's URL. Write it without a path, such as http://192.168.1.10:8022.")
    return f"{scheme}://{join_address(host, options.checked_port('The port of the server', port))}", own_host


def node_ports(grpc_port: int | None) -> range | None:
    """A node has two: one of its own, one of its worker."""
    if grpc_port is None:
        return None
    if not 1 <= grpc_port <= 65534:
        raise ConfigError(
            f"grpc_port is {grpc_port}; a node's is at least 1 and at most 65534: it takes the next one too."
        )
    return range(grpc_port, grpc_port + 2)


def ask_where_to_join(url: str) -> str:
    """HOST:PORT for nodes, from the HTTP side of the head; who answers there must still prove itself to the token.

    A head that wants an API key for that, which nodes do not have, is joined at the usual port. Raises TransportError
    when nobody answers, or somebody else does.
    """
    import httpx

    try:
        with httpx.Client(timeout=_ANSWER_S, trust_env=False) as http:  # nodes reach a head directly or not at all
            response = http.get(f"{url}/tllm/v1/join")
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        raise TransportError(
            f"No answer from {url}. Check that the server runs, listens beyond its own machine and is not behind a "
            f"firewall (tllm doctor HOST:{DEFAULT_GRPC_PORT}), or join directly: tllm join HOST:{DEFAULT_GRPC_PORT}"
        ) from error
    if response.status_code == httpx.codes.UNAUTHORIZED:
        print(f"{url} keeps its gRPC port to itself; trying {DEFAULT_GRPC_PORT}. Else: tllm join HOST:PORT", flush=True)
        return join_address(httpx.URL(url).host, DEFAULT_GRPC_PORT)
    try:
        answer = response.json()
    except ValueError:
        answer = None
    port = answer.get("grpc_port") if isinstance(answer, dict) else None
    if response.status_code != httpx.codes.OK or type(port) is not int or not 0 < port <= 65535:
        raise TransportError(
            f"{url} answered {response.status_code}, but does not say where nodes join. Check that it is the HTTP "
            "address of a tllm server of this version."
        )
    return join_address(httpx.URL(url).host, port)


def read_config(path: Path) -> ClusterFile:
    """A file of the first version, checked whole. Raises ConfigError naming the key that is wrong."""
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"Cannot read {path}: {error.strerror}.") from error
    except ValueError as error:
        raise ConfigError(f"{path} is not valid JSON: {error}.") from error
    top = _Keys(document, str(path), ("server", "client"))
    keys = _Keys(top.required("server", _an_object), f"server in {path}", ("hostname", "http_port", "grpc_port"))
    entry = ServerEntry(
        hostname=keys.required("hostname", _a_hostname),
        http_port=keys.optional("http_port", _a_port, DEFAULT_HTTP_PORT),
        grpc_port=keys.optional("grpc_port", _a_port, DEFAULT_GRPC_PORT),
    )
    clients = tuple(
        _client_entry(_Keys(value, f"client[{index}] in {path}", ("hostname", "grpc_port")))
        for index, value in enumerate(top.required("client", _a_list))
    )
    _require_ports_apart(clients, path)
    return ClusterFile(server=entry, clients=clients)


def _require_ports_apart(clients: Sequence[ClientEntry], path: Path) -> None:
    taken: dict[tuple[str, int], int] = {}
    for index, entry in enumerate(clients):
        for port in node_ports(entry.grpc_port) or ():
            other = taken.setdefault((entry.hostname, port), index)
            if other != index:
                raise ConfigError(
                    f"client[{other}] and client[{index}] in {path} are both {entry.hostname} and would both take port "
                    f"{port}: a node takes its grpc_port and the next one. Choose ports at least 2 apart."
                )


def _client_entry(keys: _Keys) -> ClientEntry:
    return ClientEntry(
        hostname=keys.required("hostname", _a_hostname), grpc_port=keys.optional("grpc_port", _a_port, None)
    )


def own_entry(clients: Sequence[ClientEntry], index: int | None, names: frozenset[str]) -> ClientEntry:
    """The entry that is this machine: number `index`, else the one whose hostname is one of `names`."""
    shown = ", ".join(f"{number}: {entry.hostname}" for number, entry in enumerate(clients))
    if index is not None:
        if not 0 <= index < len(clients):
            raise ConfigError(f"--index is {index}, but the clients of the file are {shown}.")
        return clients[index]
    found = [entry for entry in clients if entry.hostname.lower().removesuffix(".") in names]
    if len(found) == 1:
        return found[0]
    problem = "no client of the file is this machine" if not found else "several clients of the file are this machine"
    raise ConfigError(f"By their hostnames {problem} ({socket.gethostname()}). Say which with --index: {shown}.")


def own_names() -> frozenset[str]:
    """Names and addresses of this machine, in lower case."""
    import psutil

    full = socket.gethostname().lower()
    short = full.partition(".")[0]
    addresses = {entry.address.partition("%")[0] for found in psutil.net_if_addrs().values() for entry in found}
    return frozenset({full, short, f"{short}.local", "localhost", *addresses})


class _Keys:
    """A JSON object with known keys only."""

    def __init__(self, value: object, where: str, allowed: tuple[str, ...]) -> None:
        if not isinstance(value, dict):
            raise ConfigError(f"{where} must be an object with {', '.join(allowed)}; it is {_short(value)}.")
        unknown = sorted(set(value) - set(allowed))
        if unknown:
            raise ConfigError(f"{where} has {', '.join(map(repr, unknown))}; allowed are {', '.join(allowed)}.")
        self._value: Mapping[str, object] = value
        self._where = where

    def required(self, key: str, read: Callable[[object], _T | None]) -> _T:
        """The value as `read` accepts it; what it accepts is its docstring. Raises ConfigError."""
        if key not in self._value:
            raise ConfigError(f"{self._where} has no {key!r}.")
        made = read(self._value[key])
        if made is None:
            raise ConfigError(f"{key!r} of {self._where} is {_short(self._value[key])}; it must be {read.__doc__}.")
        return made

    def optional(self, key: str, read: Callable[[object], _T | None], default: _D) -> _T | _D:
        """The same, or `default` when the key is absent."""
        return self.required(key, read) if key in self._value else default


def _an_object(value: object) -> object | None:
    """an object"""
    return value if isinstance(value, dict) else None


def _a_port(value: object) -> int | None:
    """a whole number from 1 to 65535"""
    return value if type(value) is int and 0 < value <= 65535 else None


def _a_hostname(value: object) -> str | None:
    """a name or an address, such as mac-mini or 192.168.1.10"""
    return value if isinstance(value, str) and value.strip() == value != "" and "/" not in value else None


def _a_list(value: object) -> list[object] | None:
    """a list of at least one client: their number decides into how many parts the model is cut"""
    return value if isinstance(value, list) and value else None


def _short(value: object) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _refuse_beside(flag: str, context: typer.Context, *names: str) -> None:
    """Raises ConfigError naming those options on the command line that `flag` would leave without effect."""
    given = []
    for name in names:
        source = context.get_parameter_source(name)
        if source is not None and source.name == "COMMANDLINE":
            given.append(f"--{name}")
    if given:
        raise ConfigError(
            f"{', '.join(given)} would have no effect beside {flag}. Say it in the file, or leave that out."
        )


_server_app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)
_server_app.command()(server)
_client_app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)
_client_app.command()(client)
