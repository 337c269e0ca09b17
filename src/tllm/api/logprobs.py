"""Log-probabilities in the three spellings that clients know: chat's, text completions', and vLLM's of the prompt.

A token is named by its text; where its bytes are not UTF-8 by `bytes:\\x..`, where the request says so by
`token_id:N`. JSON has no minus infinity: what cannot be chosen has LOWEST.
This file does not know requests or frames.
"""

from __future__ import annotations

from collections.abc import Sequence

from tllm.api.choices import Entry, Offsets
from tllm.core.types import Logprob, Score, TokenId
from tllm.text.tokenizer import Tokenizer

LOWEST = -9999.0


class TokenNames:
    """How tokens are named in one answer."""

    def __init__(self, tokenizer: Tokenizer, *, as_ids: bool) -> None:
        self.tokenizer = tokenizer
        self._as_ids = as_ids

    def __call__(self, token: TokenId) -> str:
        return f"token_id:{token}" if self._as_ids else self.tokenizer.token_text(token)


def chat_logprobs(entries: Sequence[Entry], names: TokenNames) -> dict[str, object]:
    """`choices[].logprobs` of a chat answer."""
    return {"content": [_chat_entry(entry, names) for entry in entries], "refusal": None}


def _chat_entry(entry: Entry, names: TokenNames) -> dict[str, object]:
    sampled = entry.sampled
    return {
        **_chat_token(sampled.token, _finite(sampled.logprob), names),
        "top_logprobs": [_chat_token(other.token, _finite(other.logprob), names) for other in sampled.top],
    }


def _chat_token(token: TokenId, logprob: float, names: TokenNames) -> dict[str, object]:
    return {"token": names(token), "logprob": logprob, "bytes": list(names.tokenizer.token_bytes(token))}


class CompletionLogprobs:
    """`choices[].logprobs` of a text completion: four lists of one length, built up token by token."""

    def __init__(self, names: TokenNames) -> None:
        self._names = names
        self.tokens: list[str] = []
        self.token_logprobs: list[float | None] = []
        self.top_logprobs: list[dict[str, float] | None] = []
        self.text_offset: list[int] = []

    def add_prompt(
        self, ids: Sequence[TokenId], scores: Sequence[Score], num_top: int, *, skip_special_tokens: bool
    ) -> None:
        """An echoed prompt. Nothing predicts its first token: null."""
        offsets = Offsets(self._names.tokenizer, skip_special_tokens=skip_special_tokens)
        self._add(ids[0], None, (), offsets.add(ids[0]))
        for token, score in zip(ids[1:], scores, strict=True):
            self._add(token, score.logprob, score.top[:num_top], offsets.add(token))

    def add(self, entries: Sequence[Entry], *, shift: int, num_top: int) -> None:
        """Sampled tokens; `shift` characters stand before the choice's own text."""
        for entry in entries:
            self._add(
                entry.sampled.token, _finite(entry.sampled.logprob), entry.sampled.top[:num_top], shift + entry.offset
            )

    def json(self) -> dict[str, object]:
        return {
            "tokens": self.tokens,
            "token_logprobs": self.token_logprobs,
            "top_logprobs": self.top_logprobs,
            "text_offset": self.text_offset,
        }

    def _add(self, token: TokenId, logprob: float | None, top: Sequence[Logprob], offset: int) -> None:
        name = self._names(token)
        self.tokens.append(name)
        self.text_offset.append(offset)
        if logprob is None:
            self.token_logprobs.append(None)
            self.top_logprobs.append(None)
            return
        self.token_logprobs.append(_finite(logprob))
        best: dict[str, float] = {}
        for other in top:
            best.setdefault(self._names(other.token), _finite(other.logprob))
        best.setdefault(name, _finite(logprob))
        self.top_logprobs.append(best)


def prompt_logprobs(
    ids: Sequence[TokenId], scores: Sequence[Score], num_top: int, names: TokenNames
) -> list[dict[str, object] | None]:
    """vLLM's `prompt_logprobs`: null for the first token, then id → {logprob, rank, decoded_token}.

    The rank of a token outside the alternatives is not known and is null.
    """
    made: list[dict[str, object] | None] = [None]
    for token, score in zip(ids[1:], scores, strict=True):
        ranks = {other.token: rank for rank, other in enumerate(score.top, 1)}
        entry = {str(token): _prompt_token(token, score.logprob, ranks.get(token), names)}
        for rank, other in enumerate(score.top[:num_top], 1):
            entry.setdefault(str(other.token), _prompt_token(other.token, other.logprob, rank, names))
        made.append(dict(entry))
    return made


def _prompt_token(token: TokenId, logprob: float, rank: int | None, names: TokenNames) -> object:
    return {"logprob": _finite(logprob), "rank": rank, "decoded_token": names(token)}


def _finite(logprob: float | None) -> float:
    """Engines leave out log-probabilities only where none were asked for."""
    assert logprob is not None
    return max(logprob, LOWEST)
