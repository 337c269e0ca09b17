"""Where a sequence stands while it has something to issue.

    waiting    no blocks yet; in order of (priority, arrival)
    prompts    has blocks and several tokens to issue, or the rest of those; in the same order
    decodes    has one token to issue, the one sampled last; first come, first served
    trials     suspects of a failed step, in groups; each group is tried in a step of its own

A sequence stands in at most one, which `Sequence.queue` names; in none while all it has is in flight, and while it is a
suspect on trial. Leaving is linear in the length of the queue: it is for aborts, preemptions and failures.

This file does not know blocks, budgets or steps.
"""

from __future__ import annotations

from bisect import insort
from collections import deque
from operator import attrgetter

from tllm.scheduler.sequence import Sequence

order_of = attrgetter("order")


class Queues:
    """The four of them. Whoever pops a sequence sets its `queue` to None."""

    def __init__(self) -> None:
        self.waiting: list[Sequence] = []
        self.prompts: list[Sequence] = []
        self.decodes: deque[Sequence] = deque()
        self.trials: deque[list[Sequence]] = deque()

    def wait(self, seq: Sequence) -> None:
        insort(self.waiting, seq, key=order_of)
        seq.queue = self.waiting

    def resume(self, seq: Sequence) -> None:
        """It has blocks and is no suspect: it goes where its tokens to issue belong, if it has any."""
        if seq.num_to_issue == 0:
            return
        if seq.is_decoding:
            self.decodes.append(seq)
            seq.queue = self.decodes
        else:
            insort(self.prompts, seq, key=order_of)
            seq.queue = self.prompts

    def try_again(self, group: list[Sequence]) -> None:
        """Suspects, to be tried together and apart from all others."""
        for seq in group:
            seq.queue = group
        self.trials.append(group)

    def leave(self, seq: Sequence) -> None:
        if seq.queue is not None:
            seq.queue.remove(seq)
            seq.queue = None

    def check(self) -> None:
        """Assert that order and membership hold."""
        for ordered in (self.waiting, self.prompts):
            assert ordered == sorted(ordered, key=order_of)
        for queue in (self.waiting, self.prompts, self.decodes, *self.trials):
            for seq in queue:
                assert seq.queue is queue, f"sequence {seq.id} stands in a queue that it does not name"
                assert seq.num_to_issue > 0, f"sequence {seq.id} has nothing to issue"
        assert all(seq.is_decoding and seq.num_to_issue == 1 for seq in self.decodes)
        assert not any(seq.is_decoding for seq in (*self.waiting, *self.prompts))
        assert all(seq.is_suspect for group in self.trials for seq in group)
