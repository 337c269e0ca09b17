"""`tllm cache`: what this machine keeps of models that it was given shards of, and making room."""

from __future__ import annotations

import json
import time
from typing import TYPE_CHECKING, Annotated

import typer

from tllm.core.errors import ConfigError
from tllm.core.units import format_bytes

if TYPE_CHECKING:
    from tllm.cluster.shard_files import StoreFiles

app = typer.Typer(help="Weights that this machine keeps.", no_args_is_help=True, rich_markup_mode=None)

_DAY_S = 24 * 3600.0


@app.command("ls")
def list_(as_json: Annotated[bool, typer.Option("--json", help="For programs.")] = False) -> None:
    """List the checkpoints in the shard store, last used first."""
    files = _store()
    kept = files.checkpoints()
    if as_json:
        checkpoints = [
            {
                "model": item.model,
                "fingerprint": item.fingerprint,
                "held_bytes": item.held_bytes,
                "total_bytes": item.total_bytes,
                "used": item.used,
            }
            for item in kept
        ]
        print(json.dumps({"directory": str(files.directory), "checkpoints": checkpoints}))
        return
    if not kept:
        print(f"{files.directory} holds no weights.")
        return

    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(title=Text(str(files.directory), style="table.title"), title_justify="left")
    for column in ("model", "fingerprint", "held", "of", "last used"):
        table.add_column(column, justify="right" if column in ("held", "of") else "left")
    for item in kept:
        used = time.strftime("%Y-%m-%d %H:%M", time.localtime(item.used))
        sizes = format_bytes(item.held_bytes), format_bytes(item.total_bytes)
        table.add_row(Text(item.model or "-"), item.fingerprint[:12], *sizes, used)
    Console().print(table)


@app.command("gc")
def gc(
    older_than: Annotated[
        float | None,
        typer.Option(min=0, metavar="DAYS", help="Checkpoints too that were not used for so many days."),
    ] = None,
    everything: Annotated[bool, typer.Option("--all", help="Everything; it is fetched again when needed.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would go.")] = False,
) -> None:
    """Remove what nobody needs: tensors that no checkpoint names, and parts of more than a day."""
    if everything and older_than is not None:
        raise ConfigError("--all removes everything, whatever its age; leave out --older-than or --all.")
    files = _store()
    older_than_s = None if older_than is None else older_than * _DAY_S
    garbage = files.garbage(now=time.time(), older_than_s=older_than_s, everything=everything)
    if not dry_run:
        files.remove(garbage)
    elif garbage.files:
        for path in garbage.files:
            print(path)
    verb = "would be freed" if dry_run else "freed"
    print(f"{format_bytes(garbage.num_bytes)} {verb} by removing {len(garbage.files)} files of {files.directory}.")


def _store() -> StoreFiles:
    from tllm.cluster.shard_files import StoreFiles, default_store

    return StoreFiles(default_store())
