"""Tables of small records kept by columns, as wire.proto has them: the pieces that steps and results share.

Every function that reads raises FrameError for columns that contradict each other, before a list is built from them.

This file does not know what the columns mean.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import TypeVar, cast

from tllm.core.errors import FrameError
from tllm.core.types import Codec, DType, TokenId
from tllm.transport.checks import at_most

MAX_REASON_CHARS = 4000  # of a failure's reason; what is longer is cut

T = TypeVar("T")


def need(condition: bool, otherwise: str) -> None:
    if not condition:
        raise FrameError(otherwise)


def same_length(what: str, most: int, *columns: Sequence[object]) -> int:
    """The common length of the columns of one table, which is at most `most`."""
    number = len(columns[0])
    at_most(what, number, most)
    if any(len(column) != number for column in columns):
        raise FrameError(f"{what}: columns of different lengths")
    return number


def check_places(indices: Sequence[int], number: int) -> Sequence[int]:
    """The indices, which are ascending, distinct and below `number`."""
    ascending = all(left < right for left, right in pairwise(indices))
    need(not indices or (ascending and indices[-1] < number), "a record belongs to no row, or two to the same")
    return indices


def cut(values: list[T], lengths: Iterable[int]) -> list[tuple[T, ...]]:
    """Consecutive runs of `values`; they take up all of it."""
    lengths = list(lengths)
    need(sum(lengths) == len(values), "the parts of a column do not add up to it")
    start = 0
    runs = []
    for length in lengths:
        runs.append(tuple(values[start : start + length]))
        start += length
    return runs


def token_ids(values: Iterable[int]) -> list[TokenId]:
    return cast("list[TokenId]", list(values))


def parse_dtype(name: str) -> DType:
    try:
        return DType(name)
    except ValueError as error:
        raise FrameError(f"no element type is called {name[:32]!r}") from error


def parse_codec(name: str) -> Codec:
    try:
        return Codec(name)
    except ValueError as error:
        raise FrameError(f"no codec is called {name[:32]!r}") from error


def clean(reason: str) -> str:
    return reason[:MAX_REASON_CHARS].encode("utf-8", "replace").decode("utf-8")
