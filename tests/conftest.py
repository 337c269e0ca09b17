"""What every test needs: places that are not the developer's, and an order in which files are dealt out.

`make test` deals whole files to a process per core, so that what a file shares among its tests is made once. Files
that take long are dealt first, or one process would still be at one of them when the others have nothing left.
"""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import hypothesis
import pytest

# The longest first. A file that is not named is dealt after these; a name that is no file's any more does no harm.
_LONG = (
    "system/test_recovery.py",
    "system/test_weights.py",
    "system/test_serve.py",
    "system/test_network.py",
    "system/test_soak.py",
    "system/test_placement.py",
    "system/test_readme.py",
)

# As workers have it (cluster/process.py), and read when torch is imported: threads that spin while another process has
# one of their cores take ten times as long.
os.environ.setdefault("GOMP_SPINCOUNT", "10000")

# Examples have no deadline each: on a busy machine the slowest of hundreds says nothing. Tests have (pyproject.toml).
hypothesis.settings.register_profile("tllm", deadline=None)
hypothesis.settings.load_profile("tllm")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not hasattr(config, "workerinput"):  # one process for all: in the order in which they are listed
        return
    here = Path(__file__).parent
    order = {here / name: number for number, name in enumerate(_LONG)}
    items.sort(key=lambda item: order.get(item.path, len(order)))


def pytest_collection_finish() -> None:
    """One thread: tensors here are tiny, and another process has the next core."""
    if (torch := sys.modules.get("torch")) is not None:
        torch.set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def own_places() -> Iterator[None]:
    """Keys, tokens, measured speeds and weights of one run, shared by its tests as one user's processes share them.

    And no certificates of the web's authorities: no test goes there, and every HTTP client takes 20 ms to read them.
    """
    with (
        tempfile.TemporaryDirectory(prefix="tllm-state-") as state,
        tempfile.TemporaryDirectory(prefix="tllm-nobody-") as nobody,
        pytest.MonkeyPatch.context() as patch,
    ):
        patch.setenv("XDG_STATE_HOME", state)
        patch.setenv("SSL_CERT_DIR", nobody)
        patch.delenv("SSL_CERT_FILE", raising=False)
        yield
