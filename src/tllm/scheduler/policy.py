"""What goes into a scheduler and what comes out of it, apart from steps and results.

This file does not know how anything is decided.
"""

from __future__ import annotations

from dataclasses import dataclass

from tllm.core.errors import ConfigError
from tllm.core.types import FinishReason, Sampled, SamplingParams, Score, SequenceId, TokenId


@dataclass(frozen=True, slots=True, kw_only=True)
class SchedulerConfig:
    """The limits a scheduler keeps. Raises ConfigError when one makes no sense.

    Tokens per step. A step has at most `max_batch_tokens`, of which decodes take what they need first. One prompt gives
    at most `prefill_chunk` of them, so that with several steps in flight its chunks overlap along the pipeline. While
    any sequence is decoding, all prompts together give at most `mixed_prefill_tokens`: a step then takes no more than
    `kappa` times a pure decode if that is at most `(kappa - 1) * seconds per decode step / seconds per prompt token`.

    Context. A sequence ends when it has `max_model_len` tokens, or one more than the blocks have positions (the last
    token is never computed).
    """

    num_blocks: int
    block_size: int  # positions per block
    max_model_len: int  # tokens, prompt and output together
    max_batch_tokens: int = 512
    max_sequences: int = 256  # that hold blocks at a time
    max_waiting: int = 1024
    max_steps_in_flight: int = 1
    prefix_cache: bool = True
    watermark: float = 0.01  # fraction of the blocks that admission leaves to those who already run, so they can grow
    prefill_chunk: int | None = None  # None: max_batch_tokens
    mixed_prefill_tokens: int = 128

    def __post_init__(self) -> None:
        for name in (
            "num_blocks",
            "block_size",
            "max_model_len",
            "max_batch_tokens",
            "max_sequences",
            "max_waiting",
            "max_steps_in_flight",
            "mixed_prefill_tokens",
        ):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}, but must be at least 1.")
        if self.prefill_chunk is not None and self.prefill_chunk < 1:
            raise ConfigError(f"prefill_chunk is {self.prefill_chunk}, but must be at least 1.")
        if not 0.0 <= self.watermark < 1.0:
            raise ConfigError(f"watermark is {self.watermark}, but must be at least 0 and below 1.")


@dataclass(frozen=True, slots=True, kw_only=True)
class SequenceRequest:
    """One prompt to be continued. Smaller `priority` runs first; prefixes are shared only within one `salt`."""

    prompt: tuple[TokenId, ...]
    params: SamplingParams
    prompt_logprobs: int | None = None  # score the prompt's tokens, with that many alternatives each
    priority: int = 0
    salt: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Update:
    """News of one sequence. After the one with `finish` there is no other, and its blocks are already back.

    `scores` are those of prompt tokens 1, 2, ...; they come once, with the first token or the finish. A sampled stop id
    is in `sampled` and named in `stop_id`. `num_cached_tokens` is what the first admission found in the prefix tree.
    """

    seq: SequenceId
    sampled: tuple[Sampled, ...] = ()
    scores: tuple[Score, ...] | None = None
    finish: FinishReason | None = None
    stop_id: TokenId | None = None
    reason: str = ""  # of FinishReason.ERROR, for a person
    num_cached_tokens: int = 0
    num_preemptions: int = 0
    first_scheduled: bool = False  # this is the sequence's first update


@dataclass(frozen=True, slots=True, kw_only=True)
class SchedulerStatistics:
    """Gauges now, and counters since the scheduler was made (`reset` does not clear them)."""

    num_running: int
    num_waiting: int
    num_steps_in_flight: int
    num_blocks: int
    num_free_blocks: int
    num_held_blocks: int  # by at least one sequence
    num_kept_blocks: int  # by the prefix tree alone: given up when somebody needs them
    num_prefix_query_tokens: int  # tokens of admitted prompts that were looked up
    num_prefix_hit_tokens: int  # of these, found
    num_evicted_blocks: int
    num_preemptions: int
    num_steps: int
    num_failed_steps: int
    num_stale_results: int  # results and failures of no step in flight: ignored
