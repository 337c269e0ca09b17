"""A pipeline on the bench: real workers, real streams, the real scheduler and driver, and nobody else who asks.

    this process: scheduler ─▶ driver ═▶ [link] ═▶ worker ═▶ [link] ═▶ worker ═▶ [link] ═▶ home

Without links the streams are Unix sockets, as on one machine. With them they are TCP and TLS, as between machines, and
pass emulated cables whose rate and delay can be changed while the pipeline stands. The workers are loaded once; how
they are driven can be changed by another `serve`.

This file does not know what is measured, nor what should come of it.
"""

from __future__ import annotations

import asyncio
import json
import math
import tempfile
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from tllm.cluster.driver import Driver, Generation
from tllm.cluster.echoes import measure_link
from tllm.cluster.loads import ENGINE
from tllm.cluster.machine import free_bytes, machine_id
from tllm.cluster.placement import model_profile
from tllm.cluster.process import WorkerProcess
from tllm.cluster.shards import ShardStore
from tllm.cluster.speeds import from_message
from tllm.core.config import DEFAULT_BLOCK_SIZE, DEFAULT_MAX_BATCH_TOKENS, Deadlines, split_address
from tllm.core.errors import EngineError, UnavailableError
from tllm.core.types import HEAD, DType, Epoch, Quantization, SamplingParams, TokenId
from tllm.lab.forecast import Forecast, Overhead
from tllm.models.checkpoint import Checkpoint
from tllm.planner.plan import StagePlan
from tllm.planner.predict import HEAD_STEP_S, Chain, chain_of
from tllm.planner.profile import LinkProfile, Load, NodeProfile
from tllm.planner.search import place
from tllm.scheduler.scheduler import Scheduler, SchedulerConfig, SequenceRequest
from tllm.testing.links import EmulatedLink, emulated_link
from tllm.transport import rpc, wire
from tllm.transport import wire_pb2 as pb
from tllm.transport.base import FrameLimits

_LOCAL = "127.0.0.1"
_MEASURE_S = 120.0  # a machine that does other things as well is late, and nobody waits for the answer but us


@dataclass(frozen=True, slots=True, kw_only=True)
class Stage:
    """Where one stage computes."""

    num_threads: int = 1
    cpus: tuple[int, ...] = ()  # pinned to these; empty: wherever the system likes


@dataclass(frozen=True, slots=True, kw_only=True)
class LinkShape:
    """An emulated cable, the same in both directions."""

    bytes_per_s: float
    delay_s: float  # one way


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """One finished request, in seconds of one clock."""

    submitted_s: float
    token_s: tuple[float, ...]  # when each token was at hand
    tokens: tuple[TokenId, ...]
    scheduled_s: float  # when its first chunk was on its way

    @property
    def ttft_s(self) -> float:
        return self.token_s[0] - self.submitted_s

    @property
    def latency_s(self) -> float:
        return self.token_s[-1] - self.submitted_s

    @property
    def tpot_s(self) -> float:
        """Between two of its tokens; nan where there are not two."""
        return (self.token_s[-1] - self.token_s[0]) / (len(self.token_s) - 1) if len(self.token_s) > 1 else math.nan


def decode_rate(answers: Sequence[Answer]) -> float:
    """Tokens per second of all together, from when the last of them had its first token to when one was done."""
    begin_s = max(answer.token_s[0] for answer in answers)
    end_s = min(answer.token_s[-1] for answer in answers)
    num_tokens = sum(begin_s < at_s <= end_s for answer in answers for at_s in answer.token_s)
    assert num_tokens > 0, "the answers did not overlap"
    return num_tokens / (end_s - begin_s)


class Rig:
    """Made by `pipeline`; `serve` must come before anything is submitted."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        dtype: DType,
        quantization: Quantization | None,
        plans: Sequence[StagePlan],
        workers: Sequence[_Worker],
        home: _Home,
        links: Sequence[EmulatedLink],
    ) -> None:
        self.checkpoint = checkpoint
        self.dtype = dtype
        self.quantization = quantization
        self.load_s = tuple(worker.load_s for worker in workers)
        self.model = model_profile(checkpoint, dtype, quantization, checkpoint.directory.name)
        self.stages = tuple(plans)
        self.links: tuple[LinkProfile, ...] = ()  # as measured
        self.max_batch_tokens = DEFAULT_MAX_BATCH_TOKENS
        self.prefill_chunk: int | None = None
        self._workers = workers
        self._home = home
        self._cables = links
        self._epoch = 0
        self._driver: Driver | None = None
        self._serving: AsyncExitStack | None = None

    # --------------------------------------------------------------------------------------------------- serve

    async def serve(
        self,
        *,
        max_sequences: int = 16,
        max_model_len: int = 1024,
        max_batch_tokens: int = DEFAULT_MAX_BATCH_TOKENS,
        prefill_chunk: int | None = None,
        max_steps_in_flight: int | None = None,
        prefix_cache: bool = False,
    ) -> None:
        """Answer from now on, in a new epoch, with KV for `max_sequences` full contexts; what ran before is gone.

        Raises EngineError when a worker has no room for that.
        """
        await self.rest()
        self._epoch += 1
        self.max_batch_tokens, self.prefill_chunk = max_batch_tokens, prefill_chunk
        spec = self.checkpoint.spec
        num_blocks = max_sequences * -(-max_model_len // DEFAULT_BLOCK_SIZE)
        limits = FrameLimits(
            epoch=Epoch(self._epoch),
            hidden_size=spec.hidden_size,
            dtype=self.dtype,
            max_tokens=max_batch_tokens,
            max_chunks=max_sequences,
            max_blocks=-(-max_model_len // DEFAULT_BLOCK_SIZE),
            vocab_size=spec.vocab_size,
        )
        async with AsyncExitStack() as stack:
            inbox = self._home.stages.expect(limits, sender=_name(len(self._workers) - 1))
            stack.push_async_callback(inbox.aclose)
            for index in reversed(range(len(self._workers))):
                await self._workers[index].start(
                    pb.Start(
                        limits=wire.pack_limits(limits),
                        num_blocks=num_blocks,
                        block_size=DEFAULT_BLOCK_SIZE,
                        previous_name=_name(index - 1) if index else HEAD,
                        next_name=_name(index + 1) if index + 1 < len(self._workers) else HEAD,
                        next=[self._address(index + 1)],
                    )
                )
            link = await rpc.connect(
                (self._address(0),),
                limits,
                identity=self._home.identity,
                peer=_name(0),
                timeout_s=self._home.deadlines.connect_s,
            )
            stack.push_async_callback(link.aclose)
            scheduler = Scheduler(
                SchedulerConfig(
                    num_blocks=num_blocks,
                    block_size=DEFAULT_BLOCK_SIZE,
                    max_model_len=max_model_len,
                    max_batch_tokens=max_batch_tokens,
                    max_sequences=max_sequences,
                    max_waiting=1 << 20,
                    max_steps_in_flight=max_steps_in_flight or len(self._workers),
                    prefix_cache=prefix_cache,
                    prefill_chunk=prefill_chunk,
                ),
                epoch=Epoch(self._epoch),
            )
            self._driver = Driver(scheduler)
            driving = asyncio.create_task(self._driver.run(link, inbox), name="driver")
            stack.push_async_callback(_cancelled, driving)
            self._serving = stack.pop_all()

    async def rest(self) -> None:
        """Close the streams; the workers keep their weights."""
        serving, self._serving, self._driver = self._serving, None, None
        if serving is not None:
            await serving.aclose()

    def submit(self, prompt: Sequence[int], *, max_tokens: int) -> Generation:
        """Greedy, and no token ends it."""
        assert self._driver is not None, "nothing is served"
        params = SamplingParams(temperature=0.0, max_tokens=max_tokens)
        return self._driver.submit(
            SequenceRequest(prompt=tuple(TokenId(token) for token in prompt), params=params, prompt_logprobs=None)
        )

    async def answer(self, prompt: Sequence[int], *, max_tokens: int) -> Answer:
        """One request, read token by token. Raises what the pipeline ended with."""
        submitted_s = time.perf_counter()
        generation = self.submit(prompt, max_tokens=max_tokens)
        token_s: list[float] = []
        tokens: list[TokenId] = []
        async for output in generation:
            token_s += [time.perf_counter()] * len(output.tokens)
            tokens += [sampled.token for sampled in output.tokens]
        return Answer(
            submitted_s=submitted_s,
            token_s=tuple(token_s),
            tokens=tuple(tokens),
            scheduled_s=submitted_s + generation.usage().queue_s,
        )

    async def answers(self, prompts: Sequence[Sequence[int]], *, max_tokens: int) -> tuple[Answer, ...]:
        """All of them at once."""
        return tuple(await asyncio.gather(*(self.answer(prompt, max_tokens=max_tokens) for prompt in prompts)))

    # ------------------------------------------------------------------------------------------------- measure

    def shape(self, shapes: Sequence[LinkShape]) -> None:
        """Of every cable, from the head's first to the one home; only for a pipeline that was made with links."""
        for cable, shape in zip(self._cables, shapes, strict=True):
            cable.shape(delay_s=shape.delay_s, rate_bits_per_s=8 * shape.bytes_per_s)

    async def measure_speeds(self) -> None:
        """Let every worker time the model's parts, one after the other, as nodes of a cluster do when they join."""
        for index, worker in enumerate(self._workers):
            speed = from_message((await worker.measure(self._measure_order(index))).speed)
            plan = self.stages[index]
            changed = replace(plan, node=replace(plan.node, speed=speed))
            self.stages = (*self.stages[:index], changed, *self.stages[index + 1 :])

    async def measure_links(self) -> None:
        """Time every cable through the transport that steps use. Nothing may be served meanwhile."""
        assert self._serving is None, "what is served would be in the way"
        ids = [HEAD, *(plan.node.id for plan in self.stages), HEAD]
        async with AsyncExitStack() as stack:
            store = ShardStore()
            stack.callback(store.close)
            server = rpc.Server([rpc.ShardService(store)], identity=self._home.identity)
            (address,) = await server.start([f"{_LOCAL}:0"])
            stack.push_async_callback(server.aclose)
            links = []
            for hop, cable in enumerate(self._cables):
                target, cable.target = cable.target, split_address(address, default_port=0)
                try:
                    async with rpc.ShardClient((cable.address,), identity=self._home.identity, peer=HEAD) as client:
                        rtt_s, bytes_per_s = await measure_link(client)
                finally:
                    cable.target = target
                links.append(LinkProfile(source=ids[hop], target=ids[hop + 1], rtt_s=rtt_s, bytes_per_s=bytes_per_s))
            self.links = tuple(links)

    def chain(self, *, head_step_s: float = HEAD_STEP_S) -> Chain:
        """What is predicted of it by what was measured. Raises UnavailableError before `measure_speeds`."""
        chain = chain_of(self.model, self.stages, self.links, head_machine=machine_id(), head_step_s=head_step_s)
        if chain is None:
            raise UnavailableError("Nothing was measured yet.", state="loading")
        return chain

    def forecast(self, overhead: Overhead = Overhead()) -> Forecast:
        """The same for loads of all kinds, driven as it is now. Raises UnavailableError before `measure_speeds`."""
        self.chain()
        return Forecast(
            model=self.model,
            stages=self.stages,
            links=self.links,
            head_machine=machine_id(),
            overhead=overhead,
            max_batch_tokens=self.max_batch_tokens,
            prefill_chunk=self.prefill_chunk,
        )

    def _measure_order(self, index: int) -> pb.Measure:
        return pb.Measure(
            config=json.dumps(self.checkpoint.config),
            dtype=self.dtype,
            quantization=str(self.quantization or ""),
            device="cpu",
            num_threads=self.stages[index].num_threads,
            engine=ENGINE,
            key="rig",
        )

    def _address(self, hop: int) -> str:
        """Where whoever is before edge `hop` connects to."""
        if self._cables:
            return self._cables[hop].address
        return self._workers[hop].addresses[0] if hop < len(self._workers) else self._home.address


@asynccontextmanager
async def pipeline(
    directory: Path,
    *,
    stages: Sequence[Stage] = (Stage(),),
    dtype: DType | None = None,
    quantization: Quantization | None = None,
    cut: Sequence[int] = (),
    with_links: bool = False,
) -> AsyncIterator[Rig]:
    """Workers with that model's stages loaded, until the context is left. `cut`: the first layer of every stage but the
    first; the planner's choice for as many equal machines by default.

    Raises ModelError for what is no model, EngineError when a worker cannot load.
    """
    checkpoint = Checkpoint.open(directory)
    dtype = dtype or checkpoint.dtype
    plans = _plans(checkpoint, dtype, quantization, stages, cut)
    deadlines = Deadlines(measure_s=_MEASURE_S)
    async with AsyncExitStack() as stack:
        private = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="tllm-rig-")))
        authority = rpc.Authority.open(private / "authority")
        home = _Home(
            stages=rpc.StageServer(),
            identity=authority.identity(HEAD),
            address=f"unix:{private}/home.sock",
            deadlines=deadlines,
        )
        server = rpc.Server([home.stages], identity=home.identity)
        _, home_address = await server.start([home.address, f"{_LOCAL}:0"])
        stack.push_async_callback(server.aclose)
        workers: list[_Worker] = []
        for index, stage in enumerate(stages):
            workers.append(await _Worker.spawn(_name(index), stage.num_threads, deadlines))
            stack.push_async_callback(workers[-1].aclose)
        loads = [
            pb.Load(
                model=str(checkpoint.directory),
                fingerprint=checkpoint.fingerprint,
                first_layer=plan.shard.first_layer,
                last_layer=plan.shard.last_layer,
                embed=plan.shard.embed,
                head=plan.shard.head,
                dtype=dtype,
                device="cpu",
                num_threads=stage.num_threads,
                host=_LOCAL if with_links else "",
                engine=ENGINE,
                cpus=stage.cpus,
                quantization=str(quantization or ""),
                identity=authority.identity(plan.node.id).to_message(),
            )
            for stage, plan in zip(stages, plans, strict=True)
        ]
        await asyncio.gather(*(worker.load(load) for worker, load in zip(workers, loads, strict=True)))
        cables = []
        if with_links:
            for address in (*(worker.addresses[-1] for worker in workers), home_address):
                cables.append(stack.enter_context(emulated_link(target=split_address(address, default_port=0))))
        rig = Rig(checkpoint, dtype, quantization, plans, workers, home, cables)
        try:
            yield rig
        finally:
            await rig.rest()


def _plans(
    checkpoint: Checkpoint,
    dtype: DType,
    quantization: Quantization | None,
    stages: Sequence[Stage],
    cut: Sequence[int],
) -> tuple[StagePlan, ...]:
    model = model_profile(checkpoint, dtype, quantization, checkpoint.directory.name)
    nodes = [
        NodeProfile(
            id=_name(index),
            name=_name(index),
            machine=machine_id(),
            host="",
            memory_bytes=free_bytes(),
            num_threads=stage.num_threads,
        )
        for index, stage in enumerate(stages)
    ]
    # Two streams: then the head counts in the cut, which is best for full pipelines and hardly matters to a single one.
    plans = place(model, nodes, min_kv_positions=DEFAULT_BLOCK_SIZE, load=Load(streams=2), use_all=True).stages
    if not cut:
        return plans
    ends = (0, *cut, model.num_layers)
    return tuple(
        replace(
            plan,
            shard=replace(plan.shard, first_layer=first, last_layer=last),
            held_bytes=model.held_bytes(first, last),
            read_bytes=model.read_bytes(first, last),
            kv_bytes_per_position=model.kv_bytes_per_position * (last - first),
        )
        for plan, first, last in zip(plans, ends, ends[1:], strict=False)
    )


def _name(index: int) -> str:
    return f"stage-{index}"


async def _cancelled(task: asyncio.Task[None]) -> None:
    task.cancel()
    await asyncio.wait({task})


@dataclass(frozen=True, slots=True, kw_only=True)
class _Home:
    stages: rpc.StageServer
    identity: rpc.Identity
    address: str
    deadlines: Deadlines


class _Worker:
    """A worker process, and what it answers to orders, of which it has one at a time."""

    def __init__(self, process: WorkerProcess, deadlines: Deadlines) -> None:
        self.load_s = 0.0
        self.addresses: tuple[str, ...] = ()
        self._process = process
        self._deadlines = deadlines
        self._answer: asyncio.Future[pb.WorkerEvent] | None = None
        self._epoch = 0  # that the order starts; 0: none
        self._watching = asyncio.create_task(process.watch(self._take), name=process.id)

    @classmethod
    async def spawn(cls, name: str, num_threads: int, deadlines: Deadlines) -> _Worker:
        return cls(await WorkerProcess.spawn(name, num_threads, deadlines), deadlines)

    async def load(self, load: pb.Load) -> None:
        event = await self._ask(pb.WorkerOrder(load=load), self._deadlines.load_s)
        self.load_s, self.addresses = event.loaded.load_s, tuple(event.loaded.addresses)

    async def start(self, start: pb.Start) -> None:
        await self._ask(pb.WorkerOrder(start=start), self._deadlines.start_s)

    async def measure(self, order: pb.Measure) -> pb.Measured:
        return (await self._ask(pb.WorkerOrder(measure=order), self._deadlines.measure_s)).measured

    async def aclose(self) -> None:
        await self._process.stop(self._deadlines.stop_s)
        await self._watching

    async def _ask(self, order: pb.WorkerOrder, timeout_s: float) -> pb.WorkerEvent:
        """Raises EngineError with the worker's words when it fails or ends, UnavailableError when it says nothing."""
        self._answer, self._epoch = asyncio.get_running_loop().create_future(), order.start.limits.epoch
        order.worker_id = self._process.id
        await self._process.order(order)
        try:
            async with asyncio.timeout(timeout_s):
                event = await self._answer
        except TimeoutError as error:
            raise UnavailableError(
                f"{self._process.id} did not answer within {timeout_s:g} s.", state="failed"
            ) from error
        match event.WhichOneof("event"):
            case "failed":
                raise EngineError(event.failed.reason)
            case "exited":
                raise EngineError(f"{self._process.id} ended: {event.exited.reason}")
        return event

    async def _take(self, event: pb.WorkerEvent) -> None:
        is_failure = event.WhichOneof("event") == "failed"
        is_old = is_failure and event.failed.epoch != self._epoch  # how an epoch ended that was left on purpose
        is_answer = event.WhichOneof("event") != "loading" and not is_old
        if is_answer and self._answer is not None and not self._answer.done():
            self._answer.set_result(event)
