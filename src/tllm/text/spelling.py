"""How tokens are spelled: the bytes each one stands for, and the text that a run of bytes makes.

The rules, which `Tokenizer.decode`, `Detokenizer` and the bytes of log-probabilities share:

1. A token's bytes follow from its piece (its entry in the vocabulary) and the `decoder` of tokenizer.json. They do not
   depend on its neighbours; only the first token of a text may be spelled differently (no leading space).
2. A text is the concatenation of its tokens' bytes, read as UTF-8. What is not UTF-8 becomes U+FFFD, one for each
   maximal subpart (Unicode Standard, section 3.9), however the bytes are spread over tokens.
3. Some decoders then strip spaces from the start of the text.

For byte-level vocabularies this is the tokenizers library's own result, whatever the ids. For vocabularies with byte
fallback it is too, as long as the bytes are UTF-8; of a run of byte tokens with a broken byte somewhere the library
replaces every byte, good characters included, which could only be known when the run ends: here the good ones stay.

This file does not know files, templates, or stop strings.
"""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Final

import tokenizers

from tllm.core.errors import ModelError
from tllm.core.types import TokenId

_UTF8_BYTES: Final = 4  # of the longest character
_BYTE_PIECE: Final = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_SUPPORTED: Final = (
    "ByteLevel, Metaspace, Replace of a string, ByteFallback, Fuse, Strip at the start after Fuse, Sequence"
)

_Json = object


def _byte_alphabet() -> dict[str, int]:
    """The characters that stand for bytes in byte-level vocabularies (GPT-2's `bytes_to_unicode`, inverted).

    Printable Latin-1 stands for itself; the other bytes, in order, are U+0100 and up.
    """
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(0x100 + index): byte for index, byte in enumerate(others)}


_BYTE_OF: Final = _byte_alphabet()


@dataclass(frozen=True, slots=True, kw_only=True)
class _Metaspace:
    """A character that stands for a space; at the start of a text it stands for nothing if `drop_first`."""

    char: str
    drop_first: bool

    def __call__(self, piece: str, is_first: bool) -> str:
        return piece.replace(self.char, "" if is_first and self.drop_first else " ")


@dataclass(frozen=True, slots=True, kw_only=True)
class _Replace:
    old: str
    new: str

    def __call__(self, piece: str, is_first: bool) -> str:
        return piece.replace(self.old, self.new)


def _joined(piece: str, is_first: bool) -> str:
    """Without a decoder, pieces are words."""
    return piece if is_first else f" {piece}"


class Spelling:
    """The bytes of every token of one vocabulary. Immutable, except for a cache.

    `strip_char` and `num_strip`: up to that many of that character are dropped from the start of a text.
    """

    def __init__(self, backend: tokenizers.Tokenizer) -> None:
        """Raises ModelError for a decoder whose result depends on more than rules 1 to 3."""
        self._backend = backend
        self._rewrites: list[Callable[[str, bool], str]] = []
        self._is_byte_level = False
        self._has_byte_fallback = False
        self.strip_char = " "
        self.num_strip = 0
        self._read(backend)
        self.special_ids = frozenset(
            TokenId(token) for token, added in backend.get_added_tokens_decoder().items() if added.special
        )
        self._bytes: dict[TokenId, bytes] = {}

    def _read(self, backend: tokenizers.Tokenizer) -> None:
        if backend.decoder is None:
            self._rewrites.append(_joined)
            return
        is_fused = False
        for step in _flatten(json.loads(backend.decoder.__getstate__())):
            match step:
                case {"type": "Fuse"}:
                    is_fused = True
                case {"type": "ByteLevel"} if not (is_fused or self._is_byte_level or self._has_byte_fallback):
                    self._is_byte_level = True
                case {"type": "ByteFallback"} if not (is_fused or self._is_byte_level):
                    self._has_byte_fallback = True
                case {"type": "Metaspace", "replacement": str(char), **rest} if not (is_fused or self._is_byte_level):
                    self._rewrites.append(_Metaspace(char=char, drop_first=rest.get("prepend_scheme") != "never"))
                case {"type": "Replace", "pattern": {"String": str(old)}, "content": str(new)} if not (
                    is_fused or self._is_byte_level
                ):
                    self._rewrites.append(_Replace(old=old, new=new))
                case {"type": "Strip", "content": str(char), "start": int(start), "stop": 0} if is_fused:
                    self.strip_char, self.num_strip = char, start
                case _:
                    raise ModelError(
                        f"tokenizer.json: the decoder step {json.dumps(step)} is not supported here. "
                        f"Supported are {_SUPPORTED}, and no decoder at all."
                    )

    def piece(self, token: TokenId) -> str | None:
        """The vocabulary's entry of `token`, or None: the id stands for nothing."""
        return self._backend.id_to_token(token)

    def token_bytes(self, token: TokenId) -> bytes:
        """What `token` adds to a text that has begun. Empty for an id that the vocabulary lacks."""
        known = self._bytes.get(token)
        if known is None:
            known = self._bytes[token] = self._spell(token, is_first=False)
        return known

    def first_bytes(self, token: TokenId) -> bytes:
        """What `token` adds as the first token of a text, before rule 3."""
        return self._spell(token, is_first=True)

    def _spell(self, token: TokenId, *, is_first: bool) -> bytes:
        piece = self.piece(token)
        if piece is None:
            return b""
        for rewrite in self._rewrites:
            piece = rewrite(piece, is_first)
        if self._is_byte_level:
            # A piece with any character outside the alphabet (an added token, say) is plain text.
            values = [_BYTE_OF.get(char) for char in piece]
            return bytes(value for value in values if value is not None) if None not in values else piece.encode()
        if self._has_byte_fallback and (byte := _BYTE_PIECE.fullmatch(piece)):
            return bytes([int(byte[1], 16)])
        return piece.encode()

    def is_visible(self, token: TokenId, *, skip_special_tokens: bool) -> bool:
        """Whether `token` takes part in a text at all; the first that does is the text's first token."""
        return not (skip_special_tokens and token in self.special_ids) and self.piece(token) is not None

    def text(self, tokens: Iterable[TokenId], *, skip_special_tokens: bool) -> str:
        """The whole text of `tokens`."""
        seen = (token for token in tokens if self.is_visible(token, skip_special_tokens=skip_special_tokens))
        first = next(seen, None)
        if first is None:
            return ""
        text = b"".join((self.first_bytes(first), *map(self.token_bytes, seen))).decode(errors="replace")
        num_leading = len(text) - len(text.lstrip(self.strip_char)) if self.num_strip else 0
        return text[min(num_leading, self.num_strip) :]


class TextStream:
    """`Spelling.text`, token by token: every piece of text comes out as soon as its last byte is in.

    The texts of all `push` and of `finish`, joined, are `Spelling.text` of all tokens; at any moment no more than an
    incomplete character (three bytes) is held back. `after` starts in the middle of a text.
    """

    def __init__(self, spelling: Spelling, *, skip_special_tokens: bool) -> None:
        self._spelling = spelling
        self._skipped = spelling.special_ids if skip_special_tokens else frozenset()
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._is_first = True
        self._num_strip = spelling.num_strip

    def after(self, prompt: Sequence[TokenId]) -> None:
        """Go on from the end of `prompt`, whose text is not repeated. Reads only its end, as far as that matters.

        A character that begins in the prompt and is completed later comes out whole, later.
        """
        # Whether a character is unfinished depends on the last bytes alone; and a text of that many has begun, and what
        # is stripped from its start is behind it.
        num_needed = _UTF8_BYTES + self._num_strip * len(self._spelling.strip_char.encode())
        start, num_bytes = len(prompt), 0
        while start > 0 and num_bytes < num_needed:
            start -= 1
            if prompt[start] not in self._skipped:
                num_bytes += len(self._spelling.token_bytes(prompt[start]))
        for token in prompt[start:]:
            self.push(token)

    def push(self, token: TokenId) -> str:
        """The text that `token` completes, often empty."""
        if token in self._skipped:
            return ""
        if self._is_first:
            if self._spelling.piece(token) is None:
                return ""
            self._is_first = False
            return self._stripped(self._utf8.decode(self._spelling.first_bytes(token)))
        return self._stripped(self._utf8.decode(self._spelling.token_bytes(token)))

    def finish(self) -> str:
        """What was held back: U+FFFD, if the text ends within a character."""
        return self._stripped(self._utf8.decode(b"", final=True))

    def _stripped(self, text: str) -> str:
        while self._num_strip and text:
            if text[0] != self._spelling.strip_char:
                self._num_strip = 0
                break
            text = text[1:]
            self._num_strip -= 1
        return text


def _flatten(step: _Json) -> list[_Json]:
    match step:
        case {"type": "Sequence", "decoders": list(steps)}:
            return [inner for outer in steps for inner in _flatten(outer)]
        case _:
            return [step]
