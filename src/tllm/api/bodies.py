"""Reading a request's body within bounds, and writing JSON.

This file does not know what any body means.
"""

from __future__ import annotations

import asyncio
import json
from json.encoder import encode_basestring
from typing import TypeVar

from starlette.requests import Request
from starlette.responses import Response

from tllm.api.answers import Call
from tllm.api.errors import ClientGone, RefusedError, body_too_large, body_too_slow
from tllm.api.refusals import REFUSED
from tllm.api.schema import Body, ignored_fields, parse
from tllm.api.state import ApiState

CALL_KEY = "tllm.call"  # where the edge leaves the Call in a request's scope

# Compact, and text as it is: the response is UTF-8.
dumps = json.JSONEncoder(ensure_ascii=False, separators=(",", ":"), allow_nan=False).encode
quote = encode_basestring

AnyBody = TypeVar("AnyBody", bound=Body)


def call_of(request: Request) -> Call:
    """The call that the edge noted for this request."""
    call = request.scope[CALL_KEY]
    assert isinstance(call, Call)
    return call


def json_response(content: object) -> Response:
    return Response(dumps(content).encode(), media_type="application/json")


async def read(kind: type[AnyBody], request: Request, state: ApiState) -> AnyBody:
    """The request's body as a `kind`, whatever its content type says.

    Never holds more than the limit, whatever Content-Length says. Raises RefusedError when the body is too large or
    too slow, ClientGone, and RequestError naming the field that is wrong. Fields without effect are logged by name.
    """
    limits = state.limits
    try:
        async with asyncio.timeout(limits.body_timeout_s):
            data = await _bytes(request, limits.max_body_bytes)
    except TimeoutError:
        raise RefusedError(body_too_slow(limits.body_timeout_s)) from None
    body = parse(kind, data)
    state.note_ignored(name for name in ignored_fields(body) if name not in REFUSED)
    return body


async def _bytes(request: Request, max_bytes: int) -> bytes:
    declared = request.headers.get("content-length", "")
    num_bytes = int(declared) if declared.isascii() and declared.isdigit() and len(declared) < 20 else 0
    too_large = num_bytes > max_bytes
    parts: list[bytes] = []
    num_bytes = 0
    while not too_large:
        message = await request.receive()
        if message["type"] == "http.disconnect":
            raise ClientGone
        parts.append(message.get("body", b""))
        num_bytes += len(parts[-1])
        if num_bytes > max_bytes:
            too_large = True
        elif not message.get("more_body", False):
            return b"".join(parts)
    raise RefusedError(body_too_large(max_bytes))
