"""Join tokens: what a person copies from the head to a new machine, and the head's list of those it gave.

    tllm1. + base64url( id 4 bytes | secret 16 bytes | pin of the head's key 16 bytes )

The pin says which head a newcomer may believe, the secret says to that head that the newcomer was invited, and the id
is public: certificates carry it, so that revoking a token revokes everybody who came by it.

This file does not know how a secret is proved, or who is connected.
"""

from __future__ import annotations

import base64
import binascii
import json
import os
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from typing import Literal

from tllm.core.errors import ConfigError
from tllm.transport.trust import PIN_BYTES, Authority, locked, read_private, write_private

DEFAULT_LABEL = "default"
SECRET_BYTES = 16
_PREFIX = "tllm1."
_ID_BYTES = 4
_MAX_FILE_BYTES = 16 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class JoinToken:
    """What a newcomer holds."""

    token_id: str
    secret: bytes = field(repr=False)
    pin: bytes

    @property
    def text(self) -> str:
        data = bytes.fromhex(self.token_id) + self.secret + self.pin
        return _PREFIX + base64.urlsafe_b64encode(data).decode()

    @classmethod
    def parse(cls, text: str) -> JoinToken:
        """Raises ConfigError, which never repeats what was given: it may be most of a secret."""
        bare = text.strip()
        try:
            data = base64.b64decode(bare.removeprefix(_PREFIX), altchars=b"-_", validate=True)
        except (binascii.Error, ValueError):
            data = b""
        if not bare.startswith(_PREFIX) or len(data) != _ID_BYTES + SECRET_BYTES + PIN_BYTES:
            raise ConfigError(
                f"the join token is not one: it has {len(bare)} characters, where a token begins with {_PREFIX} and "
                "has 54. Copy it as `tllm serve` or `tllm token new` on the head's machine prints it."
            )
        secret_end = _ID_BYTES + SECRET_BYTES
        return cls(token_id=data[:_ID_BYTES].hex(), secret=data[_ID_BYTES:secret_end], pin=data[secret_end:])


@dataclass(frozen=True, slots=True, kw_only=True)
class Token:
    """One token as the head keeps it. Times are seconds since the epoch."""

    id: str
    secret: str = field(repr=False)  # hex
    label: str
    created_s: float
    expires_s: float | None  # nobody joins by it after that; who did before stays
    revoked: bool

    def state(self, now_s: float) -> Literal["valid", "expired", "revoked"]:
        if self.revoked:
            return "revoked"
        return "valid" if self.expires_s is None or now_s < self.expires_s else "expired"


class TokenStore:
    """The join tokens of a cluster, in a file beside its authority that is read again whenever it changed, so that
    `tllm token` needs no running head, and a running head no restart."""

    def __init__(self, authority: Authority, *, clock: Callable[[], float] = time.time) -> None:
        self._pin = authority.pin
        self._path = authority.directory / "tokens.json"
        self._clock = clock
        self._seen: tuple[int, int, int] | None = None
        self._tokens: dict[str, Token] = {}

    def tokens(self) -> tuple[Token, ...]:
        """All of them, oldest first; revoked ones stay in the list. Raises ConfigError when the file is damaged."""
        try:
            status = os.stat(self._path)
        except FileNotFoundError:
            self._seen, self._tokens = None, {}
            return ()
        seen = (status.st_ino, status.st_mtime_ns, status.st_size)
        if seen != self._seen:
            self._tokens = self._read()
            self._seen = seen
        return tuple(self._tokens.values())

    def find(self, token_id: str) -> Token | None:
        self.tokens()
        return self._tokens.get(token_id)

    def text(self, token: Token) -> str:
        """What a newcomer needs."""
        return JoinToken(token_id=token.id, secret=bytes.fromhex(token.secret), pin=self._pin).text

    def new(self, label: str = "", ttl_s: float | None = None) -> str:
        """The text of a new token, by which any number of machines may join, for `ttl_s`."""
        if ttl_s is not None and not 0 < ttl_s < float("inf"):
            raise ConfigError(f"a token's time is {ttl_s:g} s; it must be more than 0.")
        with locked(self._path.parent):
            return self.text(self._add(label, ttl_s))

    def default(self) -> str:
        """The text of the token that `tllm serve` prints: made on first use, and again when it was revoked."""
        with locked(self._path.parent):
            for token in self.tokens():
                if token.label == DEFAULT_LABEL and token.expires_s is None and not token.revoked:
                    return self.text(token)
            return self.text(self._add(DEFAULT_LABEL, None))

    def revoke(self, token_id: str) -> None:
        """Nobody joins by it any more, and a head that asks `is_revoked` parts with those who did. Raises ConfigError
        when there is no such token."""
        with locked(self._path.parent):
            token = self.find(token_id)
            if token is None:
                raise ConfigError(f"there is no token {token_id!r}; `tllm token ls` lists them.")
            self._write({**self._tokens, token_id: replace(token, revoked=True)})

    def is_revoked(self, token_id: str) -> bool:
        """Whether who joined by it may not stay. A token that is not in the file any more counts as revoked; the empty
        id, of those who came over a Unix socket, never does."""
        if not token_id:
            return False
        token = self.find(token_id)
        return token is None or token.revoked

    def _add(self, label: str, ttl_s: float | None) -> Token:
        self.tokens()
        now_s = self._clock()
        token_id = os.urandom(_ID_BYTES).hex()
        while token_id in self._tokens:
            token_id = os.urandom(_ID_BYTES).hex()
        token = Token(
            id=token_id,
            secret=os.urandom(SECRET_BYTES).hex(),
            label=label,
            created_s=now_s,
            expires_s=None if ttl_s is None else now_s + ttl_s,
            revoked=False,
        )
        self._write({**self._tokens, token_id: token})
        return token

    def _write(self, tokens: dict[str, Token]) -> None:
        content = {"tokens": [asdict(token) for token in tokens.values()]}
        write_private(self._path, json.dumps(content, indent=1).encode())
        self.tokens()

    def _read(self) -> dict[str, Token]:
        try:
            data = read_private(self._path)
            entries = json.loads(data[:_MAX_FILE_BYTES])["tokens"]
            tokens = [_parse(entry) for entry in entries]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ConfigError(
                f"{self._path} cannot be read as a list of join tokens ({type(error).__name__}). "
                "Restore it, or delete it: then every node must join again by a new token."
            ) from error
        return {token.id: token for token in tokens}


def _parse(entry: dict[str, object]) -> Token:
    """Raises ValueError, KeyError or TypeError for what no store wrote."""
    match entry:
        case {
            "id": str(token_id),
            "secret": str(secret),
            "label": str(label),
            "created_s": float() | int() as created_s,
            "expires_s": None | float() | int() as expires_s,
            "revoked": bool(revoked),
        } if len(bytes.fromhex(token_id)) == _ID_BYTES and len(bytes.fromhex(secret)) == SECRET_BYTES:
            return Token(
                id=token_id, secret=secret, label=label, created_s=created_s, expires_s=expires_s, revoked=revoked
            )
    raise ValueError("not a token")
