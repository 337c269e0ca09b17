"""Steps as arrays, and the account of written KV against a model that remembers every slot's owner."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from tllm.core.errors import EngineError, MissingKVError
from tllm.core.types import BlockCopy, BlockId, Chunk, Epoch, Step, StepId
from tllm.engines.packing import BlockLedger, PackedStep, clip, pack
from tllm.testing.stages import GREEDY, chunk

NUM_BLOCKS = 8
BLOCK_SIZE = 4


def packed(*chunks: Chunk, copies: tuple[BlockCopy, ...] = ()) -> PackedStep:
    step = Step(id=StepId(0), epoch=Epoch(1), copies=copies, chunks=chunks)
    return pack(step, num_blocks=NUM_BLOCKS, block_size=BLOCK_SIZE)


def copy(source: int, target: int, length: int) -> BlockCopy:
    return BlockCopy(source=BlockId(source), target=BlockId(target), length=length)


def test_rows_are_in_chunk_order_and_slots_follow_the_block_tables() -> None:
    step = packed(chunk(1, 3, [10, 11, 12], [5, 2], sample=GREEDY), chunk(2, 0, [20], [7, 1], targets=[1]))
    assert step.tokens.tolist() == [10, 11, 12, 20]
    assert step.positions.tolist() == [3, 4, 5, 0]
    assert step.slots.tolist() == [23, 8, 9, 28]
    first, second = step.chunks
    assert (list(first.rows), first.start, first.context) == ([0, 1, 2], 3, 6)
    assert (list(second.rows), second.start, second.context) == ([3], 0, 1)
    assert (second.blocks.tolist(), step.sampled, step.scored) == ([7], (first,), (second,))


def test_adjacent_blocks_are_one_run() -> None:
    (one,) = packed(chunk(1, 13, [1], [2, 3, 4, 1])).chunks
    assert [(r.position, r.slot, r.length) for r in one.runs] == [(0, 8, 12), (12, 4, 2)]
    assert [(r.position, r.slot, r.length) for r in clip(one.runs, 3, 13)] == [(3, 11, 9), (12, 4, 1)]
    assert clip(one.runs, 5, 5) == ()


@given(st.permutations(range(NUM_BLOCKS)), st.integers(0, 31), st.integers(1, 32), st.integers(0, 32), st.data())
def test_runs_are_the_slots_of_all_positions_and_clipping_selects_among_them(
    blocks: list[int], start: int, length: int, first: int, data: st.DataObject
) -> None:
    length = min(length, NUM_BLOCKS * BLOCK_SIZE - start)
    (one,) = packed(chunk(1, start, [0] * length, blocks)).chunks
    slots = [blocks[p // BLOCK_SIZE] * BLOCK_SIZE + p % BLOCK_SIZE for p in range(start + length)]
    stop = data.draw(st.integers(0, len(slots)))
    for runs, expected in ((one.runs, slots), (clip(one.runs, first, stop), slots[first:stop])):
        assert [slot for run in runs for slot in range(run.slot, run.slot + run.length)] == expected
        assert all(b.slot != a.slot + a.length for a, b in itertools.pairwise(runs))


def test_an_empty_step_has_empty_arrays() -> None:
    step = packed()
    assert (step.num_rows, step.tokens.shape, step.slots.shape, step.chunks) == (0, (0,), (0,), ())


@pytest.mark.parametrize("wrong", [copy(0, 0, 1), copy(0, 8, 1), copy(-1, 0, 1), copy(0, 1, 0), copy(0, 1, 5)], ids=str)
def test_a_copy_that_makes_no_sense_is_refused(wrong: BlockCopy) -> None:
    with pytest.raises(EngineError):
        packed(copies=(wrong,))


def test_a_step_that_fails_leaves_nothing_claimed_that_may_not_be_there() -> None:
    ledger = BlockLedger(NUM_BLOCKS, BLOCK_SIZE)
    with ledger.writing(packed(chunk(1, 0, [0] * 6, [0, 1]))):
        pass
    assert (ledger.filled(0), ledger.filled(1)) == (4, 2)
    step = packed(chunk(1, 5, [0] * 5, [0, 1, 2]), copies=(copy(0, 3, 2),))
    with contextlib.suppress(ZeroDivisionError), ledger.writing(step):
        raise ZeroDivisionError
    assert [ledger.filled(b) for b in range(4)] == [4, 1, 0, 0]


def test_a_step_that_is_refused_leaves_the_account_as_it_was() -> None:
    ledger = BlockLedger(NUM_BLOCKS, BLOCK_SIZE)
    with ledger.writing(packed(chunk(1, 0, [0] * 6, [0, 1]))):
        pass
    step = packed(chunk(1, 2, [0], [0]), chunk(2, 1, [0], [5]), copies=(copy(1, 3, 2),))
    with pytest.raises(MissingKVError), ledger.writing(step):
        raise AssertionError("must not be entered")
    assert [ledger.filled(b) for b in range(4)] == [4, 2, 0, 0]


def test_a_chunk_may_not_read_what_another_chunk_of_the_step_writes() -> None:
    ledger = BlockLedger(NUM_BLOCKS, BLOCK_SIZE)
    writer, reader = chunk(1, 0, [0] * 4, [0]), chunk(2, 4, [0], [0, 1])
    for step in (packed(writer, reader), packed(reader, writer)):
        with pytest.raises(MissingKVError), ledger.writing(step):
            pass
    with ledger.writing(packed(writer)):
        pass
    # Rewriting what a neighbour reads in the same step is as wrong, though the positions are there.
    with pytest.raises(MissingKVError), ledger.writing(packed(chunk(1, 2, [0], [0]), reader)):
        pass
    with ledger.writing(packed(reader)):
        pass


def test_copies_are_done_in_order_and_before_the_chunks() -> None:
    ledger = BlockLedger(NUM_BLOCKS, BLOCK_SIZE)
    with ledger.writing(packed(chunk(1, 0, [0] * 4, [0]))):
        pass
    step = packed(chunk(2, 2, [0, 0], [2]), copies=(copy(0, 1, 3), copy(1, 2, 2)))
    with ledger.writing(step):
        pass
    assert [ledger.filled(b) for b in range(3)] == [4, 3, 4]


class LedgerMachine(RuleBasedStateMachine):
    """The model marks every slot with what was last written there; only the marks decide what may be read."""

    def __init__(self) -> None:
        super().__init__()
        self.ledger = BlockLedger(NUM_BLOCKS, BLOCK_SIZE)
        self.valid = [[False] * BLOCK_SIZE for _ in range(NUM_BLOCKS)]

    def _slots(self, one: Chunk, first: int, stop: int) -> Iterator[tuple[int, int]]:
        for position in range(first, stop):
            yield one.blocks[position // BLOCK_SIZE], position % BLOCK_SIZE

    @rule(
        blocks=st.permutations(range(NUM_BLOCKS)),
        start=st.integers(0, 12),
        length=st.integers(1, 9),
        fails=st.booleans(),
    )
    def compute(self, blocks: list[int], start: int, length: int, fails: bool) -> None:
        one = chunk(1, start, [0] * length, blocks)
        readable = all(self.valid[b][o] for b, o in self._slots(one, 0, start))
        entered = False
        try:
            with self.ledger.writing(packed(one)):
                entered = True
                if fails:
                    raise ZeroDivisionError
        except MissingKVError:
            pass
        except ZeroDivisionError:
            pass
        assert entered == readable
        if entered:
            # Everything from the first position written to the end of each block is lost, then written.
            for position in range(start, -(-(start + length) // BLOCK_SIZE) * BLOCK_SIZE):
                self.valid[blocks[position // BLOCK_SIZE]][position % BLOCK_SIZE] = False
            if not fails:
                for b, o in self._slots(one, start, start + length):
                    self.valid[b][o] = True

    @rule(
        source=st.integers(0, NUM_BLOCKS - 1), shift=st.integers(1, NUM_BLOCKS - 1), length=st.integers(1, BLOCK_SIZE)
    )
    def duplicate(self, source: int, shift: int, length: int) -> None:
        target = (source + shift) % NUM_BLOCKS
        allowed = all(self.valid[source][:length])
        try:
            with self.ledger.writing(packed(copies=(copy(source, target, length),))):
                pass
        except MissingKVError:
            assert not allowed
            return
        assert allowed
        self.valid[target] = [offset < length for offset in range(BLOCK_SIZE)]

    @invariant()
    def filled_is_the_run_of_valid_positions(self) -> None:
        for block, valid in enumerate(self.valid):
            assert valid == [offset < self.ledger.filled(block) for offset in range(BLOCK_SIZE)]


TestLedger = LedgerMachine.TestCase
TestLedger.settings = settings(max_examples=40, stateful_step_count=25, deadline=None)
