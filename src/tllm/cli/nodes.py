"""`tllm nodes`: who computes what in a cluster, how well, and why somebody does not.

This file does not know how any of it is found out.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tllm.cli import options
from tllm.core.config import DEFAULT_HTTP_PORT
from tllm.core.errors import ConfigError, TllmError, TransportError, UnavailableError
from tllm.core.units import format_bytes, format_seconds

if TYPE_CHECKING:
    import httpx
    from rich.console import Console, RenderableType
    from rich.table import Table

    from tllm.cluster.status import ClusterStatus, NodeStatus, StageStatus

_WATCH_S = 1.0  # between two looks
_ANSWER_S = 10.0
_NONE = "–"

Url = Annotated[
    str | None,
    typer.Option("--url", help="The server, as it prints it; that of this machine by default.", envvar="TLLM_URL"),
]
Key = Annotated[str | None, typer.Option(help="Of that server.", envvar="TLLM_API_KEY")]


def nodes(
    context: typer.Context,
    url: Url = None,
    api_key: Key = None,
    json: Annotated[bool, typer.Option("--json", help="As the server says it, for programs.")] = False,
    watch: Annotated[bool, typer.Option("--watch", help="Look again every second, until Ctrl-C.")] = False,
) -> None:
    """Show the nodes of a cluster, its plan and what it predicts."""
    if watch:
        options.refuse_beside("--watch", context, "json")
    from rich.console import Console

    from tllm.cli.client import connected

    with connected(url or local_url(), api_key=api_key, silence_s=_ANSWER_S) as client:
        if watch:
            _watch(Console(), client)
        elif json:
            print(ask(client, "GET", "/tllm/v1/cluster").text)
        else:
            show(Console(), fetch_status(client))


def local_url() -> str:
    """Of the head that runs on this machine; the usual place where none has said where it is. Raises ConfigError when
    there are several."""
    from tllm.cluster.local import local_heads

    urls = sorted({head.url for head in local_heads() if head.url})
    if len(urls) > 1:
        raise ConfigError(f"Several heads run on this machine. Name one with --url: {', '.join(urls)}.")
    return urls[0] if urls else f"http://127.0.0.1:{DEFAULT_HTTP_PORT}"


def ask(client: httpx.Client, method: str, path: str, body: object = None) -> httpx.Response:
    """The answer to one question, with `body` as JSON. Raises TransportError, or UnavailableError in the words of the
    server."""
    import httpx

    try:
        response = client.request(method, path, json=body)
    except httpx.HTTPError as error:
        raise TransportError(
            f"No answer from {client.base_url}. Check that a server runs there; another one is named with "
            "--url http://HOST:PORT."
        ) from error
    if response.status_code == httpx.codes.OK:
        return response
    message = _refusal(response)
    if message is None:
        raise TransportError(
            f"{response.url} answered {response.status_code} {response.reason_phrase}, and not as tllm does. Check "
            "that --url is that of a tllm server."
        )
    if response.status_code == httpx.codes.UNAUTHORIZED:
        message += " Give the server's key with --api-key or TLLM_API_KEY."
    raise UnavailableError(message, state="failed")


def _refusal(response: httpx.Response) -> str | None:
    """What a tllm server says when it refuses; None from others."""
    try:
        body: Any = response.json()
        return str(body["error"]["message"])
    except (ValueError, TypeError, KeyError):
        return None


def fetch_status(client: httpx.Client) -> ClusterStatus:
    """The cluster as the server sees it. Raises what `ask` raises."""
    from pydantic import TypeAdapter, ValidationError

    from tllm.cluster.status import ClusterStatus

    response = ask(client, "GET", "/tllm/v1/cluster")
    try:
        return TypeAdapter(ClusterStatus).validate_json(response.content)
    except ValidationError as error:
        raise TransportError(
            f"{response.url} answers otherwise than this version of tllm expects. Use the server's version here."
        ) from error


def _watch(console: Console, client: httpx.Client) -> None:
    """A server that is gone for a while is waited for; the first look must succeed."""
    from rich.console import Group
    from rich.live import Live
    from rich.text import Text

    shown = render(console, fetch_status(client))
    with Live(shown, console=console, auto_refresh=False) as live:
        try:
            while True:
                live.refresh()
                _pause()
                try:
                    shown = render(console, fetch_status(client))
                    live.update(shown)
                except TllmError as error:
                    live.update(Group(shown, Text(f"\n{error}", style="red")))
        except KeyboardInterrupt:
            pass


def _pause() -> None:
    time.sleep(_WATCH_S)


def show(console: Console, status: ClusterStatus) -> None:
    console.print(render(console, status))


def render(console: Console, status: ClusterStatus) -> RenderableType:
    """A table where it fits the terminal, else a few lines for every node; then reasons, plan and last events."""
    from rich.console import Group
    from rich.measure import Measurement
    from rich.text import Text

    table = _table(status)
    fits = Measurement.get(console, console.options.update(max_width=10_000), table).maximum <= console.width
    parts: list[RenderableType]
    if not status.nodes:
        parts = [Text("No node has joined.\n")]
    elif fits:
        reasons = [f"{_plain(node.name)}: {_plain(node.reason)}" for node in status.nodes if node.reason]
        parts = [table, Text("\n".join([*reasons, ""]))]
    else:
        parts = [*map(_card, status.nodes), Text()]
    parts.append(Text("\n".join(_plan_lines(status))))
    if status.events:
        parts.append(Text("\n" + "\n".join(map(_plain, status.events)), style="dim"))
    return Group(*parts)


def _table(status: ClusterStatus) -> Table:
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False)
    for column, justify in _COLUMNS:
        table.add_column(column, justify="right" if justify else "left", no_wrap=True)
    for node in status.nodes:
        table.add_row(*map(Text, _cells(node)))
    return table


_COLUMNS = (  # and whether they are figures
    ("node", False),
    ("state", False),
    ("layers", False),
    ("memory", True),
    ("device", False),
    ("tok/s", True),  # if it held the whole model
    ("RTT", True),
)


def _cells(node: NodeStatus) -> list[str]:
    held = sum(stage.weight_bytes + stage.kv_bytes for stage in node.stages)
    return [
        _plain(node.name),
        node.state.value,
        ", ".join(map(layers_text, node.stages)) or _NONE,
        f"{format_bytes(held)} of {format_bytes(node.memory_bytes)}",
        f"{node.num_threads} threads, {_plain(node.device)}",
        _NONE if node.decode_tokens_per_s is None else f"{node.decode_tokens_per_s:.3g}",
        _NONE if node.rtt_s is None else format_seconds(node.rtt_s),
    ]


def _card(node: NodeStatus) -> RenderableType:
    """The same, one under the other, for terminals in which the table does not fit."""
    from rich.text import Text

    name, state, *rest = _cells(node)
    lines = [f"{column} {cell}" for (column, _), cell in zip(_COLUMNS[2:], rest, strict=True) if cell != _NONE]
    if node.reason:
        lines.append(_plain(node.reason))
    return Text.assemble((f"{name}", "bold"), f" {state}\n", *(f"  {line}\n" for line in lines), end="")


def layers_text(stage: StageStatus) -> str:
    """`0..3`, counted from the model's first; with the ends that are no layers where there are none between them."""
    if stage.first_layer < stage.last_layer:
        return f"{stage.first_layer}..{stage.last_layer - 1}"
    ends = ["embedding"] * stage.embed + ["head"] * stage.head
    return " and ".join(ends) or _NONE


def _plan_lines(status: ClusterStatus) -> list[str]:
    lines = [f"{_plain(status.model)}: {_plain(status.state)}, epoch {status.epoch}, cluster {_plain(status.cluster)}"]
    predicted = []
    if status.predicted_ttft_s is not None:
        predicted.append(f"first token in {format_seconds(status.predicted_ttft_s)}")
    if status.predicted_tokens_per_s is not None:
        predicted.append(f"{status.predicted_tokens_per_s:.3g} tokens/s")
    if predicted:
        bound = f"; bound by {_plain(status.bound_by)}" if status.bound_by else ""
        lines.append(f"predicted: {', '.join(predicted)}{bound}")
    return lines


def _plain(text: str) -> str:
    """What peers say, without what a terminal would obey."""
    return "".join(char if char.isprintable() else "\N{REPLACEMENT CHARACTER}" for char in text)
