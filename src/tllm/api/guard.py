"""Who may talk to this server at all: Host and Origin on loopback, keys, other sites' pages.

Rules:
    Bound to loopback, a Host that is no loopback name is refused: a page of another site may have rebound its own
    name to this machine (DNS rebinding). So is an Origin of another site, unless the operator listed it.
    With keys configured, every path needs one but the three that say only whether the server lives, and the one that
    tells nodes where to prove themselves.
    Keys are compared in constant time, all of them.

This file does not know routes or bodies.
"""

from __future__ import annotations

import hmac
import ipaddress
from urllib.parse import urlsplit

from starlette.datastructures import Headers

from tllm.api.errors import ErrorReply, forbidden, unauthorized
from tllm.api.state import ApiState

OPEN_PATHS = frozenset(("/health", "/live", "/ready"))
PREFLIGHT_MAX_AGE_S = 600
EXPOSED_HEADERS = "x-request-id, openai-processing-ms, retry-after, retry-after-ms, x-should-retry"


def refuse_stranger(headers: Headers, state: ApiState) -> ErrorReply | None:
    """The refusal of a Host or Origin that has no business here, or None."""
    is_loopback = is_loopback_name(state.bind_host)
    if not (is_loopback or state.allowed_hosts):
        return None
    host = headers.get("host")
    if host is not None and not _is_own_host(_host_of(host), state):
        return forbidden(
            f"The Host {host[:100]!r} is not a name of this server. Use 127.0.0.1 or localhost, or have the server's "
            "operator allow that host.",
            code="host_not_allowed",
        )
    origin = headers.get("origin")
    if origin is None or not is_loopback or is_origin_allowed(origin, state):
        return None
    if _is_own_host(_origin_host(origin), state):
        return None
    return forbidden(
        f"Pages of {origin[:100]!r} may not use this server. Its operator can allow that origin (CORS).",
        code="origin_not_allowed",
    )


def refuse_keyless(headers: Headers, path: str, state: ApiState) -> ErrorReply | None:
    """The refusal of a request without one of the keys, or None. Without configured keys any will do."""
    if not state.api_keys or path in OPEN_PATHS:
        return None
    scheme, _, bearer = headers.get("authorization", "").partition(" ")
    given = (
        bearer.strip() if scheme.lower() == "bearer" else "",
        headers.get("x-api-key", ""),
        headers.get("api-key", ""),
    )
    # A header is bytes, which the framework reads as Latin-1; a key is text, which clients send as UTF-8.
    matches = [
        hmac.compare_digest(one.encode("latin-1"), key.encode()) for one in given if one for key in state.api_keys
    ]
    return None if any(matches) else unauthorized()


def is_origin_allowed(origin: str, state: ApiState) -> bool:
    """Whether the operator lets pages of `origin` read answers."""
    return "*" in state.cors_origins or origin in state.cors_origins


def cors_headers(headers: Headers, state: ApiState) -> list[tuple[str, str]]:
    """What a browser needs to hand the answer to an allowed page; nothing for others."""
    origin = headers.get("origin")
    if origin is None or not state.cors_origins or not is_origin_allowed(origin, state):
        return []
    return [
        ("access-control-allow-origin", origin),
        ("access-control-expose-headers", EXPOSED_HEADERS),
        ("vary", "Origin"),
    ]


def preflight_headers(headers: Headers, state: ApiState) -> list[tuple[str, str]]:
    """The answer to OPTIONS. Preflights carry no key and get no data."""
    made = [("allow", "GET, POST, OPTIONS")]
    if "access-control-request-method" in headers and cors_headers(headers, state):
        made += [
            ("access-control-allow-methods", "GET, POST, OPTIONS"),
            ("access-control-allow-headers", headers.get("access-control-request-headers", "*")),
            ("access-control-max-age", str(PREFLIGHT_MAX_AGE_S)),
        ]
        if headers.get("access-control-request-private-network") == "true":
            made.append(("access-control-allow-private-network", "true"))
    return made


def is_loopback_name(host: str) -> bool:
    """Whether `host` can only mean this machine: a loopback address, localhost, or a name under it (RFC 6761)."""
    if host == "localhost" or host.endswith(".localhost"):
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _is_own_host(host: str, state: ApiState) -> bool:
    if is_loopback_name(host):
        return True
    return host == state.bind_host.lower() or host in {allowed.lower() for allowed in state.allowed_hosts}


def _host_of(header: str) -> str:
    """The Host header without its port, in lower case; `[::1]:80` is `::1`."""
    host = header.strip().lower()
    if host.startswith("["):
        return host[1:].partition("]")[0]
    return host.partition(":")[0].removesuffix(".")


def _origin_host(origin: str) -> str:
    """The host of an origin; empty for `null` and for what is not a URL of the web."""
    try:
        parts = urlsplit(origin)
        return (parts.hostname or "") if parts.scheme in ("http", "https") else ""
    except ValueError:
        return ""
