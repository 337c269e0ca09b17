"""A light client of OpenAI-compatible servers: what a stream brought, and when.

It shares processors with the server under test, so it does little: asyncio's sockets, h11 for HTTP, one look at every
frame. A frame costs 32 µs of a processor where a few streams run and 18 where many do, its JSON included, which is what
asyncio's sockets cost alone; httpx's streams take 110 and 40 without the JSON (measured on two shared cores).

Rules:
    Times are of the event loop's clock. A frame's is taken when its bytes are handed over, before anything reads them.
    Tokens of a frame are counted where the server says them: by ids, or by usage in every frame. Never by text.
    Connections are kept and used again. One that the server closed in between is replaced, once for a request.
    What a server does wrong is a Failure in the reply, not an exception.

This file does not know workloads, nor what is concluded from times.
"""

from __future__ import annotations

import asyncio
import json
import ssl
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any
from urllib.parse import urlsplit

import h11

from tllm.core.errors import ConfigError, TransportError, UnavailableError

_CONNECT_S = 10.0
_MAX_QUOTE = 200  # characters of what a server said


class Endpoint(StrEnum):
    COMPLETIONS = "completions"
    CHAT = "chat"

    @property
    def path(self) -> str:
        match self:
            case Endpoint.COMPLETIONS:
                return "/v1/completions"
            case Endpoint.CHAT:
                return "/v1/chat/completions"


class FailureKind(StrEnum):
    """What can become of a request; the value is for records."""

    UNREACHABLE = "unreachable"
    TIMEOUT = "timeout"
    UNAUTHORIZED = "unauthorized"
    NOT_FOUND = "not_found"
    TOO_MANY = "too_many"
    UNAVAILABLE = "unavailable"
    REFUSED = "refused"
    SERVER_ERROR = "server_error"
    BROKEN = "broken"
    FAILED = "failed"
    NONSENSE = "nonsense"
    EMPTY = "empty"


@dataclass(frozen=True, slots=True, kw_only=True)
class Failure:
    kind: FailureKind
    message: str  # the server's words where it had any


@dataclass(frozen=True, slots=True)
class Frame:
    """An event that brought text or tokens; `num_tokens` is None where the server does not say."""

    at_s: float
    num_tokens: int | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Usage:
    """As the server counted."""

    num_prompt_tokens: int
    num_answer_tokens: int
    num_cached_tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Reply:
    """What became of one request. Frames that came before a failure are kept."""

    sent_s: float
    ended_s: float
    frames: tuple[Frame, ...] = ()
    usage: Usage | None = None
    finish_reason: str | None = None
    failure: Failure | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Model:
    """As /v1/models lists it."""

    name: str
    owner: str


@dataclass(slots=True)
class Events:
    """One streamed answer, read as its bytes come."""

    frames: list[Frame] = field(default_factory=list)
    usage: Usage | None = None
    finish_reason: str | None = None
    failure: Failure | None = None
    is_done: bool = False
    _rest: bytes = b""
    _num_counted: int | None = 0  # answer tokens, by the usage of the last frame; None once a frame had none

    def feed(self, at_s: float, data: bytes) -> None:
        """Take bytes that came at `at_s`, cut anywhere."""
        *lines, self._rest = (self._rest + data).split(b"\n")
        for line in lines:
            if line.startswith(b"data:"):
                self._take(at_s, line[5:].strip())

    def _take(self, at_s: float, payload: bytes) -> None:
        if payload == b"[DONE]":
            self.is_done = True
            return
        made = _object(payload)
        if made is None:
            self.failure = Failure(kind=FailureKind.NONSENSE, message=f"An event is {_quote(payload)}.")
            return
        if made.get("error"):
            self.failure = Failure(kind=FailureKind.FAILED, message=_said(made) or _quote(payload))
            return
        choices = made.get("choices") or ()
        num_tokens = self._count(made, has_choices=bool(choices))
        for choice in choices:
            self.finish_reason = choice.get("finish_reason") or self.finish_reason
            ids = choice.get("token_ids")
            if ids is not None:
                num_tokens = len(ids)
            if num_tokens is None and _has_text(choice):
                self._num_counted = None
                self.frames.append(Frame(at_s, None))
            elif num_tokens:
                self.frames.append(Frame(at_s, num_tokens))

    def _count(self, made: dict[str, Any], *, has_choices: bool) -> int | None:
        """Read a frame's usage; how many tokens it has more than the last one. None where it cannot be known."""
        usage = made.get("usage")
        if not isinstance(usage, dict):
            return None
        details = usage.get("prompt_tokens_details") or {}
        self.usage = Usage(
            num_prompt_tokens=int(usage.get("prompt_tokens") or 0),
            num_answer_tokens=int(usage.get("completion_tokens") or 0),
            num_cached_tokens=int(details.get("cached_tokens") or 0),
        )
        if not has_choices or self._num_counted is None:  # a sum at the end, not a count in every frame
            return None
        num_new = self.usage.num_answer_tokens - self._num_counted
        self._num_counted = self.usage.num_answer_tokens
        return num_new


class Client:
    """Requests to one server, as many at once as are made."""

    def __init__(
        self,
        url: str,
        *,
        api_key: str | None = None,
        headers: Mapping[str, str] | None = None,
        timeout_s: float | None = None,
    ) -> None:
        """`url` is with or without the `/v1` that servers print; `timeout_s` is for a whole answer.

        Raises ConfigError for a URL, a key or a header that cannot be sent.
        """
        self.url = url.rstrip("/").removesuffix("/v1")
        try:
            parts = urlsplit(self.url)
            port = parts.port
        except ValueError as error:
            raise _not_a_url(url) from error
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise _not_a_url(url)
        self._host = parts.hostname
        self._ssl = ssl.create_default_context() if parts.scheme == "https" else None
        self._port = port or (443 if self._ssl else 80)
        self._prefix = parts.path
        self._timeout_s = timeout_s
        key = {"authorization": f"Bearer {api_key}"} if api_key else {}
        own = {"host": parts.netloc.rpartition("@")[2], "accept": "*/*", "content-type": "application/json"}
        self._headers = [*{**own, **key, **(headers or {})}.items()]
        try:
            self._request("GET", "/", b"")
        except (h11.LocalProtocolError, UnicodeEncodeError) as error:
            raise ConfigError(f"A header or the API key cannot be sent over HTTP: {error}.") from error
        self._idle: list[_Connection] = []

    async def ask(self, endpoint: Endpoint, body: bytes) -> Reply:
        """Stream one answer to its end. Cancelling this closes its connection, which aborts the request."""
        clock = asyncio.get_running_loop().time
        begun_s = clock()
        events = Events()
        exchange = _Exchange(on_event=events.feed)
        failure: Failure | None = None
        try:
            async with asyncio.timeout(self._timeout_s):
                await self._exchange("POST", endpoint.path, body, exchange)
        except TimeoutError:
            what = f"after {self._timeout_s:g} s" if self._timeout_s else "in time"
            failure = Failure(kind=FailureKind.TIMEOUT, message=f"The answer was not complete {what}.")
        except _UnreachableError as error:
            failure = Failure(kind=FailureKind.UNREACHABLE, message=str(error))
        except _BrokenError as error:
            failure = Failure(kind=FailureKind.BROKEN, message=str(error))
        return Reply(
            sent_s=exchange.sent_s if exchange.sent_s is not None else begun_s,
            ended_s=clock(),
            frames=tuple(events.frames),
            usage=events.usage,
            finish_reason=events.finish_reason,
            failure=failure or exchange.failure() or _failure_of(events),
        )

    async def models(self) -> tuple[Model, ...]:
        """What the server lists. Raises TransportError or UnavailableError."""
        listed = await self._json("GET", "/v1/models", b"")
        try:
            return tuple(Model(name=str(each["id"]), owner=str(each.get("owned_by"))) for each in listed["data"] or ())
        except (KeyError, TypeError, AttributeError) as error:
            raise _stranger(self.url) from error

    async def tokenize(self, model: str, text: str) -> tuple[int, ...] | None:
        """The text's token ids; None where the server has no such endpoint."""
        # `prompt` is vLLM's and tllm's name, `content` is llama.cpp's.
        body = json.dumps({"model": model, "prompt": text, "content": text, "add_special_tokens": False})
        try:
            made = await self._json("POST", "/tokenize", body.encode())
        except (TransportError, UnavailableError):
            return None
        ids = made.get("tokens")
        return tuple(ids) if isinstance(ids, list) and all(isinstance(each, int) for each in ids) else None

    def close(self) -> None:
        while self._idle:
            self._idle.pop().close()

    async def _json(self, method: str, path: str, body: bytes) -> dict[str, Any]:
        exchange = _Exchange(on_event=None)
        try:
            async with asyncio.timeout(self._timeout_s):
                await self._exchange(method, path, body, exchange)
        except TimeoutError as error:
            raise TransportError(f"{self.url}{path} did not answer within {self._timeout_s:g} s.") from error
        except (_UnreachableError, _BrokenError) as error:
            what = f"{error} Check the URL (http://HOST:PORT) and that the server runs."
            raise TransportError(what) from error.__cause__
        if failure := exchange.failure():
            raise UnavailableError(f"{failure.message} {ADVICE[failure.kind]}", state="failed")
        made = _object(exchange.body)
        if made is None:
            raise _stranger(self.url)
        return made

    async def _exchange(self, method: str, path: str, body: bytes, exchange: _Exchange) -> None:
        """Raises _UnreachableError or _BrokenError; the connection is then closed."""
        request = self._request(method, self._prefix + path, body)
        while self._idle:
            connection = self._idle.pop()
            if not connection.is_open:
                continue
            try:
                await self._run(connection, request, body, exchange)
            except _BrokenError:
                if connection.has_read:
                    raise
                break  # closed by the server while nobody used it, which only a request finds out
            return
        connection = await self._connect()
        await self._run(connection, request, body, exchange)

    async def _run(self, connection: _Connection, request: h11.Request, body: bytes, exchange: _Exchange) -> None:
        try:
            await connection.run(request, body, exchange)
        except BaseException:
            connection.close()
            raise
        if connection.is_open:
            self._idle.append(connection)

    async def _connect(self) -> _Connection:
        loop = asyncio.get_running_loop()
        try:
            async with asyncio.timeout(_CONNECT_S):
                _, connection = await loop.create_connection(
                    lambda: _Connection(loop.time), self._host, self._port, ssl=self._ssl
                )
        except (OSError, TimeoutError) as error:  # name, connection or certificate
            raise _UnreachableError(f"There is no connection to {self.url}: {error or 'it took too long'}.") from error
        return connection

    def _request(self, method: str, path: str, body: bytes) -> h11.Request:
        headers = [*self._headers, ("content-length", str(len(body)))]
        return h11.Request(method=method, target=path, headers=headers)


# What a person can do about each.
ADVICE: Mapping[FailureKind, str] = {
    FailureKind.UNREACHABLE: "Check the URL and that the server runs.",
    FailureKind.TIMEOUT: "Give --timeout more, or ask for less at once.",
    FailureKind.UNAUTHORIZED: "Give the server's key with --api-key or TLLM_API_KEY.",
    FailureKind.NOT_FOUND: "Check --model against /v1/models, and that the server has this --endpoint.",
    FailureKind.TOO_MANY: "The server's queue is full: lower --request-rate or --concurrency.",
    FailureKind.UNAVAILABLE: "The server is loading, draining or without what it needs: try again later.",
    FailureKind.REFUSED: "Check --input-len and --output-len against the model's context.",
    FailureKind.SERVER_ERROR: "Look at the server's log.",
    FailureKind.BROKEN: "Look at the server's log.",
    FailureKind.FAILED: "Look at the server's log.",
    FailureKind.NONSENSE: "Check that the URL is that of a model server.",
    FailureKind.EMPTY: "The model ended at once; --ignore-eos asks for answers of full length.",
}


class _UnreachableError(Exception):
    pass


class _BrokenError(Exception):
    pass


@dataclass(slots=True, kw_only=True)
class _Exchange:
    """A request's way there and back."""

    on_event: Callable[[float, bytes], None] | None  # takes the bytes of an event stream
    sent_s: float | None = None
    status: int = 0
    is_stream: bool = False
    body: bytes = b""  # of what is no event stream

    def begin(self, response: h11.Response) -> None:
        self.status = response.status_code
        kind = next((value for name, value in response.headers if name == b"content-type"), b"")
        self.is_stream = self.status == 200 and kind.startswith(b"text/event-stream")

    def take(self, at_s: float, data: bytes) -> None:
        if self.is_stream and self.on_event is not None:
            self.on_event(at_s, data)
        else:
            self.body += data

    def failure(self) -> Failure | None:
        if self.status == 200 and (self.is_stream or self.on_event is None):
            return None
        made = _object(self.body)
        said = (_said(made) if made is not None else "") or _quote(self.body)
        return Failure(kind=_kind_of(self.status), message=f"HTTP {self.status}: {said}")


class _Connection(asyncio.Protocol):
    """One connection, one exchange at a time."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._wire = h11.Connection(h11.CLIENT)
        self._transport: asyncio.Transport | None = None
        self._exchange: _Exchange | None = None
        self._ended: asyncio.Future[None] | None = None
        self.has_read = False  # anything of the present exchange
        self.is_open = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        self.is_open = True

    async def run(self, request: h11.Request, body: bytes, exchange: _Exchange) -> None:
        """Raises _BrokenError when the connection ends before the exchange does."""
        assert self._transport is not None
        self._exchange, self.has_read = exchange, False
        self._ended = asyncio.get_running_loop().create_future()
        head = self._wire.send(request)
        content = self._wire.send(h11.Data(data=body)) if body else b""
        end = self._wire.send(h11.EndOfMessage())
        exchange.sent_s = self._clock()
        self._transport.write(b"".join(part for part in (head, content, end) if part))
        await self._ended

    def close(self) -> None:
        self.is_open = False
        if self._transport is not None:
            self._transport.abort()

    def data_received(self, data: bytes) -> None:
        at_s = self._clock()
        self.has_read = True
        self._wire.receive_data(data)
        self._read(at_s)

    def connection_lost(self, error: Exception | None) -> None:
        self.is_open = False
        if self._ended is not None and not self._ended.done():
            self._wire.receive_data(b"")  # which ends an answer of no stated length
            self._read(self._clock())
            self._end(_BrokenError(f"The connection was lost{f': {error}' if error else ''}."))

    def _read(self, at_s: float) -> None:
        try:
            while True:
                event = self._wire.next_event()
                if self._exchange is None:  # nothing was asked, such as when a server says why it closes
                    self.close()
                    return
                if isinstance(event, h11.Data):
                    self._exchange.take(at_s, bytes(event.data))
                elif isinstance(event, h11.Response):
                    self._exchange.begin(event)
                elif isinstance(event, h11.EndOfMessage):
                    self._recycle()
                    self._end(None)
                    return
                elif not isinstance(event, h11.InformationalResponse):
                    return  # more has to come
        except h11.RemoteProtocolError as error:
            self.close()
            self._end(_BrokenError(f"The connection ended or spoke something else than HTTP: {error}."))

    def _recycle(self) -> None:
        if self.is_open and self._wire.our_state is h11.DONE and self._wire.their_state is h11.DONE:
            self._wire.start_next_cycle()
        else:
            self.close()

    def _end(self, error: _BrokenError | None) -> None:
        self._exchange = None
        if self._ended is None or self._ended.done():
            return
        if error is None:
            self._ended.set_result(None)
        else:
            self._ended.set_exception(error)


def _failure_of(events: Events) -> Failure | None:
    if events.failure is not None:
        return events.failure
    if not events.is_done and events.finish_reason is None:
        return Failure(kind=FailureKind.BROKEN, message="The stream ended without its end.")
    if not events.frames:
        return Failure(kind=FailureKind.EMPTY, message="The answer has no token.")
    return None


def _kind_of(status: int) -> FailureKind:
    match status:
        case 401 | 403:
            return FailureKind.UNAUTHORIZED
        case 404 | 405:
            return FailureKind.NOT_FOUND
        case 429:
            return FailureKind.TOO_MANY
        case 503:
            return FailureKind.UNAVAILABLE
    if 400 <= status < 500:
        return FailureKind.REFUSED
    return FailureKind.SERVER_ERROR if status >= 500 else FailureKind.NONSENSE


def _has_text(choice: Mapping[str, Any]) -> bool:
    if choice.get("text"):
        return True
    delta = choice.get("delta") or {}
    return any(delta.get(name) for name in ("content", "reasoning_content", "reasoning", "tool_calls"))


def _object(payload: bytes) -> dict[str, Any] | None:
    try:
        made = json.loads(payload)
    except ValueError:
        return None
    return made if isinstance(made, dict) else None


def _said(made: Mapping[str, Any]) -> str:
    error = made.get("error")
    said = error.get("message") if isinstance(error, dict) else error or made.get("detail") or made.get("message")
    return str(said or "")[:_MAX_QUOTE]


def _quote(raw: bytes) -> str:
    return repr(raw[:_MAX_QUOTE].decode(errors="replace"))


def _not_a_url(url: str) -> ConfigError:
    return ConfigError(f"{url!r} is not a URL. Write it as the server prints it: http://HOST:PORT.")


def _stranger(url: str) -> TransportError:
    return TransportError(f"{url} does not answer as the OpenAI API does. Check that it is a model server's URL.")


def parse_headers(texts: Sequence[str]) -> Mapping[str, str]:
    """`Name: value`, each. Raises ConfigError."""
    headers = {}
    for text in texts:
        name, colon, value = text.partition(":")
        if not colon or not name.strip():
            raise ConfigError(f"The header {text!r} has no name. Write it as 'Name: value'.")
        headers[name.strip().lower()] = value.strip()
    return headers
