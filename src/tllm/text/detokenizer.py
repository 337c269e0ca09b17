"""From generated tokens to text that may be shown, token by token.

Two things hold text back, and each says how long: a character whose bytes are not all there (`spelling`), and the
possible beginning of a stop string (`stop`). Each token costs amortised constant time, however long the text.

This file does not know requests, streams of events, or why a generation ends.
"""

from __future__ import annotations

from collections.abc import Sequence

from tllm.core.types import TokenId
from tllm.text.spelling import TextStream
from tllm.text.stop import StopMatcher
from tllm.text.tokenizer import Tokenizer


class Detokenizer:
    """The text of one choice of one request.

    All texts from `push` and `finish`, joined, are `tokenizer.decode` of the pushed tokens, cut where a stop string
    first stands complete (see `stop.py`). With a `prompt` they are what those tokens add to the prompt's text: a
    leading space stays, and a character that began in the prompt comes out whole. The prompt is not searched for stop
    strings.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        *,
        prompt: Sequence[TokenId] = (),
        stop: tuple[str, ...] = (),
        skip_special_tokens: bool = True,
        include_stop_string: bool = False,
    ) -> None:
        """Raises RequestError for an empty stop string."""
        self._stream = TextStream(tokenizer.spelling, skip_special_tokens=skip_special_tokens)
        self._stream.after(prompt)
        self._matcher = StopMatcher(stop, include_stop_string=include_stop_string)

    @property
    def stopped(self) -> str | None:
        """The stop string that appeared. Nothing comes out after that."""
        return self._matcher.stopped

    def push(self, token: TokenId) -> str:
        """The text that may be shown now: never half a character, never a possible beginning of a stop string."""
        return self._matcher.push(self._stream.push(token))

    def finish(self) -> str:
        """What was held back; call it once, when no more tokens come. Bytes of an unfinished character are U+FFFD."""
        return self._matcher.push(self._stream.finish()) + self._matcher.finish()
