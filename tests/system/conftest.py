"""One server with two workers, shared by the tests that do not harm it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.system.processes import Server, serve


@pytest.fixture(scope="session")
def server() -> Iterator[Server]:
    with serve("--workers", "2") as server:
        yield server
