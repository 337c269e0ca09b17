"""A head and its HTTP server, put together: the one place where the edges and the cluster meet.

This file does not know flags or terminals.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from typing import Any

import uvicorn

from tllm import __version__
from tllm.api.app import create_app
from tllm.api.state import ApiState
from tllm.cluster.deployment import Deployment
from tllm.cluster.events import HeadEvent, Observer, Serving
from tllm.cluster.head import Head
from tllm.core.config import ServeConfig, is_unspecified, join_address
from tllm.core.errors import ConfigError

_SIGNAL_S = 0.1


@dataclass(frozen=True, slots=True, kw_only=True)
class Service:
    """A running server. `serving` ends, with the error, when the model cannot be served any more."""

    url: str
    grpc_address: str
    deployment: Deployment
    serving: asyncio.Task[None]


class _Server(uvicorn.Server):
    """uvicorn without signal handlers: what Ctrl-C means is the verb's business."""

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


@asynccontextmanager
async def serving(config: ServeConfig, observe: Observer) -> AsyncIterator[Service]:
    """HTTP answers (503 while the model loads) from here on; when the context is left, everything has ended.

    Raises ConfigError when a port is taken, ModelError for a checkpoint that cannot be used.
    """
    head = Head(config, observe)
    with contextlib.closing(_listen(config.host, config.port)) as listener:
        port = listener.getsockname()[1]
        url = f"http://{join_address(config.host, port)}"
        head.url = f"http://{join_address('127.0.0.1', port)}" if is_unspecified(config.host) else url
        app = create_app(
            ApiState(
                version=__version__,
                deployments=dict.fromkeys(head.deployment.names, head.deployment),
                api_keys=(config.api_key,) if config.api_key else (),
                cluster=head,
                bind_host=config.host,
                default_seed=config.model.seed,
            )
        )
        http = _Server(
            uvicorn.Config(app, log_config=None, access_log=False, timeout_graceful_shutdown=5, lifespan="off")
        )
        async with head.running() as task:
            answering = asyncio.create_task(http.serve(sockets=[listener]), name="http")
            try:
                yield Service(
                    url=url,
                    grpc_address=head.grpc_address,
                    deployment=head.deployment,
                    serving=task,
                )
            finally:
                await head.deployment.drain(config.deadlines.drain_s)
                http.should_exit = True
                await asyncio.wait({answering})


def _listen(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        listener = socket.create_server((host, port), family=family, backlog=2048)
    except OSError as error:
        raise ConfigError(
            f"Cannot listen on {join_address(host, port)}: {error.strerror}. "
            "Choose another --port (0 takes any free one), or stop what uses it."
        ) from error
    # Accepted connections inherit it. Without it the end of an answer waits 40 ms for the acknowledgement of its
    # beginning; asyncio sets it only on sockets that were made with TCP's own number.
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return listener


@contextmanager
def background_service(config: ServeConfig, observe: Observer) -> Iterator[Service]:
    """The same on a thread of its own, loaded and ready, for verbs that talk to it from the main thread.

    Raises what kept it from serving. When the context is left, or Ctrl-C comes while it loads, everything has ended.
    """
    ready: Future[Service] = Future()
    stop = asyncio.Event()

    def watch(event: HeadEvent) -> None:
        observe(event)
        if isinstance(event, Serving):
            loaded.set()

    async def live() -> None:
        async with serving(config, watch) as service:
            waits = [asyncio.create_task(event.wait()) for event in (loaded, stop)]
            try:
                await asyncio.wait({*waits, service.serving}, return_when=asyncio.FIRST_COMPLETED)
                if service.serving.done():
                    service.serving.result()
                if not stop.is_set():
                    ready.set_result(service)
                    await stop.wait()
            finally:
                for waiting in waits:
                    waiting.cancel()

    loaded = asyncio.Event()
    loop = asyncio.new_event_loop()
    with ThreadPoolExecutor(max_workers=1, thread_name_prefix="service") as thread:
        ended = thread.submit(loop.run_until_complete, live())
        try:
            either: set[Future[Any]] = {ready, ended}
            while not wait(either, timeout=_SIGNAL_S, return_when=FIRST_COMPLETED).done:
                pass  # the system may hand Ctrl-C to another thread; this one sees it only when it runs
            if not ready.done():
                ended.result()
            yield ready.result()
        finally:
            with contextlib.suppress(RuntimeError):  # the loop is closed: it ended by itself
                loop.call_soon_threadsafe(stop.set)
            wait({ended})
            loop.close()
