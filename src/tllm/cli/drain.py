"""`tllm drain`: take a node out of a cluster's plans without harm to what runs, and back in.

This file does not know how layers move.
"""

from __future__ import annotations

from typing import Annotated
from urllib.parse import quote

import typer

from tllm.cli.nodes import Key, Url


def drain(
    node: Annotated[str, typer.Argument(help="Its name or id, as tllm nodes shows them.")],
    undo: Annotated[bool, typer.Option("--undo", help="Let plans use the node again.")] = False,
    url: Url = None,
    api_key: Key = None,
) -> None:
    """Take a node out of every plan, so that its machine can be switched off; requests go on without it."""
    from tllm.cli.client import connected
    from tllm.cli.nodes import ask, local_url

    # No bound on the wait: it lasts as long as others take to load, and a person can press Ctrl-C.
    with connected(url or local_url(), api_key=api_key, silence_s=None) as client:
        ask(client, "POST", f"/tllm/v1/nodes/{quote(node, safe='')}/{'undrain' if undo else 'drain'}")
    print(f"{node} can be planned with again." if undo else f"{node} is out of every plan. Back in: --undo")
