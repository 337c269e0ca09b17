"""What a person sets, with its defaults, checked once. Sources (flags, environment) are the command line's business.

This file does not know flags, environment variables or what the values are used for.
"""

from __future__ import annotations

import ipaddress
import os
from dataclasses import dataclass, field
from pathlib import Path

from tllm.core.errors import ConfigError
from tllm.core.types import DType, Quantization

DEFAULT_HTTP_PORT = 8022
DEFAULT_GRPC_PORT = 25001
DEFAULT_CLUSTER = "tllm"
EMBEDDED_MODEL = "embedded"
DEFAULT_BLOCK_SIZE = 64
DEFAULT_MAX_BATCH_TOKENS = 512


@dataclass(frozen=True, slots=True, kw_only=True)
class Deadlines:
    """Every wait that can hang, in seconds."""

    join_s: float = 10.0  # an agent's connection to the head
    silence_s: float = 2.5  # without a sign of life from a peer or a worker, after which it is lost; shorter is nothing
    heartbeat_s: float = 0.5  # between signs of life
    hang_s: float = 300.0  # one step on a worker's compute thread, then it is killed
    import_s: float = 60.0  # silence of a worker that loads: importing a framework holds up its event loop
    rejoin_s: float = 60.0  # that workers keep their weights after the head was lost, and the head a node after it
    measure_s: float = 30.0  # a node's speed, then it is planned without
    load_s: float = 1800.0  # a shard from disk to memory
    start_s: float = 60.0  # KV memory and the connections of all stages
    connect_s: float = 3.0  # one connection to a neighbour that is known to listen
    stop_s: float = 5.0  # a worker asked to stop, then killed
    patience_s: float = 1.5  # for a node that may be back in a moment, before requests end for the lack of it
    retry_s: float = 10.0  # between attempts to serve again with the nodes there are
    drain_s: float = 30.0  # requests still running when the service stops


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """A model and how it is served; None means: what the checkpoint says, or what memory allows."""

    model: str = EMBEDDED_MODEL  # `embedded`, a directory, or a hub id
    served_names: tuple[str, ...] = ()
    dtype: DType | None = None
    quantization: Quantization | None = None
    max_model_len: int | None = None
    kv_bytes: int | None = None  # per stage
    block_size: int = DEFAULT_BLOCK_SIZE
    max_batch_tokens: int = DEFAULT_MAX_BATCH_TOKENS
    max_sequences: int = 256
    max_waiting: int = 1024
    max_steps_in_flight: int | None = None  # None: as many as stages
    prefix_cache: bool = True
    seed: int | None = None

    def __post_init__(self) -> None:
        for name, value, least in (
            ("--max-model-len", self.max_model_len, 2),
            ("--block-size", self.block_size, 1),
            ("--max-batch-tokens", self.max_batch_tokens, 1),
            ("--kv-memory", self.kv_bytes, 1),
        ):
            if value is not None and value < least:
                raise ConfigError(f"{name} is {value}; it must be at least {least}.")


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeConfig:
    """What this machine gives to the cluster; None means: what there is."""

    name: str | None = None
    num_threads: int | None = None
    memory_bytes: int | None = None
    device: str = "cpu"
    num_workers: int = 1
    pin: bool = False  # every worker to processors of its own
    listen_host: str | None = None  # None: the interface that faces the head
    advertised_host: str | None = None  # what other machines call it, where that differs: behind a forwarding router
    ports: range | None = None  # of the agent and its workers, for a firewall's rule; None: any free ones

    def __post_init__(self) -> None:
        if self.device.startswith("cuda") and self.memory_bytes is None:
            raise ConfigError(f"--device {self.device} needs --memory: how much of that device's memory tllm may take.")
        for flag, value in (
            ("--threads", self.num_threads),
            ("--workers", self.num_workers),
            ("--memory", self.memory_bytes),
        ):
            if value is not None and value < 1:
                raise ConfigError(f"{flag} is {value}; it must be at least 1.")


@dataclass(frozen=True, slots=True, kw_only=True)
class ServeConfig:
    """A head: where it listens, what it serves, which nodes it waits for."""

    host: str = "127.0.0.1"
    port: int = DEFAULT_HTTP_PORT  # 0: any free one
    grpc_port: int = DEFAULT_GRPC_PORT  # 0: any free one
    cluster: str = DEFAULT_CLUSTER
    api_key: str | None = None
    insecure: bool = False  # HTTP beyond this machine without a key
    model: ModelConfig = field(default_factory=ModelConfig)
    local_node: NodeConfig | None = field(default_factory=NodeConfig)  # None: the head computes nothing itself
    num_nodes: int | None = None  # None: its own node, or one other
    use_all: bool = False  # every node gets a part, also where that is slower
    streams: int = 1  # that the plan is to be best for, decoded at once
    deadlines: Deadlines = field(default_factory=Deadlines)

    def __post_init__(self) -> None:
        if not is_loopback(self.host) and not self.api_key and not self.insecure:
            raise ConfigError(
                f"--host {self.host} can be reached from other machines, and there is no --api-key. "
                "Set one (or TLLM_API_KEY), serve on 127.0.0.1, or say --insecure to let everybody ask."
            )
        if self.api_key and self.insecure:
            raise ConfigError("--insecure would have no effect beside --api-key. Leave out one or the other.")
        if self.num_nodes is not None and self.num_nodes < 1:
            raise ConfigError(f"--nodes is {self.num_nodes}; it must be at least 1.")
        if self.streams < 1:
            raise ConfigError(f"--streams is {self.streams}; it must be at least 1.")


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach the address."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def is_unspecified(host: str) -> bool:
    """Whether the address means every interface of a machine."""
    try:
        return ipaddress.ip_address(host).is_unspecified
    except ValueError:  # a name
        return False


def join_address(host: str, port: int) -> str:
    """`host:port`, with the brackets that an IPv6 address needs."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def split_address(address: str, *, default_port: int) -> tuple[str, int]:
    """Host and port of `host`, `host:port`, `[v6]:port` or a URL of such. Raises ConfigError."""
    bare = address.removeprefix("http://").removeprefix("https://").rstrip("/")
    host, _, port = bare.rpartition(":") if bare.count(":") == 1 or bare.startswith("[") else (bare, "", "")
    if bare.startswith("[") and bare.endswith("]"):
        host, port = bare, ""
    if not host or (port and not port.isdecimal()):
        raise ConfigError(f"{address!r} is not an address. Write HOST:PORT, such as 192.168.1.10:{default_port}.")
    return host.strip("[]"), int(port or default_port)


def state_directory() -> Path:
    """Where tllm keeps what must outlive it, such as the join token."""
    base = os.environ.get("XDG_STATE_HOME") or str(Path.home() / ".local" / "state")
    return Path(base) / "tllm"
