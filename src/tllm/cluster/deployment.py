"""A served model as its users see it: prompts in, tokens out, whichever machines compute them.

This file does not know HTTP, nor how the machines are found and joined.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum

from tllm.cluster.driver import Driver, Generation, GenerationOutput, GenerationUsage
from tllm.cluster.rollout import KVShape, Pipeline
from tllm.core.config import ModelConfig
from tllm.core.errors import TllmError, TransportError, UnavailableError
from tllm.core.types import Epoch, SamplingParams, TokenId
from tllm.models.checkpoint import Checkpoint, end_ids, generation_defaults
from tllm.planner.plan import Plan
from tllm.scheduler.scheduler import Scheduler, SchedulerConfig, SequenceRequest
from tllm.text.template import ChatTemplate
from tllm.text.tokenizer import Tokenizer
from tllm.transport.journal import Journal

__all__ = [
    "Deployment",
    "DeploymentState",
    "DeploymentStatistics",
    "Generation",
    "GenerationOutput",
    "GenerationRequest",
    "GenerationUsage",
]


class DeploymentState(StrEnum):
    """`SERVING` answers, `REPLANNING` takes requests that are answered a little later; in every other state requests
    are refused with UnavailableError carrying its name."""

    LOADING = "loading"
    SERVING = "serving"
    REPLANNING = "replanning"  # a stage was lost, or there is a better plan; what runs and what comes waits
    DEGRADED = "degraded"  # nothing can be computed with the nodes there are
    DRAINING = "draining"  # finishing what runs, taking nothing new


_REFUSALS = {
    DeploymentState.LOADING: "Loading model",
    DeploymentState.DEGRADED: "A part of the model was lost and nothing can be computed until it is back.",
    DeploymentState.DRAINING: "The server is finishing what runs and takes nothing new.",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationRequest:
    """One prompt to be continued once. `n` choices are `n` requests."""

    prompt: tuple[TokenId, ...]
    params: SamplingParams
    prompt_logprobs: int | None = None  # score the prompt's tokens, with that many alternatives each
    priority: int = 0  # lower first
    salt: str = ""  # keeps prefixes of different tenants apart


@dataclass(frozen=True, slots=True, kw_only=True)
class DeploymentStatistics:
    """Gauges of now and counters since the model is served; all zero while it loads."""

    num_running: int = 0
    num_waiting: int = 0
    num_steps_in_flight: int = 0
    num_blocks: int = 0
    block_size: int = 0
    num_used_blocks: int = 0  # held by sequences; blocks kept for reuse count as free
    num_kept_blocks: int = 0
    prefix_queries: int = 0  # prompt tokens looked up
    prefix_hits: int = 0  # prompt tokens found
    num_preemptions: int = 0
    num_prompt_tokens: int = 0
    num_output_tokens: int = 0
    num_steps: int = 0
    epoch: int = 0

    @property
    def kv_usage(self) -> float:
        """Share of the blocks that sequences hold, in [0, 1]."""
        return self.num_used_blocks / self.num_blocks if self.num_blocks else 0.0


class Deployment:
    """One model under its served names. Made as soon as its checkpoint is read; answers once a pipeline serves it."""

    def __init__(self, checkpoint: Checkpoint, config: ModelConfig, *, names: tuple[str, ...]) -> None:
        self.names = names
        self.created = int(time.time())
        self.root = config.model
        self.vocab_size = checkpoint.spec.vocab_size
        self.tokenizer = Tokenizer.load(checkpoint.directory)
        self.template = ChatTemplate.of(self.tokenizer)
        self.end_ids = tuple(TokenId(token) for token in end_ids(checkpoint.directory))
        self.generation_defaults: Mapping[str, float | int] = generation_defaults(checkpoint.directory)
        self.max_model_len = config.max_model_len or checkpoint.spec.max_positions
        self.state = DeploymentState.LOADING
        self.plan: Plan | None = None
        self._config = config
        self._kv: KVShape | None = None
        self._epoch = Epoch(0)
        self._scheduler: Scheduler | None = None
        self._driver: Driver | None = None
        self.journal = Journal()  # of every step of every pipeline

    async def serve(self, pipeline: Pipeline) -> str:
        """Answer requests over `pipeline` until it breaks; why it did. A bug of the head itself is raised.

        Generations that were open when an earlier pipeline ended are computed again from their tokens and go on. Those
        that are open when this one breaks, or this is cancelled, wait for the next `serve` or `give_up`.
        """
        self._kv, self._epoch, self.plan = pipeline.kv, pipeline.epoch, pipeline.plan
        driver = self._driver_for(pipeline)
        if self.state is not DeploymentState.DRAINING:
            self.state = DeploymentState.SERVING
        driving = asyncio.create_task(driver.run(pipeline.link, pipeline.inbox), name="driver")
        losing = asyncio.create_task(pipeline.lost(), name="pipeline lost")
        try:
            await asyncio.wait({driving, losing}, return_when=asyncio.FIRST_COMPLETED)
            if losing.done():
                return losing.result()  # a worker's own words say more than the broken stream that follows from its end
            try:
                return driving.result()
            except TransportError as error:
                return str(error)
        finally:
            if self.state is DeploymentState.SERVING:
                self.state = DeploymentState.REPLANNING
            for task in (driving, losing):
                task.cancel()
            await asyncio.wait({driving, losing})

    def pipeline_lost(self) -> None:
        """The pipeline did not end because somebody wanted it to."""
        if self._driver is not None:
            self._driver.pipeline_lost()

    def give_up(self) -> None:
        """End every open generation with UnavailableError, and take no new ones: nothing could compute them."""
        if self.state is DeploymentState.REPLANNING:
            self.state = DeploymentState.DEGRADED
        if self._driver is not None:
            self._driver.fail_all(self._refusal())

    def _driver_for(self, pipeline: Pipeline) -> Driver:
        """The first pipeline makes the scheduler; later ones change how many blocks and steps there are."""
        num_steps = self._config.max_steps_in_flight or len(pipeline.plan.stages)
        prefill_chunk = pipeline.plan.prefill_chunk
        if self._scheduler is None or self._driver is None:
            self.max_model_len = pipeline.kv.max_model_len
            self._scheduler = Scheduler(
                SchedulerConfig(
                    num_blocks=pipeline.kv.num_blocks,
                    block_size=pipeline.kv.block_size,
                    max_model_len=pipeline.kv.max_model_len,
                    max_batch_tokens=self._config.max_batch_tokens,
                    max_sequences=self._config.max_sequences,
                    max_waiting=self._config.max_waiting,
                    max_steps_in_flight=num_steps,
                    prefix_cache=self._config.prefix_cache,
                    prefill_chunk=prefill_chunk,
                ),
                epoch=pipeline.epoch,
            )
            self._driver = Driver(self._scheduler, journal=self.journal)
        else:
            updates = self._scheduler.reset(
                pipeline.epoch, pipeline.kv.num_blocks, max_steps_in_flight=num_steps, prefill_chunk=prefill_chunk
            )
            self._driver.deliver(updates)
        return self._driver

    @property
    def takes_requests(self) -> bool:
        return self.state in (DeploymentState.SERVING, DeploymentState.REPLANNING)

    def submit(self, request: GenerationRequest) -> Generation:
        """Queue a prompt. Raises ContextLengthError, QueueFullError, RequestError, and UnavailableError while it
        takes no requests."""
        if not self.takes_requests or self._driver is None:
            raise self._refusal()
        return self._driver.submit(
            SequenceRequest(
                prompt=request.prompt,
                params=request.params,
                prompt_logprobs=request.prompt_logprobs,
                priority=request.priority,
                salt=request.salt,
            )
        )

    async def drain(self, deadline_s: float) -> None:
        """Take nothing new and wait for what runs; what is left at the deadline, or when this is cancelled, ends with
        UnavailableError."""
        self.state = DeploymentState.DRAINING
        if self._driver is None:
            return
        try:
            async with asyncio.timeout(deadline_s):
                await self._driver.idle()
        except TimeoutError:
            pass
        finally:
            self.give_up()

    def statistics(self) -> DeploymentStatistics:
        if self._scheduler is None or self._driver is None or self._kv is None:
            return DeploymentStatistics()
        scheduler, driver = self._scheduler.statistics(), self._driver.statistics()
        return DeploymentStatistics(
            num_running=scheduler.num_running,
            num_waiting=scheduler.num_waiting,
            num_steps_in_flight=scheduler.num_steps_in_flight,
            num_blocks=scheduler.num_blocks,
            block_size=self._kv.block_size,
            num_used_blocks=scheduler.num_held_blocks,
            num_kept_blocks=scheduler.num_kept_blocks,
            prefix_queries=scheduler.num_prefix_query_tokens,
            prefix_hits=scheduler.num_prefix_hit_tokens,
            num_preemptions=scheduler.num_preemptions,
            num_prompt_tokens=driver.num_prompt_tokens,
            num_output_tokens=driver.num_output_tokens,
            num_steps=driver.num_steps,
            epoch=self._epoch,
        )

    def _refusal(self) -> TllmError:
        return UnavailableError(_REFUSALS.get(self.state, "The model is not ready."), state=self.state)
