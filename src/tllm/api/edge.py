"""The outermost layer: every request passes here, gets an id, is let in or refused, timed, counted, and answered.

Rules:
    A path is served however it is written: `//v1/models`, `/v1/models/` and `/models` are `/v1/models`. Nothing is
    redirected, since a redirected POST loses its body in several clients.
    Whatever a handler raises becomes a reply here; nothing of the framework's own error pages gets out.

This file does not know what any route does.
"""

from __future__ import annotations

import logging
import re
import secrets
import time
from urllib.parse import quote

from starlette.datastructures import Headers
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from tllm.api.answers import Call
from tllm.api.bodies import CALL_KEY
from tllm.api.errors import ClientGone
from tllm.api.guard import cors_headers, preflight_headers, refuse_keyless, refuse_stranger
from tllm.api.metrics import UNMATCHED
from tllm.api.sse import reply_for_any
from tllm.api.state import ApiState
from tllm.api.traced import TracedRequests

logger = logging.getLogger(__name__)

TRACE_HEADER = "x-tllm-trace"  # in a request, "1"; in its answer, where the trace will be
CLIENT_CLOSED = 499  # never sent: the client is gone; it counts such requests apart from answered ones
_REQUEST_ID = re.compile(r"[\x21-\x7e]{1,128}")
_SLASHES = re.compile(r"/{2,}")
_ALIAS = re.compile(r"/(?:chat/completions|completions|models(?:/.+)?)")


class Edge:
    """Wraps the routed application."""

    def __init__(self, app: ASGIApp, state: ApiState) -> None:
        self._app = app
        self._state = state

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        match scope["type"]:
            case "http":
                await self._http(scope, receive, send)
            case "websocket":  # nothing here speaks it, and it would come in past the key
                await receive()
                await send({"type": "websocket.close", "code": 1008})
            case _:
                await self._app(scope, receive, send)

    async def _http(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = Headers(scope=scope)
        asked_id = headers.get("x-request-id", "")
        call = Call(
            request_id=asked_id if _REQUEST_ID.fullmatch(asked_id) else f"req_{secrets.token_hex(12)}",
            arrived_s=time.perf_counter(),
            is_traced=headers.get(TRACE_HEADER, "") not in ("", "0"),
        )
        scope[CALL_KEY] = call
        scope["path"] = canonical_path(scope["path"])
        sender = _Sender(send, call, cors_headers(headers, self._state), self._state.traced)
        status = CLIENT_CLOSED
        try:
            await self._answer(scope, receive, sender, headers)
            status = sender.status
        except ClientGone:
            logger.info("request %s: the client closed its connection", call.request_id)
        except Exception as error:  # the request's boundary
            reply = reply_for_any(error, call.request_id)
            status = reply.status
            if sender.status:
                raise  # half a response is out: only closing the connection tells the client
            await reply.response()(scope, receive, sender)
        finally:
            handler = getattr(scope.get("route"), "path", UNMATCHED)
            self._state.metrics.observe_http(handler, scope["method"], status, time.perf_counter() - call.arrived_s)

    async def _answer(self, scope: Scope, receive: Receive, sender: _Sender, headers: Headers) -> None:
        reply = refuse_stranger(headers, self._state)
        if reply is None and scope["method"] == "OPTIONS":
            await Response(None, 204, dict(preflight_headers(headers, self._state)))(scope, receive, sender)
            return
        reply = reply or refuse_keyless(headers, scope["path"], self._state)
        if reply is not None:
            await reply.response()(scope, receive, sender)
        else:
            await self._app(scope, receive, sender)


class _Sender:
    """Adds the headers that every response has, and remembers its status (0: none was sent)."""

    def __init__(self, send: Send, call: Call, extra: list[tuple[str, str]], traced: TracedRequests) -> None:
        self._send = send
        self._call = call
        self._extra = extra
        self._traced = traced
        self.status = 0

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            elapsed_ms = round((time.perf_counter() - self._call.arrived_s) * 1000)
            added = [
                ("x-request-id", self._call.request_id),
                ("openai-processing-ms", str(elapsed_ms)),
                *self._extra,
            ]
            if self._call.is_traced and self._traced.find(self._call.request_id) is not None:
                added.append((TRACE_HEADER, f"/tllm/v1/traces/{quote(self._call.request_id, safe='')}"))
            message["headers"] = [
                *message.get("headers", ()),
                *((name.encode("latin-1"), value.encode("latin-1")) for name, value in added),
            ]
        await self._send(message)


def canonical_path(path: str) -> str:
    """The one spelling of a path that the routes know."""
    path = _SLASHES.sub("/", path)
    if len(path) > 1:
        path = path.removesuffix("/")
    return f"/v1{path}" if _ALIAS.fullmatch(path) else path
