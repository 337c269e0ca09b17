"""`tllm token`: the join tokens of this machine's cluster. A running head sees a change at once."""

from __future__ import annotations

import re
import time
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Annotated

import typer

from tllm.core.config import state_directory
from tllm.core.errors import ConfigError

if TYPE_CHECKING:
    from tllm.transport.tokens import TokenStore

_UNITS_S = {"s": 1, "m": 60, "h": 3600, "d": 86400}

app = typer.Typer(help="Join tokens: what a new machine needs to join, and how to take it back.", no_args_is_help=True)


@app.command("ls")
def list_tokens() -> None:
    """List the tokens, without their secrets."""
    now_s = time.time()
    print(f"{'id':8}  {'state':7}  {'made':16}  {'expires':16}  label")
    for token in _store().tokens():
        expires = "never" if token.expires_s is None else _date(token.expires_s)
        print(
            f"{token.id:8}  {token.state(now_s):7}  {_date(token.created_s):16}  {expires:16}  {token.label}".rstrip()
        )


@app.command("new")
def new_token(
    label: Annotated[str, typer.Option(help="To tell it from others.")] = "",
    ttl: Annotated[
        str | None, typer.Option(help="How long machines may join by it, such as 30m, 12h or 7d; for ever by default.")
    ] = None,
) -> None:
    """Make a token and print it. Machines that joined by it stay when its time is over."""
    if not label.isprintable() or len(label) > 64:
        raise ConfigError("--label takes at most 64 characters of one line.")
    print(_store().new(label, None if ttl is None else _seconds(ttl)))


@app.command("revoke")
def revoke_token(token_id: Annotated[str, typer.Argument(metavar="ID", help="As `tllm token ls` shows it.")]) -> None:
    """Let nobody join by it any more, and part with the nodes that did."""
    _store().revoke(token_id)
    print(f"Revoked {token_id}.")


def _store() -> TokenStore:
    from tllm.transport.tokens import TokenStore
    from tllm.transport.trust import Authority

    return TokenStore(Authority.open(state_directory() / "cluster"))


def _seconds(text: str) -> float:
    match = re.fullmatch(r"(\d{1,6})([smhd])", text)
    if match is None or not int(match[1]):
        raise ConfigError(f"--ttl is {text}; give a number and a unit, such as 30m, 12h or 7d.")
    return float(int(match[1]) * _UNITS_S[match[2]])


def _date(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d %H:%M")
