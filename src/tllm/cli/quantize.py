"""`tllm quantize`: a model with int8 or int4 weights, as a directory that any node opens."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from tllm.cli import options
from tllm.core.config import EMBEDDED_MODEL
from tllm.core.types import Quantization


def quantize(
    model: options.Model = EMBEDDED_MODEL,
    *,
    to: Annotated[Path, typer.Option(metavar="DIR", help="The directory to be made; it must not exist.")],
    quantize: Annotated[
        str, typer.Option(help="int8 or int4 (also int4-g32, int4-g128: in other groups than 64).")
    ] = "int4",
    log_level: options.Log = options.LogLevel.WARNING,
) -> None:
    """Write a model anew with quantized weights: what --quantize makes at every start, made once."""
    options.set_up_logging(log_level)
    wanted = Quantization.parse(quantize)

    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

    from tllm.core.units import format_bytes
    from tllm.engines.torch.rewriting import quantize_rows
    from tllm.models.checkpoint import Checkpoint
    from tllm.models.quantizing import write_quantized
    from tllm.models.repository import resolve_model

    checkpoint = Checkpoint.open(resolve_model(model))
    bar = Progress(
        TextColumn(str(wanted)), BarColumn(), DownloadColumn(), TimeRemainingColumn(), console=Console(stderr=True)
    )
    with bar:
        task = bar.add_task(str(wanted), total=None)
        write_quantized(
            checkpoint,
            to.expanduser(),
            wanted,
            quantize_rows,
            lambda done, total: bar.update(task, completed=done, total=total),
        )
    before = sum(info.num_bytes for info in checkpoint.tensors.values())
    after = sum(info.num_bytes for info in Checkpoint.open(to.expanduser()).tensors.values())
    print(f"{to}: {format_bytes(after)} of weights, {before / after:.2g} times less than the original's.")
