"""What every test needs: a place for tllm's own files that is not the developer's."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator

import pytest


@pytest.fixture(scope="session", autouse=True)
def own_state_directory() -> Iterator[None]:
    """Keys, tokens, measured speeds and weights of one run, shared by its tests as one user's processes share them."""
    with tempfile.TemporaryDirectory(prefix="tllm-state-") as directory:
        before = os.environ.get("XDG_STATE_HOME")
        os.environ["XDG_STATE_HOME"] = directory
        try:
            yield
        finally:
            if before is None:
                del os.environ["XDG_STATE_HOME"]
            else:
                os.environ["XDG_STATE_HOME"] = before
