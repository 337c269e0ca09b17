"""Which matrices a link benchmark sends, and in which order: a sweep of shapes, codecs and contents in bounded time.

    round trips    empty messages before everything else, and one among each turn's matrices
    warm-up        two matrices of each kind, the smallest first; what would take too long is left out from there on
    turns          every kind once a turn, in an order drawn anew from the seed

What disturbs a link for a moment, or warms a machine up, so falls on all codecs alike. Sizes are left out because 4096
rows that cross a gigabit link in half a second take nine minutes at 1 Mb/s.

This file does not know where matrices come from, nor what is concluded from their times.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from tllm.core.errors import ConfigError
from tllm.core.types import DType
from tllm.transport.codecs import CodecName, MatrixShape, bfloat16_bytes
from tllm.transport.link_bench import MAX_MATRIX_BYTES, Clock, CodecUnusableError, Timing

MAX_ROWS = 65536
MAX_REPEATS = 100
MAX_BUDGET_S = 600.0
MAX_SAMPLE_BYTES = 512 << 10  # of contents that are sent to a node

RANDOM = "random"
_MIN_SIZES = 2  # measured whatever they take: no line goes through one point
_NUM_ROUND_TRIPS = 8
_WARM_UPS = 2
_PATIENCE = 2.0  # times the budget that turns may take in all on a link that has become slower
_MIN_TURNS = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class SweepSettings:
    """What is to be measured. Raises ConfigError for what cannot be."""

    rows: tuple[int, ...] = (1, 4, 16, 64, 256, 1024, 4096)  # ascending
    columns: int
    dtype: DType = DType.BFLOAT16
    codecs: tuple[CodecName, ...] = tuple(CodecName)
    repeats: int = 7
    seed: int = 0
    budget_s: float = 30.0  # for all of it, the warm-up included

    def __post_init__(self) -> None:
        ascending = all(left < right for left, right in zip(self.rows, self.rows[1:], strict=False))
        if len(self.rows) < _MIN_SIZES or not ascending or not 1 <= self.rows[0] <= self.rows[-1] <= MAX_ROWS:
            raise ConfigError(
                f"The rows of the matrices are {', '.join(map(str, self.rows)) or 'none'}; give at least two different "
                f"numbers from 1 to {MAX_ROWS}."
            )
        if self.columns < 1 or self.shape(self.rows[-1]).num_bytes > MAX_MATRIX_BYTES:
            raise ConfigError(
                f"Matrices of {self.rows[-1]} x {self.columns} are too large; one may have at most "
                f"{MAX_MATRIX_BYTES >> 20} MiB. Choose fewer rows or a smaller width."
            )
        if CodecName.NONE not in self.codecs or len(set(self.codecs)) != len(self.codecs):
            raise ConfigError(
                "The codecs must be different ones, with none among them: the others are compared with it."
            )
        if not 1 <= self.repeats <= MAX_REPEATS:
            raise ConfigError(f"The number of repeats is {self.repeats}; it must be from 1 to {MAX_REPEATS}.")
        if not 0 < self.budget_s <= MAX_BUDGET_S:
            raise ConfigError(f"The time to measure is {self.budget_s:g} s; it must be more than 0, at most 600 s.")
        if not 0 <= self.seed < 2**63:
            raise ConfigError(f"The seed is {self.seed}; it must be from 0 to 2**63 - 1.")

    def shape(self, rows: int) -> MatrixShape:
        return MatrixShape(rows=rows, columns=self.columns, dtype=self.dtype)


@dataclass(frozen=True, slots=True, kw_only=True)
class LinkSample:
    """Rows of hidden states to fill matrices with."""

    name: str
    data: bytes
    width: int  # numbers of a row


@dataclass(frozen=True, slots=True, kw_only=True)
class Contents:
    """What matrices are filled with: the first bytes of one long run, under a name."""

    name: str
    data: bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Cell:
    """One kind of matrix."""

    rows: int
    codec: CodecName
    contents: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """A kind of matrix, and what each of them took."""

    cell: Cell
    timings: tuple[Timing, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Sweep:
    """What was measured, unprocessed."""

    round_trips_s: tuple[float, ...]
    cells: tuple[Measured, ...]
    left_out_rows: tuple[int, ...]  # for want of time
    missing: Mapping[CodecName, str]  # codecs that cannot be used, and why


class Matrices(Protocol):
    """One link to a peer that takes matrices: `link_bench.MatrixClient`."""

    async def round_trip_s(self) -> float: ...

    async def send(self, data: bytes, shape: MatrixShape, name: CodecName) -> Timing: ...


class _Budget:
    """Whether a next size fits: the times of the sizes before it lie on a straight line that goes on."""

    def __init__(self, settings: SweepSettings) -> None:
        self._seconds = settings.budget_s
        self._passes = _WARM_UPS + settings.repeats
        self._spent_s = 0.0
        self._sizes: list[tuple[int, float]] = []

    def spend(self, rows: int, seconds: float) -> bool:
        """Whether there is time for the turns of all sizes so far."""
        self._spent_s += seconds
        self._sizes.append((rows, seconds))
        return self._passes * self._spent_s <= self._seconds

    def allows(self, rows: int) -> bool:
        (less, less_s), (more, more_s) = self._sizes[-2:]
        expected_s = more_s + max(0.0, more_s - less_s) * (rows - more) / (more - less)
        return self._passes * (self._spent_s + expected_s) <= self._seconds


async def sweep(
    client: Matrices,
    settings: SweepSettings,
    contents: Sequence[Contents],
    *,
    turn: asyncio.Lock | None = None,
    clock: Clock = time.perf_counter,
) -> Sweep:
    """Measure. `turn` is held for one matrix at a time, for others that must not measure at the same moment.

    Raises TransportError when the peer is gone.
    """
    turn = turn or asyncio.Lock()
    views = {each.name: each.data for each in contents}
    missing: dict[CodecName, str] = {}
    timings: dict[Cell, list[Timing]] = {}

    async def send(cell: Cell) -> Timing:
        shape = settings.shape(cell.rows)
        async with turn:
            return await client.send(views[cell.contents][: shape.num_bytes], shape, cell.codec)

    async def round_trip_s() -> float:
        async with turn:
            return await client.round_trip_s()

    async def warm_up(rows: int) -> float:
        began = clock()
        for codec in settings.codecs:
            for name in views:
                if codec in missing:
                    continue
                cell = Cell(rows=rows, codec=codec, contents=name)
                try:
                    await send(cell)
                    timings[cell] = []
                except CodecUnusableError as error:
                    missing[codec] = str(error)
        return clock() - began

    await round_trip_s()  # whatever a first message has to wait for
    round_trips_s = [await round_trip_s() for _ in range(_NUM_ROUND_TRIPS)]
    budget = _Budget(settings)
    left_out: tuple[int, ...] = ()
    for index, rows in enumerate(settings.rows):
        fits = index < _MIN_SIZES or budget.allows(rows)
        if fits:
            # The lesser of the two: one disturbed message must not make a link look slow.
            seconds = min([await warm_up(rows) for _ in range(_WARM_UPS)])
            fits = budget.spend(rows, seconds) or index < _MIN_SIZES
        if not fits:
            left_out = settings.rows[index:]
            break
    kept = [cell for cell in timings if cell.rows not in left_out and cell.codec not in missing]
    timings = {cell: [] for cell in kept}
    order = random.Random(settings.seed)
    began = clock()
    for number in range(settings.repeats):
        if number >= _MIN_TURNS and clock() - began > _PATIENCE * settings.budget_s:
            break
        for cell in order.sample(kept, len(kept)):
            timings[cell].append(await send(cell))
        round_trips_s.append(await round_trip_s())
    return Sweep(
        round_trips_s=tuple(round_trips_s),
        cells=tuple(Measured(cell=cell, timings=tuple(times)) for cell, times in timings.items()),
        left_out_rows=left_out,
        missing=missing,
    )


def random_contents(settings: SweepSettings) -> Contents:
    """Numbers drawn from a normal distribution: what a benchmark takes that has no model at hand."""
    shape = settings.shape(settings.rows[-1])
    numbers = np.random.default_rng(settings.seed).standard_normal(shape.rows * shape.columns, dtype=np.float32)
    match settings.dtype:
        case DType.FLOAT32:
            data = numbers.astype("<f4").tobytes()
        case DType.FLOAT16:
            data = numbers.astype("<f2").tobytes()
        case DType.BFLOAT16:
            data = bfloat16_bytes(numbers)
    return Contents(name=RANDOM, data=data)


def extended(sample: LinkSample, settings: SweepSettings) -> Contents:
    """A sample's rows, over and over until the largest matrix is full, every time with its columns
    in another order: the distribution of the numbers stays, and no compressor finds the rows that it saw before.

    Raises ConfigError for a sample that has no whole row.
    """
    num_needed = settings.shape(settings.rows[-1]).num_bytes
    width = sample.width
    numbers = np.frombuffer(sample.data, f"<u{settings.dtype.num_bytes}")
    if width < 1 or len(numbers) < width:
        raise ConfigError(f"A sample of {len(numbers)} numbers has no row of {width}.")
    rows = numbers[: len(numbers) // width * width].reshape(-1, width)
    order = np.random.default_rng(settings.seed)
    parts = [rows.tobytes()]
    while len(parts) * rows.nbytes < num_needed:
        parts.append(rows[:, order.permutation(width)].tobytes())
    return Contents(name=sample.name, data=b"".join(parts)[:num_needed])
