"""`tllm trace`: where the time of a request, or of the next seconds, goes; as a file for Perfetto and as a table.

This file does not know how times are noted and put together.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated
from urllib.parse import quote

import typer

from tllm.cli import options
from tllm.cli.nodes import Key, Url
from tllm.core.errors import ConfigError, TransportError
from tllm.core.units import format_bytes, format_seconds

if TYPE_CHECKING:
    import httpx
    from rich.console import Console
    from rich.table import Table

    from tllm.cluster.tracing import Account, ClockStatement, Share, Summary

_ANSWER_S = 30.0  # beyond the window
_MAX_WINDOW_S = 60.0


def trace(
    context: typer.Context,
    request: Annotated[
        str | None,
        typer.Argument(help="Id of a request that was sent with X-Tllm-Trace: 1; without one, a window is traced."),
    ] = None,
    seconds: Annotated[float, typer.Option(help="Length of the window, from now on; at most 60.")] = 5.0,
    url: Url = None,
    api_key: Key = None,
    out: Annotated[Path, typer.Option(help="Opens in https://ui.perfetto.dev and chrome://tracing.")] = Path(
        "trace.json"
    ),
    summary: Annotated[bool, typer.Option("--summary", help="Show the table alone and write no file.")] = False,
) -> None:
    """Show where the time goes: queue, schedule, and per stage compute, serialize, wire and wait."""
    if request is not None:
        options.refuse_beside("REQUEST", context, "seconds")
    if summary:
        options.refuse_beside("--summary", context, "out")
    if not 0 < seconds <= _MAX_WINDOW_S:
        raise ConfigError(f"--seconds is {seconds:g}; it must be above 0 and at most {_MAX_WINDOW_S:g}.")
    from rich.console import Console

    from tllm.cli.client import connected
    from tllm.cli.nodes import ask, local_url

    path = f"/tllm/v1/trace?seconds={seconds:g}" if request is None else f"/tllm/v1/traces/{quote(request, safe='')}"
    with connected(url or local_url(), api_key=api_key, silence_s=seconds + _ANSWER_S) as client:
        response = ask(client, "GET", path)
    found = _summary(response)
    console = Console()
    show(console, found)
    if not summary:
        _write(out, response.content)
        console.print(f"\nwrote {out} ({format_bytes(len(response.content))}); open it in https://ui.perfetto.dev")


def _summary(response: httpx.Response) -> Summary:
    from pydantic import TypeAdapter, ValidationError

    from tllm.cluster.tracing import Summary

    try:
        return TypeAdapter(Summary).validate_python(response.json()["tllm"])
    except (ValueError, ValidationError, KeyError, TypeError) as error:
        raise TransportError(
            f"{response.url} answers otherwise than this version of tllm expects. Use the server's version here."
        ) from error


def _write(out: Path, content: bytes) -> None:
    try:
        out.write_bytes(content)
    except OSError as error:
        raise ConfigError(f"Cannot write {out}: {error.strerror}. Choose another --out.") from error


def show(console: Console, found: Summary) -> None:
    """Tables of where the time went; how well the clocks are known; what is not there."""
    from rich.text import Text

    for account in found.accounts:
        console.print(Text(_plain(account.title), style="bold"))
        if not found.num_steps:
            console.print("Nothing was computed.")
        if account.wall_s > 0:
            console.print(_table(account))
            console.print(Text(f"{_sum_line(account)}\n"), soft_wrap=True)
    window_s = found.ended_s - found.began_s
    for share in found.computing:
        console.print(Text(_busy_line(share, window_s)), soft_wrap=True)
    for clock in found.clocks:
        console.print(Text(_clock_line(clock)), soft_wrap=True)
    if found.moved_s:
        console.print(
            Text(f"times moved by up to {format_seconds(found.moved_s)}, as the clocks were not known better")
        )
    for missing in found.missing:
        console.print(Text(f"not recorded: {_plain(missing)}"), soft_wrap=True)


def _table(account: Account) -> Table:
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False)
    for column, is_figure in (("part", False), ("where", False), ("times", True), ("time", True), ("share", True)):
        table.add_column(column, justify="right" if is_figure else "left", no_wrap=True)
    for share in account.shares:
        cells = (
            share.kind.value,
            _plain(share.place),
            str(share.num_parts),
            format_seconds(share.seconds),
            f"{100 * share.seconds / account.wall_s:.1f} %",
        )
        table.add_row(*map(Text, cells))
    return table


def _sum_line(account: Account) -> str:
    percent = 100 * account.recorded_s / account.wall_s
    return (
        f"recorded parts sum to {format_seconds(account.recorded_s)} of {format_seconds(account.wall_s)} "
        f"({percent:.1f} %)"
    )


def _busy_line(share: Share, window_s: float) -> str:
    percent = 100 * share.seconds / window_s
    return f"{_plain(share.place)} computed for {percent:.1f} % of {format_seconds(window_s)}"


def _clock_line(clock: ClockStatement) -> str:
    if clock.is_shared:
        return f"clock of {_plain(clock.place)}: the head's own"
    return f"clock of {_plain(clock.place)}: known \N{PLUS-MINUS SIGN} {format_seconds(clock.error_s)}"


def _plain(text: str) -> str:
    """What peers call themselves, without what a terminal would obey."""
    return "".join(char if char.isprintable() else "\N{REPLACEMENT CHARACTER}" for char in text)
