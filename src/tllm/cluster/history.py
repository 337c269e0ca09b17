"""What a worker noted of its last steps, ready to be asked for.

This file does not know who asks, nor what the times mean.
"""

from __future__ import annotations

import time
from collections.abc import Callable

from tllm.core.types import Epoch
from tllm.models.spec import Shard
from tllm.transport import wire_pb2 as pb
from tllm.transport.journal import NUM_STAGE_POINTS, Journal

_MAX_EPOCHS = 16  # that a worker remembers its shard of


class StageHistory:
    """A worker's journal, and which layers it held in which epoch."""

    def __init__(self, *, clock: Callable[[], float] = time.perf_counter) -> None:
        self.journal = Journal(clock=clock)
        self._shards: dict[Epoch, Shard] = {}

    def begin(self, epoch: Epoch, shard: Shard) -> None:
        self._shards[epoch] = shard
        while len(self._shards) > _MAX_EPOCHS:
            del self._shards[min(self._shards)]

    def answer(self, question: pb.Trace) -> pb.Traced:
        """What it noted of the steps that are asked for."""
        traced = pb.Traced(number=question.number, arrived_s=self.journal.now_s())
        stages: dict[Epoch, pb.TracedStage] = {}
        if question.last_step:
            for row in self.journal.rows():
                if row.epoch < question.first_epoch or not question.first_step <= row.step <= question.last_step:
                    continue
                if (stage := stages.get(row.epoch)) is None:
                    if (shard := self._shards.get(row.epoch)) is None:
                        continue
                    stage = stages[row.epoch] = traced.stages.add(
                        epoch=row.epoch, first_layer=shard.first_layer, last_layer=shard.last_layer
                    )
                stage.steps.append(row.step)
                stage.times_s.extend(row.times_s[:NUM_STAGE_POINTS])
        traced.answered_s = self.journal.now_s()
        return traced
