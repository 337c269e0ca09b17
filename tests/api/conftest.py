"""One shared server for most tests; the deployment behind it is as new for each of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import httpx
import pytest

from tests.api.fake_deployment import FakeDeployment
from tests.api.serving import Server
from tllm.api.state import ApiState, Limits

LIMITS = Limits(max_body_bytes=200_000, max_messages=50, max_choices=100, max_stop=16, ping_interval_s=0.05)


@pytest.fixture(scope="session")
def _shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Server, FakeDeployment]]:
    deployment = FakeDeployment.in_directory(tmp_path_factory.mktemp("tokenizer"))
    state = ApiState(version="1.2.3", deployments=dict.fromkeys(deployment.names, deployment), limits=LIMITS)
    with Server(state) as server:
        yield server, deployment


@pytest.fixture
def deployment(_shared: tuple[Server, FakeDeployment]) -> FakeDeployment:
    _shared[1].reset()
    return _shared[1]


@pytest.fixture
def server(_shared: tuple[Server, FakeDeployment], deployment: FakeDeployment) -> Server:
    _shared[0].state.draining = False
    return _shared[0]


@pytest.fixture
def client(server: Server) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=server.url, timeout=10) as client:
        yield client


@pytest.fixture
def new_deployment(tmp_path: Path) -> FakeDeployment:
    return FakeDeployment.in_directory(tmp_path)


@pytest.fixture
def serve(new_deployment: FakeDeployment) -> Iterator[Callable[..., httpx.Client]]:
    """Start a server of one's own with `serve(api_keys=..., ...)`; returns a client for it."""
    with ExitStack() as stack:

        def start(**options: object) -> httpx.Client:
            given = {"version": "1.2.3", "deployments": {"fake": new_deployment}, "limits": LIMITS, **options}
            server = stack.enter_context(Server(ApiState(**given)))  # type: ignore[arg-type]
            return stack.enter_context(httpx.Client(base_url=server.url, timeout=10))

        yield start
