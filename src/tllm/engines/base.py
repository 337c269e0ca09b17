"""The seam between the pipeline and what computes: one shard of one model on this machine.

Rules, kept by the caller:
    `load`, then `allocate`, then any number of `forward`, then `close`; all from one thread, one call at a time.
    Between `load` and `close` the shard may become another one by `reload`, after which `allocate` comes again.
    Steps arrive in the order in which the head made them.
Rules, kept by the engine:
    No record of sequences: a chunk names the blocks it reads and writes, and carries what sampling needs.
    A `forward` that raises leaves the engine ready for the next step.

This file does not know any framework, nor what happens between two engines.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from tllm.core.types import Activation, DType, Quantization, Step, StepResult
from tllm.models.checkpoint import Checkpoint
from tllm.models.spec import Shard


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineConfig:
    """What an engine is made from. `dtype` is that of KV and activations, and of weights that are not quantized."""

    shard: Shard  # the first one; `Engine.reload` gives another
    dtype: DType
    quantization: Quantization | None = None  # None: weights as the checkpoint has them
    device: str = "cpu"  # in the framework's own words: cpu, cuda, cuda:1, mps
    num_threads: int | None = None  # None leaves the framework's default
    # The longest context that is served, which decides the scaling of some rotary positions; the same on every stage of
    # a model, whatever its memory. None: the model's own.
    max_positions: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineStatistics:
    """Counters since `load`; bytes and counts, never times of day."""

    weight_bytes: int  # held now
    read_bytes: int  # of the checkpoint, as stored, by `load` and every `reload` that succeeded
    kv_bytes: int
    num_blocks: int
    num_steps: int
    num_tokens: int


class Engine(Protocol):
    """One shard and its KV."""

    def load(self, checkpoint: Checkpoint, progress: Callable[[int, int], None]) -> None:
        """Read this shard's slices and nothing else; `progress(bytes_done, bytes_total)` from time to time.

        Raises ModelError naming a missing or misshapen tensor, EngineError when memory does not suffice; the engine
        can then only be closed.
        """

    def reload(self, checkpoint: Checkpoint, shard: Shard, progress: Callable[[int, int], None]) -> None:
        """Become the engine of another shard of the same checkpoint, equal bit for bit to one that loads it anew.

        Weights that both shards have stay where they are; what is not wanted any more is given back first, then what
        is missing is read: `progress` counts that alone. All KV is forgotten, and `allocate` comes again. The
        checkpoint may lie elsewhere than before, as long as its fingerprint is the same. Raises like `load`; the
        engine can then only be closed.
        """

    def free_bytes(self) -> int:
        """Memory of the device that KV may still take, in bytes, after `load`."""

    def allocate(self, num_blocks: int, block_size: int) -> None:
        """Take memory for the KV of `num_blocks` blocks; forgets all KV there was. Raises EngineError."""

    def forward(self, step: Step, hidden: Activation | None) -> Activation | StepResult:
        """Compute the shard's layers for every chunk of the step.

        `hidden` is None exactly when the shard embeds; the answer is a StepResult exactly when the shard has the
        head. Rows of the activation are in chunk order. Raises MissingKVError when a chunk refers to positions that
        were not written since `allocate`, EngineError otherwise; KV of the step's own positions is then undefined.
        """

    def statistics(self) -> EngineStatistics:
        """Cheap; may be called between any two calls."""

    def close(self) -> None:
        """Give all memory back. Idempotent."""
