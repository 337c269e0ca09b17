"""How an error looks over HTTP: one shape, OpenAI's words, and whether trying again can help.

    {"error": {"message", "type", "param", "code"}}

Every error of `tllm.core.errors` has a reply here; what is not in that tree is a bug and becomes a 500 without detail.
This file does not know which request failed, nor who reads the reply.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from starlette.responses import Response

from tllm.core.errors import (
    GenerationError,
    ModelError,
    PlanError,
    QueueFullError,
    RequestError,
    TllmError,
    UnavailableError,
    UserError,
)


class ModelNotFoundError(RequestError):
    """No model of that name is served; a 404."""

    def __init__(self, name: str, available: tuple[str, ...]) -> None:
        super().__init__(
            f"The model {name[:200]!r} does not exist here. Available: {listed(available)}.",
            param="model",
            code="model_not_found",
        )


UNAVAILABLE_WORDS: Mapping[str, str] = {
    "loading": "Loading model",
    "replanning": "Planning anew without the nodes that were lost",
    "degraded": "A node of this model was lost and nothing can be computed until it is replaced",
    "draining": "The server is draining and takes no new requests",
}


class ClientGone(Exception):  # noqa: N818  (an event, not a mistake of anybody)
    """The client closed its connection before it had its answer. Logged, never answered."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ErrorReply:
    """An error ready to be sent, as a whole response or as the last event of a stream."""

    status: int
    message: str
    type: str
    param: str | None = None
    code: str | int | None = None
    headers: tuple[tuple[str, str], ...] = field(default=())

    def body(self) -> bytes:
        """The JSON document."""
        error = {"message": self.message, "type": self.type, "param": self.param, "code": self.code}
        return json.dumps({"error": error}, ensure_ascii=False).encode("utf-8", "replace")

    def response(self) -> Response:
        return Response(self.body(), self.status, dict(self.headers), "application/json")


class RefusedError(Exception):
    """Carries a reply for which the tree has no error (body too large, deadline) up to the edge."""

    def __init__(self, reply: ErrorReply) -> None:
        super().__init__(reply.message)
        self.reply = reply


NEVER_HEALS = (("x-should-retry", "false"),)


def invalid_request(message: str, *, param: str | None = None, code: str | None = None) -> ErrorReply:
    """400: the request must be changed before it can succeed."""
    return ErrorReply(
        status=400, message=message, type="invalid_request_error", param=param, code=code, headers=NEVER_HEALS
    )


def unauthorized() -> ErrorReply:
    """401: no key, or not ours. Says nothing about which keys exist."""
    return ErrorReply(
        status=401,
        message="Missing or wrong API key. Send it as 'Authorization: Bearer KEY', 'x-api-key: KEY' or 'api-key: KEY'.",
        type="authentication_error",
        code="invalid_api_key",
        headers=(("www-authenticate", "Bearer"), *NEVER_HEALS),
    )


def forbidden(message: str, *, code: str) -> ErrorReply:
    """403: a browser was led here by a page that has no business with this server."""
    return ErrorReply(status=403, message=message, type="invalid_request_error", code=code, headers=NEVER_HEALS)


def not_found(message: str, *, param: str | None = None, code: str) -> ErrorReply:
    """404: no such model or route."""
    return ErrorReply(status=404, message=message, type="not_found_error", param=param, code=code, headers=NEVER_HEALS)


def method_not_allowed(method: str, path: str, allowed: str) -> ErrorReply:
    """405, with the methods that would do."""
    return ErrorReply(
        status=405,
        message=f"{path} does not take {method}; it takes {allowed}.",
        type="invalid_request_error",
        code="method_not_allowed",
        headers=(("allow", allowed), *NEVER_HEALS),
    )


def body_too_large(max_bytes: int) -> ErrorReply:
    """413. The connection is closed: what was not read stays unread."""
    return ErrorReply(
        status=413,
        message=f"The request's body is larger than {max_bytes} bytes, which is the limit here.",
        type="invalid_request_error",
        code="request_too_large",
        headers=(("connection", "close"), *NEVER_HEALS),
    )


def body_too_slow(timeout_s: float) -> ErrorReply:
    """408: the body did not arrive in time."""
    return ErrorReply(
        status=408,
        message=f"The request's body did not arrive within {timeout_s:.0f} s.",
        type="invalid_request_error",
        code="request_timeout",
        headers=(("connection", "close"),),
    )


def deadline_passed(timeout_s: float) -> ErrorReply:
    """504: the answer was not complete in the time that the server's operator allows."""
    return ErrorReply(
        status=504,
        message=f"The answer was not complete within {timeout_s:.0f} s, which is the limit here. Ask for fewer tokens.",
        type="server_error",
        code="deadline_exceeded",
        headers=NEVER_HEALS,
    )


def internal_error(request_id: str) -> ErrorReply:
    """500 for a bug of ours: the log knows more, the client learns the id to ask about."""
    return ErrorReply(
        status=500,
        message=f"The server failed in a way it does not understand. Its log says more about request {request_id}.",
        type="server_error",
        code="internal_error",
        headers=NEVER_HEALS,
    )


def reply_for(error: TllmError) -> ErrorReply:
    """The reply to any error of the tree; total over it."""
    match error:
        case QueueFullError():
            return ErrorReply(
                status=429,
                message=str(error),
                type="rate_limit_error",
                code=error.code,
                headers=_retry_after(error.retry_after_s),
            )
        case ModelNotFoundError():
            return not_found(str(error), param=error.param, code="model_not_found")
        case RequestError():
            return invalid_request(str(error), param=error.param, code=error.code)
        case UnavailableError():
            return ErrorReply(
                status=503,
                message=str(error),
                type="unavailable_error",
                code=503,
                headers=_retry_after(error.retry_after_s),
            )
        case PlanError():
            return ErrorReply(
                status=503, message=str(error), type="unavailable_error", code=503, headers=_retry_after(5.0)
            )
        case ModelError():
            return ErrorReply(
                status=500, message=str(error), type="server_error", code="model_error", headers=NEVER_HEALS
            )
        case UserError():
            return ErrorReply(
                status=500, message=str(error), type="server_error", code="configuration_error", headers=NEVER_HEALS
            )
        case GenerationError():
            return ErrorReply(status=500, message=str(error), type="server_error", code="generation_failed")
        case _:
            return ErrorReply(status=500, message=str(error), type="server_error", code="server_error")


def unavailable(state: str, retry_after_s: float) -> UnavailableError:
    """The error of a deployment or server in `state`, in the words clients know."""
    return UnavailableError(UNAVAILABLE_WORDS.get(state, state), state=state, retry_after_s=retry_after_s)


def listed(names: tuple[str, ...]) -> str:
    """Names for a message, not more than a person reads."""
    shown = ", ".join(repr(name) for name in names[:20])
    return shown if len(names) <= 20 else f"{shown} and {len(names) - 20} more"


def _retry_after(seconds: float) -> tuple[tuple[str, str], ...]:
    """Both spellings: whole seconds for everybody, milliseconds for the SDKs that look for them first."""
    return (("retry-after", str(max(1, math.ceil(seconds)))), ("retry-after-ms", str(max(1, round(seconds * 1000)))))
