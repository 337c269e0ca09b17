"""A step as flat arrays, and the account of which KV positions are written: what every engine needs alike.

A *slot* is a position's place in a layer's KV: block id x block size + offset in the block. Blocks with successive ids
are adjacent in memory, so a sequence's positions are a few *runs* of successive slots:

    block size 4, blocks (7, 8, 2), 10 positions:   positions 0..7 -> slots 28..35     positions 8, 9 -> slots 8, 9

Rules of a step, checked here before anything is computed:
    Copies are done first, one after the other. Then all chunks are computed as if at once.
    A chunk reads its sequence's positions before `start`: an earlier step (or a copy) wrote every one of them.
    A chunk writes its own positions. No slot is written twice in a step, nor written by one chunk and read by another.

This file does not know any framework, dtype, layer or sequence.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from tllm.core.errors import EngineError, MissingKVError
from tllm.core.types import BlockCopy, Chunk, Step


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """Positions `[position, position + length)` of a sequence lie in slots `[slot, slot + length)`."""

    position: int
    slot: int
    length: int


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class PackedChunk:
    """One chunk: rows `[first_row, first_row + num_rows)` of the step are positions `start, start + 1, ...`."""

    chunk: Chunk
    first_row: int
    num_rows: int
    start: int
    blocks: NDArray[np.int64]  # just those that hold positions [0, context)
    runs: tuple[Run, ...]  # of positions [0, context), in order, as long as can be

    @property
    def context(self) -> int:
        """Positions that the chunk's last row sees: everything before it and itself."""
        return self.start + self.num_rows

    @property
    def rows(self) -> range:
        return range(self.first_row, self.first_row + self.num_rows)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class PackedStep:
    """A step's rows in chunk order. T rows in all."""

    tokens: NDArray[np.int64]  # (T,)
    positions: NDArray[np.int64]  # (T,)
    slots: NDArray[np.int64]  # (T,) where each row's keys and values go
    chunks: tuple[PackedChunk, ...]
    copies: tuple[BlockCopy, ...]
    block_size: int

    @property
    def num_rows(self) -> int:
        return len(self.tokens)

    @property
    def sampled(self) -> tuple[PackedChunk, ...]:
        """Chunks whose last row is sampled."""
        return tuple(chunk for chunk in self.chunks if chunk.chunk.sampling is not None)

    @property
    def scored(self) -> tuple[PackedChunk, ...]:
        """Chunks whose rows are scored, from the first row on."""
        return tuple(chunk for chunk in self.chunks if chunk.chunk.scoring is not None)


def pack(
    step: Step, *, num_blocks: int, block_size: int, vocab_size: int | None = None, max_positions: int | None = None
) -> PackedStep:
    """Lay a step out as arrays.

    Raises EngineError, naming the sequence, for a chunk that contradicts itself or the limits given: no tokens, a
    block that does not exist, too few blocks, a token or position outside the model, more scoring targets than rows.
    """
    seqs = [chunk.seq for chunk in step.chunks]
    if len(set(seqs)) != len(seqs):
        raise EngineError(f"step {step.id} holds two chunks of one sequence: {sorted(seqs)}")
    for copy in step.copies:
        _check_copy(copy, num_blocks, block_size)
    packed: list[PackedChunk] = []
    tokens: list[int] = []
    positions: list[NDArray[np.int64]] = []
    slots: list[NDArray[np.int64]] = []
    for chunk in step.chunks:
        _check_chunk(chunk, block_size, vocab_size, max_positions)
        num_rows, context = len(chunk.tokens), chunk.start + len(chunk.tokens)
        blocks = np.array(chunk.blocks[: -(-context // block_size)], dtype=np.int64)
        if blocks.min() < 0 or blocks.max() >= num_blocks:
            raise EngineError(f"sequence {chunk.seq} names a block outside 0..{num_blocks - 1}")
        own = np.arange(chunk.start, context, dtype=np.int64)
        packed.append(
            PackedChunk(
                chunk=chunk,
                first_row=len(tokens),
                num_rows=num_rows,
                start=chunk.start,
                blocks=blocks,
                runs=_runs(blocks, context, block_size),
            )
        )
        tokens.extend(chunk.tokens)
        positions.append(own)
        slots.append(blocks[own // block_size] * block_size + own % block_size)
    return PackedStep(
        tokens=np.array(tokens, dtype=np.int64),
        positions=_concatenate(positions),
        slots=_concatenate(slots),
        chunks=tuple(packed),
        copies=step.copies,
        block_size=block_size,
    )


def clip(runs: Sequence[Run], start: int, stop: int) -> tuple[Run, ...]:
    """The part of the runs that holds positions `[start, stop)`."""
    clipped = []
    for run in runs:
        first, last = max(run.position, start), min(run.position + run.length, stop)
        if first < last:
            clipped.append(Run(position=first, slot=run.slot + first - run.position, length=last - first))
    return tuple(clipped)


class BlockLedger:
    """Which positions of each block hold KV: always the first `filled(block)` ones.

    Writing at an offset ends the block's content there: what stood behind belongs to nobody any more (writing at 0
    starts the block anew). So KV that was lost, or never came, is an error at the first chunk that wants to read it,
    and never silent garbage.
    """

    def __init__(self, num_blocks: int, block_size: int) -> None:
        self._block_size = block_size
        self._filled = np.zeros(num_blocks, dtype=np.int64)

    def filled(self, block: int) -> int:
        """How many positions of the block, from its first, are written."""
        return int(self._filled[block])

    @contextmanager
    def writing(self, packed: PackedStep) -> Iterator[None]:
        """The step is computed inside; what it wrote counts only when the inside ends well.

        Raises MissingKVError or EngineError before the inside is entered, with the account unchanged. When the inside
        raises, the blocks it was to write end where its writing began, and targets of copies are empty.
        """
        before = self._filled.copy()
        try:
            self._do_copies(packed.copies)
            after = self._end_at_writes(packed.chunks)
            for chunk in packed.chunks:
                self._check_reads(chunk)
        except EngineError:
            self._filled = before
            raise
        try:
            yield
        except BaseException:
            self._filled[[copy.target for copy in packed.copies]] = 0
            raise
        for blocks, filled in after:
            self._filled[blocks] = filled

    def _do_copies(self, copies: Sequence[BlockCopy]) -> None:
        for copy in copies:
            if self._filled[copy.source] < copy.length:
                raise MissingKVError(
                    f"a copy wants {copy.length} positions of block {copy.source}, "
                    f"of which {self._filled[copy.source]} are written"
                )
            self._filled[copy.target] = copy.length

    def _end_at_writes(self, chunks: Sequence[PackedChunk]) -> list[tuple[NDArray[np.int64], NDArray[np.int64]]]:
        """Cut the content of every block to be written at the first offset written; return what holds afterwards.

        Whoever reads beyond that offset, the writer's neighbours included, then finds it missing.
        """
        after = []
        written: set[int] = set()
        for chunk in chunks:
            first = chunk.start // self._block_size
            blocks = chunk.blocks[first:]
            names = set(blocks.tolist())
            if len(names) < len(blocks) or names & written:
                raise EngineError(f"a step writes a block twice, the second time for sequence {chunk.chunk.seq}")
            written |= names
            starts = (first + np.arange(len(blocks))) * self._block_size
            begins = np.maximum(chunk.start - starts, 0)
            self._filled[blocks] = np.minimum(self._filled[blocks], begins)
            after.append((blocks, np.minimum(chunk.context - starts, self._block_size)))
        return after

    def _check_reads(self, chunk: PackedChunk) -> None:
        blocks = chunk.blocks[: -(-chunk.start // self._block_size)]
        needed = np.minimum(chunk.start - np.arange(len(blocks)) * self._block_size, self._block_size)
        missing = np.flatnonzero(self._filled[blocks] < needed)
        if missing.size:
            index = int(missing[0])
            raise MissingKVError(
                f"sequence {chunk.chunk.seq} reads {needed[index]} positions of block {blocks[index]}, "
                f"of which {self._filled[blocks[index]]} are written"
            )


def _check_copy(copy: BlockCopy, num_blocks: int, block_size: int) -> None:
    if not (0 <= copy.source < num_blocks and 0 <= copy.target < num_blocks and copy.source != copy.target):
        raise EngineError(f"{copy} names a block outside 0..{num_blocks - 1}, or one block twice")
    if not 0 < copy.length <= block_size:
        raise EngineError(f"{copy} is not of 1 to {block_size} positions")


def _check_chunk(chunk: Chunk, block_size: int, vocab_size: int | None, max_positions: int | None) -> None:
    context = chunk.start + len(chunk.tokens)
    if not chunk.tokens or chunk.start < 0:
        raise EngineError(f"sequence {chunk.seq} has a chunk of {len(chunk.tokens)} tokens from position {chunk.start}")
    if len(chunk.blocks) * block_size < context:
        raise EngineError(
            f"sequence {chunk.seq} has {len(chunk.blocks)} blocks of {block_size} positions, "
            f"but its chunk ends at position {context}"
        )
    if vocab_size is not None and not 0 <= min(chunk.tokens) <= max(chunk.tokens) < vocab_size:
        raise EngineError(f"sequence {chunk.seq} has a token outside 0..{vocab_size - 1}")
    if max_positions is not None and context > max_positions:
        raise EngineError(
            f"sequence {chunk.seq} reaches position {context - 1}, but the last one allowed is {max_positions - 1}"
        )
    if chunk.scoring is not None and len(chunk.scoring.targets) > len(chunk.tokens):
        raise EngineError(
            f"sequence {chunk.seq} wants {len(chunk.scoring.targets)} scores of a chunk of {len(chunk.tokens)} tokens"
        )
    if chunk.scoring is not None and vocab_size is not None:
        for target in chunk.scoring.targets:
            if not 0 <= target < vocab_size:
                raise EngineError(f"sequence {chunk.seq} scores token {target}, outside 0..{vocab_size - 1}")


def _runs(blocks: NDArray[np.int64], context: int, block_size: int) -> tuple[Run, ...]:
    first = np.concatenate(([0], np.flatnonzero(np.diff(blocks) != 1) + 1, [len(blocks)])).tolist()
    return tuple(
        Run(
            position=a * block_size,
            slot=int(blocks[a]) * block_size,
            length=min(b * block_size, context) - a * block_size,
        )
        for a, b in itertools.pairwise(first)
    )


def _concatenate(arrays: Sequence[NDArray[np.int64]]) -> NDArray[np.int64]:
    return np.concatenate(arrays) if arrays else np.empty(0, dtype=np.int64)
