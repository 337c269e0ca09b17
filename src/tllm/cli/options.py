"""Flags that several verbs share, and the configurations they become.

Every flag can be set by its environment variable as well; the flag wins.
"""

from __future__ import annotations

import logging
import sys
from enum import StrEnum
from typing import Annotated

import typer

from tllm.core.config import (
    DEFAULT_BLOCK_SIZE,
    DEFAULT_MAX_BATCH_TOKENS,
    EMBEDDED_MODEL,
    Deadlines,
    ModelConfig,
    NodeConfig,
)
from tllm.core.errors import ConfigError
from tllm.core.types import DType, Quantization
from tllm.core.units import parse_bytes


class LogLevel(StrEnum):
    DEBUG = "debug"
    INFO = "info"
    WARNING = "warning"
    ERROR = "error"


Model = Annotated[
    str,
    typer.Argument(help="A directory in Hugging Face layout, a hub id, or the embedded model.", envvar="TLLM_MODEL"),
]
ModelDType = Annotated[
    DType | None,
    typer.Option(
        "--dtype",
        help="Of KV, activations and weights that are not quantized; the checkpoint's own by default.",
        envvar="TLLM_DTYPE",
    ),
]
Quantize = Annotated[
    str | None,
    typer.Option(
        help="Hold weights as int8 or int4 (also int4-g32, int4-g128: in other groups than 64).", envvar="TLLM_QUANTIZE"
    ),
]
Device = Annotated[str, typer.Option(help="cpu, cuda, cuda:1 or mps.", envvar="TLLM_DEVICE")]
Threads = Annotated[
    int | None, typer.Option(help="For all workers of this machine together; all by default.", envvar="TLLM_THREADS")
]
Workers = Annotated[int, typer.Option(help="Cut this machine's part into that many stages.", envvar="TLLM_WORKERS")]
Pin = Annotated[bool, typer.Option("--pin", help="Pin every worker to processors of its own.", envvar="TLLM_PIN")]
Ports = Annotated[
    str | None,
    typer.Option(help="For other machines to reach this one's workers, such as 25100-25110; any free ones by default."),
]
Silence = Annotated[
    float | None,
    typer.Option(help="Seconds without a sign of life after which a machine is lost; 2.5 by default."),
]
Memory = Annotated[
    str | None,
    typer.Option(help="For weights and KV on this machine, such as 6GiB; most of what is free by default."),
]
MaxModelLen = Annotated[
    int | None, typer.Option(help="Longest context, prompt and answer; the model's own by default.")
]
KVMemory = Annotated[str | None, typer.Option("--kv-memory", help="KV cache of every stage, such as 2GiB.")]
BlockSize = Annotated[int, typer.Option(help="Positions per KV block.")]
MaxBatchTokens = Annotated[int, typer.Option(help="Tokens computed in one step at most.")]
Seed = Annotated[int | None, typer.Option(help="For requests that bring none; drawn anew for each by default.")]
Log = Annotated[LogLevel, typer.Option("--log-level", help="How much to say on stderr.", envvar="TLLM_LOG_LEVEL")]


def model_config(
    *,
    model: str = EMBEDDED_MODEL,
    served_names: tuple[str, ...] = (),
    dtype: DType | None = None,
    quantize: str | None = None,
    max_model_len: int | None = None,
    kv_memory: str | None = None,
    block_size: int = DEFAULT_BLOCK_SIZE,
    max_batch_tokens: int = DEFAULT_MAX_BATCH_TOKENS,
    seed: int | None = None,
) -> ModelConfig:
    return ModelConfig(
        model=model,
        served_names=served_names,
        dtype=dtype,
        quantization=quantization(quantize),
        max_model_len=max_model_len,
        kv_bytes=parse_bytes(kv_memory) if kv_memory else None,
        block_size=block_size,
        max_batch_tokens=max_batch_tokens,
        seed=seed,
    )


def quantization(text: str | None) -> Quantization | None:
    """Raises ConfigError."""
    return None if text is None else Quantization.parse(text)


def node_config(
    *,
    name: str | None = None,
    threads: int | None = None,
    memory: str | None = None,
    device: str = "cpu",
    workers: int = 1,
    pin: bool = False,
    listen: str | None = None,
    advertise: str | None = None,
    ports: str | None = None,
) -> NodeConfig:
    if pin and sys.platform != "linux":
        raise ConfigError("--pin works on Linux only; leave it out (and TLLM_PIN) on this machine.")
    memory_bytes = None if memory is None else parse_bytes(memory)
    if memory_bytes is not None and memory_bytes < 1:
        raise ConfigError(f"--memory is {memory}; give a size such as 6GiB, or leave it out for most of what is free.")
    return NodeConfig(
        name=name,
        num_threads=threads,
        memory_bytes=memory_bytes,
        device=device,
        num_workers=workers,
        pin=pin,
        listen_host=listen,
        advertised_host=advertise,
        ports=None if ports is None else port_range(ports),
    )


def port_range(text: str) -> range:
    """`A-B`, both included, or one port. Raises ConfigError."""
    first, _, last = text.partition("-")
    if first.isdecimal() and (last or first).isdecimal():
        found = range(int(first), int(last or first) + 1)
        if len(found) > 0 and found[0] >= 1 and found[-1] <= 65535:
            return found
    raise ConfigError(f"--ports is {text!r}; give a range such as 25100-25110.")


def deadlines(silence_s: float | None) -> Deadlines:
    """The defaults, but for what a person set. Raises ConfigError."""
    if silence_s is None:
        return Deadlines()
    if not 1.0 <= silence_s <= 3600:
        raise ConfigError(f"--silence is {silence_s:g}; it must be at least 1 and at most 3600 seconds.")
    return Deadlines(silence_s=silence_s, heartbeat_s=silence_s / 5)


def refuse_beside(flag: str, context: typer.Context, *names: str) -> None:
    """Raises ConfigError naming those parameters on the command line that `flag` would leave without effect.

    Those from the environment pass: it holds for every verb, and says what is wanted where it matters.
    """
    given = []
    for name in names:
        source = context.get_parameter_source(name)
        if source is not None and source.name == "COMMANDLINE":
            given.append(f"--{name.replace('_', '-')}")
    if given:
        raise ConfigError(f"{', '.join(given)} would have no effect beside {flag}. Leave out one or the other.")


def checked_port(flag: str, port: int) -> int:
    """The port itself. Raises ConfigError when no machine has it."""
    if not 0 <= port <= 65535:
        raise ConfigError(f"{flag} is {port}; a port is at least 0 and at most 65535.")
    return port


def set_up_logging(level: LogLevel) -> None:
    """Plain lines on stderr."""
    logging.basicConfig(
        level=level.upper(), format="%(asctime)s %(levelname).1s %(name)s: %(message)s", datefmt="%H:%M:%S"
    )
