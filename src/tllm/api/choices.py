"""One generation as a client sees it: tokens become text that may be shown, log-probabilities wait for their text.

Rules:
    A choice counts every token that was sampled for it up to the one that ended it, shown or not.
    A stop id is counted and has its log-probability, but no text, unless the request includes stop strings.
    Under a stop string, log-probabilities of tokens that begin after the kept text are dropped with their text.
    While text is held back (half a character, the beginning of a stop string), so are its log-probabilities.
    A stop string ends a choice at any length: `min_tokens` holds back stop ids alone.

Pure: outputs in, pieces out. This file does not know JSON, frames, clocks or tasks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tllm.cluster.deployment import GenerationOutput
from tllm.core.errors import GenerationError
from tllm.core.types import FinishReason, Sampled, Score, TokenId
from tllm.text.detokenizer import Detokenizer
from tllm.text.tokenizer import Tokenizer

UTF8_CONTINUATION = 0b10


@dataclass(frozen=True, slots=True, kw_only=True)
class TextOptions:
    """What a request asks of an answer's text. The same for all its choices."""

    stop: tuple[str, ...] = ()
    own_stop_ids: frozenset[TokenId] = frozenset()  # those that the request named; the model's own go unreported
    skip_special_tokens: bool = True
    include_stop: bool = False
    keep_scores: bool = False  # log-probabilities were asked for


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """A sampled token with its log-probability, and where its text begins, in characters of the choice's text."""

    sampled: Sampled
    offset: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Piece:
    """What one look at a generation adds to a choice. `finish` is set on the last one and only there."""

    text: str
    ids: tuple[TokenId, ...]
    entries: tuple[Entry, ...] = ()
    prompt_scores: tuple[Score, ...] | None = None
    finish: str | None = None
    stop_reason: str | int | None = None


class Offsets:
    """Where tokens begin in the text they make together, counted in characters."""

    def __init__(self, tokenizer: Tokenizer, *, skip_special_tokens: bool) -> None:
        self._tokenizer = tokenizer
        self._hidden = tokenizer.special_ids if skip_special_tokens else frozenset[TokenId]()
        self._num_chars = 0

    def add(self, token: TokenId) -> int:
        """The character at which `token` begins; one within a character begins where that character does."""
        raw = b"" if token in self._hidden else self._tokenizer.token_bytes(token)
        is_within = bool(raw) and raw[0] >> 6 == UTF8_CONTINUATION and self._num_chars > 0
        start = self._num_chars - is_within
        self._num_chars += sum(byte >> 6 != UTF8_CONTINUATION for byte in raw)
        return start


class ChoiceText:
    """The state of one choice. `finish` is None until it has ended; then nothing more comes out."""

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[TokenId], options: TextOptions) -> None:
        self._options = options
        self._detokenizer = Detokenizer(
            tokenizer,
            prompt=prompt,
            stop=options.stop,
            skip_special_tokens=options.skip_special_tokens,
            include_stop_string=options.include_stop,
        )
        self._offsets = Offsets(tokenizer, skip_special_tokens=options.skip_special_tokens)
        self._waiting: list[Entry] = []
        self._num_shown = 0  # characters
        self.num_tokens = 0
        self.finish: str | None = None

    def feed(self, output: GenerationOutput) -> Piece:
        """Take what a generation brought. Raises GenerationError if it ended other than by stopping or its limit."""
        assert self.finish is None
        texts: list[str] = []
        ids: list[TokenId] = []
        stop_reason: str | int | None = None
        for index, sampled in enumerate(output.tokens):
            ids.append(sampled.token)
            if self._options.keep_scores:
                self._waiting.append(Entry(sampled=sampled, offset=self._offsets.add(sampled.token)))
            is_stop_id = output.stop_id is not None and index == len(output.tokens) - 1
            if not is_stop_id or self._options.include_stop:
                texts.append(self._detokenizer.push(sampled.token))
                if self._detokenizer.stopped is not None:
                    self.finish, stop_reason = "stop", self._detokenizer.stopped
                    break
        if self.finish is None and output.finish is not None:
            self.finish = _finish_word(output.finish)
            stop_reason = output.stop_id if output.stop_id in self._options.own_stop_ids else None
            texts.append(self._detokenizer.finish())
        text = "".join(texts)
        self.num_tokens += len(ids)
        self._num_shown += len(text)
        return Piece(
            text=text,
            ids=tuple(ids),
            entries=self._released(),
            prompt_scores=output.prompt_scores,
            finish=self.finish,
            stop_reason=stop_reason,
        )

    def _released(self) -> tuple[Entry, ...]:
        """The entries whose text has begun to be shown; at the end all, unless a stop string cut their text off."""
        if not self._waiting:
            return ()
        if self.finish is not None and self._detokenizer.stopped is None:
            released, self._waiting = self._waiting, []
            return tuple(released)
        num = 0
        while num < len(self._waiting) and self._waiting[num].offset < self._num_shown:
            num += 1
        released, self._waiting = self._waiting[:num], self._waiting[num:]
        return tuple(released)


def _finish_word(reason: FinishReason) -> str:
    match reason:
        case FinishReason.STOP:
            return "stop"
        case FinishReason.LENGTH:
            return "length"
        case FinishReason.ABORT:
            raise GenerationError("The generation was cancelled on the server.")
        case FinishReason.ERROR:
            raise GenerationError("The generation failed on the server.")
