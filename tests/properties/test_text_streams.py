"""Text from streams of tokens: whatever the tokens and however they cut characters and stop strings.

The reference is `Tokenizer.decode` of all tokens (itself held to transformers in tests/text) and a naive search.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models
from tokenizers import Tokenizer as Backend

from tllm.core.errors import RequestError
from tllm.core.types import TokenId
from tllm.text.detokenizer import Detokenizer
from tllm.text.spelling import _BYTE_OF
from tllm.text.stop import StopMatcher
from tllm.text.tokenizer import Tokenizer

_WORDS = ["a", "b", "ab", "abc", " a", "aé", "é", "😀", "\n\n", "���", "  "]


def _tokenizer(pieces: Sequence[str], decoder: decoders.Decoder | None) -> Tokenizer:
    """A vocabulary of exactly those pieces, two special tokens, one added token, and a gap in the ids."""
    vocab = {piece: index for index, piece in enumerate(dict.fromkeys(pieces))}
    backend = Backend(models.WordLevel(vocab=vocab | {"after-the-gap": len(vocab) + 3}))
    backend.add_special_tokens(["<s>", "</s>"])
    backend.add_tokens([AddedToken("<added é>", special=False)])
    if decoder is not None:
        backend.decoder = decoder
    return Tokenizer(backend, config={}, special_tokens={}, templates={})


def _byte_level_piece(data: bytes) -> str:
    char_of = {byte: char for char, byte in _BYTE_OF.items()}
    return "".join(char_of[byte] for byte in data)


_BYTES = [
    bytes([byte]) for byte in (0x20, 0x41, 0x80, 0x9F, 0xBF, 0xC3, 0xA9, 0xE2, 0x82, 0xAC, 0xF0, 0x98, 0xED, 0xFF)
]
_FRAGMENTS = [b"\xf0\x9f", b"\x98\x80", b"\x80\xf0\x9f\x98", b"a\xe2", b"\x82\xac "]
_BYTE_LEVEL = _tokenizer(
    [_byte_level_piece(data) for data in [*_BYTES, *_FRAGMENTS, *(word.encode() for word in _WORDS)]],
    decoders.ByteLevel(),
)
_METASPACE_PIECES = [word.replace(" ", "▁") for word in _WORDS] + ["▁", "▁▁", "▁é▁"]
_FALLBACK_PIECES = _METASPACE_PIECES + [f"<0x{data[0]:02X}>" for data in _BYTES]
_FALLBACK_STEPS = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
_KINDS = {
    "byte level": _BYTE_LEVEL,
    "byte fallback": _tokenizer(_FALLBACK_PIECES, decoders.Sequence([*_FALLBACK_STEPS, decoders.Strip(" ", 1, 0)])),
    "byte fallback, five spaces": _tokenizer(
        _FALLBACK_PIECES, decoders.Sequence([*_FALLBACK_STEPS, decoders.Strip(" ", 5, 0)])
    ),
    "byte fallback, nothing stripped": _tokenizer(_FALLBACK_PIECES, decoders.Sequence(_FALLBACK_STEPS)),
    "metaspace": _tokenizer(_METASPACE_PIECES, decoders.Metaspace()),
    "metaspace, never first": _tokenizer(_METASPACE_PIECES, decoders.Metaspace(prepend_scheme="never")),
    "words": _tokenizer(_WORDS, None),
}
_tokenizers = st.sampled_from(list(_KINDS)).map(_KINDS.__getitem__)


def _ids(tokenizer: Tokenizer, max_size: int = 16) -> st.SearchStrategy[list[TokenId]]:
    return st.lists(st.integers(0, tokenizer.vocab_size + 1).map(TokenId), max_size=max_size)


def _single_bytes(tokenizer: Tokenizer) -> st.SearchStrategy[list[TokenId]]:
    """Characters of one to four bytes, a token for each byte where the vocabulary has them."""
    pieces = {byte: (f"<0x{byte:02X}>", _byte_level_piece(bytes([byte]))) for (byte,) in _BYTES}
    known = {
        byte: token for byte, names in pieces.items() for token in map(tokenizer.token_id, names) if token is not None
    }
    return st.one_of(st.text(" A", max_size=12), st.text(" Aé€😀", max_size=12)).map(
        lambda text: [known[byte] for byte in text.encode() if byte in known]
    )


def _stream(detokenizer: Detokenizer, ids: Sequence[TokenId]) -> list[str]:
    return [*(detokenizer.push(token) for token in ids), detokenizer.finish()]


@settings(max_examples=300, deadline=None)
@given(st.data(), _tokenizers, st.booleans())
def test_streamed_text_is_the_whole_text(data: st.DataObject, tokenizer: Tokenizer, skip: bool) -> None:
    ids = data.draw(_ids(tokenizer))
    pieces = _stream(Detokenizer(tokenizer, skip_special_tokens=skip), ids)
    assert "".join(pieces) == tokenizer.decode(ids, skip_special_tokens=skip)


@settings(max_examples=300, deadline=None)
@given(st.data(), st.sampled_from(["byte level", "metaspace", "metaspace, never first", "words"]), st.booleans())
def test_the_whole_text_is_that_of_the_library(data: st.DataObject, kind: str, skip: bool) -> None:
    tokenizer = _KINDS[kind]
    ids = data.draw(_ids(tokenizer))
    assert tokenizer.decode(ids, skip_special_tokens=skip) == tokenizer._backend.decode(ids, skip_special_tokens=skip)


@settings(max_examples=300, deadline=None)
@given(st.data(), _tokenizers, st.booleans())
def test_no_more_is_held_back_than_an_unfinished_character(
    data: st.DataObject, tokenizer: Tokenizer, skip: bool
) -> None:
    ids = data.draw(_ids(tokenizer))
    detokenizer = Detokenizer(tokenizer, skip_special_tokens=skip)
    shown = ""
    for index, token in enumerate(ids):
        shown += detokenizer.push(token)
        so_far = tokenizer.decode(ids[: index + 1], skip_special_tokens=skip)
        # Two, where Python's decoder waits for the third byte of a surrogate, ED BF, before it gives it up.
        assert so_far in (shown, shown + "�", shown + "��")


@settings(max_examples=300, deadline=None)
@given(st.data(), _tokenizers, st.booleans())
def test_after_a_prompt_comes_what_the_tokens_add_to_its_text(
    data: st.DataObject, tokenizer: Tokenizer, skip: bool
) -> None:
    ids = data.draw(st.one_of(_ids(tokenizer, max_size=40), _single_bytes(tokenizer)))
    cut = data.draw(st.integers(0, len(ids)))
    prompt, ids = ids[:cut], ids[cut:]
    added = "".join(_stream(Detokenizer(tokenizer, prompt=prompt, skip_special_tokens=skip), ids))
    # The prompt's own text, short of an unfinished character at its end, is what had been shown of it.
    before = Detokenizer(tokenizer, skip_special_tokens=skip)
    shown = "".join(before.push(token) for token in prompt)
    assert shown + added == tokenizer.decode([*prompt, *ids], skip_special_tokens=skip)


def test_a_leading_space_stays_after_a_prompt_and_goes_at_the_start() -> None:
    tokenizer = _KINDS["byte fallback"]
    a = tokenizer.token_id("▁a")
    assert a is not None
    assert _stream(Detokenizer(tokenizer), [a, a]) == ["a", " a", ""]
    assert _stream(Detokenizer(tokenizer, prompt=[a]), [a, a]) == [" a", " a", ""]


def test_spaces_are_stripped_once_however_many_stand_at_the_end_of_the_prompt() -> None:
    tokenizer = _KINDS["byte fallback, five spaces"]
    space = tokenizer.token_id("▁")
    assert space is not None
    for num_before in range(12):
        added = _stream(Detokenizer(tokenizer, prompt=[space] * num_before), [space] * 3)
        assert len("".join(added)) == min(3, max(0, num_before + 3 - 5))


def test_a_character_begun_in_the_prompt_comes_out_whole() -> None:
    emoji = [TokenId(_BYTES.index(bytes([byte]))) for byte in "😀".encode()]
    for cut in range(1, 4):
        prompt = [TokenId(1)] * 50 + emoji[:cut]
        assert "".join(_stream(Detokenizer(_BYTE_LEVEL, prompt=prompt), emoji[cut:])) == "😀"


def test_a_long_prompt_is_not_read_from_its_start() -> None:
    class Prompt(list[TokenId]):
        def __iter__(self) -> Iterator[TokenId]:
            raise AssertionError

        def __getitem__(self, index: Any) -> Any:
            assert (index if isinstance(index, int) else index.start) > 1000 - 10
            return super().__getitem__(index)

    Detokenizer(_KINDS["byte fallback"], prompt=Prompt([TokenId(1)] * 1000))


def test_invalid_bytes_come_out_as_soon_as_they_are_known_to_be_invalid() -> None:
    ids = [TokenId(index) for index in (9, 7, 7, 1)]  # AC, E2, E2, "A"
    assert _BYTE_LEVEL.token_bytes(ids[1]) == b"\xe2"
    assert _stream(Detokenizer(_BYTE_LEVEL), ids) == ["�", "", "�", "�A", ""]
    assert _stream(Detokenizer(_BYTE_LEVEL), ids[1:3]) == ["", "�", "�"]


# --- stop strings ---------------------------------------------------------------------------------------------------

_ALPHABET = "ab\n "
_stops = st.lists(st.text(_ALPHABET, min_size=1, max_size=6), max_size=6).map(tuple)


def _reference(text: str, stop: Sequence[str]) -> tuple[int, str | None]:
    """Where the first stop string ends (or the text), and which it is, the longest of those that end there."""
    for end in range(len(text) + 1):
        complete = [string for string in stop if text[:end].endswith(string)]
        if complete:
            return end, max(complete, key=len)
    return len(text), None


def _cut(text: str, stop: Sequence[str], *, include: bool) -> tuple[str, str | None]:
    end, stopped = _reference(text, stop)
    return (text[:end] if include or stopped is None else text[: end - len(stopped)]), stopped


@settings(max_examples=500, deadline=None)
@example(["ab", "ab"], ("b", "abc"), False)
@example(["aa", "b"], ("aab", "ab"), True)
@given(st.lists(st.text(_ALPHABET, max_size=5), max_size=8), _stops, st.booleans())
def test_text_is_cut_at_the_first_complete_stop_string_however_it_arrives(
    pieces: list[str], stop: tuple[str, ...], include: bool
) -> None:
    matcher = StopMatcher(stop, include_stop_string=include)
    shown = "".join([*(matcher.push(piece) for piece in pieces), matcher.finish()])
    assert (shown, matcher.stopped) == _cut("".join(pieces), stop, include=include)
    if not include:
        assert not any(string in shown for string in stop)


@settings(max_examples=500, deadline=None)
@given(st.lists(st.text(_ALPHABET, max_size=5), max_size=8), _stops)
def test_exactly_the_longest_possible_beginning_of_a_stop_string_is_held_back(
    pieces: list[str], stop: tuple[str, ...]
) -> None:
    matcher = StopMatcher(stop)
    text = shown = ""
    for piece in pieces:
        text += piece
        shown += matcher.push(piece)
        if matcher.stopped is not None:
            return
        possible = {string[:size] for string in stop for size in range(len(string))}
        held = max((start for start in possible if text.endswith(start)), key=len, default="")
        assert shown + held == text


@settings(max_examples=300, deadline=None)
@given(st.data(), _tokenizers, st.booleans(), st.booleans())
def test_stop_strings_straddle_tokens_and_halves_of_characters(
    data: st.DataObject, tokenizer: Tokenizer, skip: bool, include: bool
) -> None:
    ids = data.draw(_ids(tokenizer, max_size=20))
    text = tokenizer.decode(ids, skip_special_tokens=skip)
    spans = st.tuples(st.integers(0, len(text)), st.integers(1, 6)).map(lambda span: text[span[0] : span[0] + span[1]])
    stop = tuple(data.draw(st.lists(spans.filter(bool), max_size=3))) if text else ("x",)
    detokenizer = Detokenizer(tokenizer, stop=stop, skip_special_tokens=skip, include_stop_string=include)
    shown = "".join(_stream(detokenizer, ids))
    assert (shown, detokenizer.stopped) == _cut(text, stop, include=include)


def test_nothing_comes_out_once_stopped() -> None:
    matcher = StopMatcher(["ab"])
    assert [matcher.push(text) for text in ("xa", "bc", "d")] == ["x", "", ""]
    assert (matcher.finish(), matcher.stopped) == ("", "ab")


def test_a_long_stop_string_among_many_costs_no_more_than_the_text_is_long() -> None:
    """A search that begins anew at each character would take 10^10 comparisons here."""
    matcher = StopMatcher(["a" * 100_000 + "b", *(f"{number}!" for number in range(1000))])
    assert "".join(matcher.push("a" * 10) for _ in range(20_000)) == "a" * 100_000
    assert matcher.push("c") == "a" * 100_000 + "c"


def test_an_empty_stop_string_is_refused() -> None:
    with pytest.raises(RequestError, match="stop string is empty") as caught:
        Detokenizer(_BYTE_LEVEL, stop=("a", ""))
    assert caught.value.param == "stop"
