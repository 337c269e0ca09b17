"""Batches leave when the policy says, nothing that a request waits for is left out, and experiments say what they are.

No test here waits or measures: clocks are hands that somebody moves, pipelines are arithmetic.
"""

from __future__ import annotations

import asyncio
import heapq
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any, cast

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tllm.core.errors import ConfigError, EngineError
from tllm.core.types import TokenId
from tllm.lab import models
from tllm.lab.experiment import Cell, Parameters
from tllm.lab.experiments import KINDS, batching, expected, find, stages, subject
from tllm.lab.experiments.batches import (
    POISSON,
    Batching,
    Departure,
    Done,
    Served,
    ServiceTime,
    arrivals,
    as_they_come,
    departure,
    in_batches,
    metrics,
    simulated,
)
from tllm.lab.experiments.batching import CONTINUOUS, BatchingExperiment, done_of
from tllm.lab.experiments.expected import EngineForecast, Possible, with_ranks
from tllm.lab.experiments.stream import Stream, answer_metrics, possible_stream, predicted_stream, stream_metrics
from tllm.lab.forecast import Forecast, Overhead
from tllm.lab.inspection import Answered
from tllm.lab.rig import Answer, Stage
from tllm.lab.sanity import AT_ONCE, impossible
from tllm.models.spec import Shard
from tllm.planner.cost import mean_batch_latency_s
from tllm.planner.plan import StagePlan
from tllm.planner.profile import ModelProfile, NodeProfile, Speed

# ---- when a batch leaves ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arrivals_s", "first", "free_s", "batching_", "expected_"),
    [
        pytest.param([0, 1, 2, 9], 0, 0, (3, 10), (2, 0, 3), id="full before its window ends"),
        pytest.param([0, 1, 2, 9], 0, 0, (4, 5), (5, 0, 3), id="its window ends before it is full"),
        pytest.param([0, 1, 2, 9], 3, 0, (4, 5), (14, 3, 4), id="nobody knows that no more will come"),
        pytest.param([0, 1, 2, 9], 0, 0, (4, 0), (0, 0, 1), id="without a window nobody waits"),
        pytest.param([0, 1, 2, 9], 1, 7, (4, 0), (7, 1, 3), id="who came while the one before was served goes along"),
        pytest.param([0, 1, 2, 9], 1, 7, (4, 3), (7, 1, 3), id="a window that ended meanwhile is over"),
        pytest.param([0, 1, 2, 9], 1, 7, (4, 9), (10, 1, 4), id="a window that did not is waited for"),
        pytest.param([0, 0, 0, 0], 0, 0, (3, 9), (0, 0, 3), id="a batch is not larger than its size"),
    ],
)
def test_a_batch_leaves_full_or_when_its_window_is_over(
    arrivals_s: list[float],
    first: int,
    free_s: float,
    batching_: tuple[int, float],
    expected_: tuple[float, int, int],
) -> None:
    size, window_s = batching_
    at_s, begin, stop = expected_
    leaving = departure(arrivals_s, first, free_s, Batching(size=size, window_s=window_s))
    assert leaving == Departure(at_s=at_s, first=begin, stop=stop)


def workloads() -> st.SearchStrategy[tuple[float, ...]]:
    gaps = st.lists(st.integers(min_value=0, max_value=8), min_size=1, max_size=12)
    return gaps.map(lambda given: tuple(float(moment) for moment in itertools.accumulate(given)))


policies = st.builds(Batching, size=st.integers(1, 5), window_s=st.integers(0, 10).map(float))


def service(size: int) -> ServiceTime:
    """In whole seconds, so that sums are exact: a prefill grows with the batch, decoding hardly."""
    return ServiceTime(first_s=float(size), all_s=float(size + 4))


@given(arrivals_s=workloads(), policy=policies)
def test_everybody_is_served_once_in_order_and_waits_for_no_other_reason_than_the_policy(
    arrivals_s: tuple[float, ...], policy: Batching
) -> None:
    served = simulated(arrivals_s, policy, service, 32)
    assert [each.arrived_s for each in served] == list(arrivals_s)
    batches = [list(batch) for _, batch in itertools.groupby(served, key=lambda each: each.left_s)]
    free_s = 0.0
    for batch in batches:
        first = batch[0]
        is_full = len(batch) == policy.size
        filled_s = batch[-1].arrived_s
        assert len(batch) <= policy.size
        assert all(each.arrived_s <= each.left_s for each in batch)
        assert first.left_s >= free_s
        assert first.left_s == max(free_s, filled_s if is_full and filled_s < first.arrived_s + policy.window_s
                                   else first.arrived_s + policy.window_s)  # fmt: skip
        assert {each.done_s for each in batch} == {first.left_s + service(len(batch)).all_s}
        free_s = first.done_s


# ---- the same with somebody who serves -------------------------------------------------------------------------------


class HandClock:
    """Moves to the next moment that somebody waits for when nobody has anything else to do."""

    def __init__(self) -> None:
        self._now_s = 0.0
        self._waiting: list[tuple[float, int, asyncio.Event]] = []
        self._number = itertools.count()

    def now_s(self) -> float:
        return self._now_s

    async def until(self, at_s: float) -> None:
        event = asyncio.Event()
        heapq.heappush(self._waiting, (max(at_s, self._now_s), next(self._number), event))
        await event.wait()

    async def drive(self, work: asyncio.Task[tuple[Served, ...]]) -> tuple[Served, ...]:
        while not work.done():
            for _ in range(10):  # whoever can go on does so first
                await asyncio.sleep(0)
            if self._waiting:
                self._now_s, _, event = heapq.heappop(self._waiting)
                event.set()
        return work.result()


def run_batches(arrivals_s: Sequence[float], policy: Batching) -> tuple[Served, ...]:
    """Through `in_batches`; every request takes what a batch of all that left with it takes."""

    async def run() -> tuple[Served, ...]:
        clock = HandClock()
        together: dict[float, int] = {}

        async def serve(request: int) -> Done:
            began_s = clock.now_s()
            together[began_s] = together.get(began_s, 0) + 1
            await clock.until(began_s)  # all of the batch have begun after that
            taken = service(together[began_s])
            await clock.until(began_s + taken.all_s)
            return Done(began_s=began_s, first_token_s=began_s + taken.first_s, done_s=clock.now_s(), num_tokens=32)

        return await clock.drive(asyncio.create_task(in_batches(arrivals_s, policy, clock, serve)))

    return asyncio.run(run())


@given(arrivals_s=workloads(), policy=policies)
def test_what_is_measured_is_what_was_predicted_where_service_takes_what_was_predicted(
    arrivals_s: tuple[float, ...], policy: Batching
) -> None:
    assert run_batches(arrivals_s, policy) == simulated(arrivals_s, policy, service, 32)


def test_requests_that_nobody_batches_go_when_they_come() -> None:
    async def run() -> tuple[Served, ...]:
        clock = HandClock()

        async def serve(request: int) -> Done:
            came_s = clock.now_s()
            await clock.until(came_s + 5)
            return Done(began_s=came_s + 1, first_token_s=came_s + 2, done_s=came_s + 5, num_tokens=request)

        return await clock.drive(asyncio.create_task(as_they_come((0.0, 3.0, 3.0), clock, serve)))

    served = asyncio.run(run())
    assert [each.arrived_s for each in served] == [0, 3, 3]
    assert [each.left_s for each in served] == [1, 4, 4]  # the scheduler's queue is a queue
    assert [each.done_s for each in served] == [5, 8, 8]
    assert [each.num_tokens for each in served] == [0, 1, 2]


# ---- figures ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("size", "total_s", "tokens_per_s", "mean_latency_s"),
    [(1, 2.509, 204.1, 1.3329), (4, 1.269, 403.5, 0.7931), (8, 0.614, 833.9, 0.4605)],
)
def test_sixteen_requests_in_batches_have_the_throughput_and_the_latency_that_arithmetic_gives(
    size: int, total_s: float, tokens_per_s: float, mean_latency_s: float
) -> None:
    """The totals are those of an early note, which counted 526 tokens and left the queue out."""
    num_batches = 16 // size

    def one(batch: int) -> ServiceTime:
        return ServiceTime(first_s=0.0, all_s=total_s / num_batches)

    found = metrics(simulated((0.0,) * 16, Batching(size=size, window_s=0.0), one, 32))
    assert found["num_tokens"] == 512
    assert found["throughput_tokens_per_s"] == pytest.approx(tokens_per_s, abs=0.05)
    assert found["mean_latency_s"] == pytest.approx(mean_latency_s, abs=5e-5)
    assert found["mean_latency_s"] == pytest.approx(mean_batch_latency_s(total_s, num_batches))
    settings = {"requests": 16, "tokens": 32, "batch": size, "arrivals": AT_ONCE}
    assert impossible(settings, found) == ""
    assert impossible(settings, found | {"mean_latency_s": found["mean_service_s"]}) != "" or num_batches == 1


@given(arrivals_s=workloads(), policy=policies)
def test_latency_is_queue_and_service_and_tokens_are_those_that_came(
    arrivals_s: tuple[float, ...], policy: Batching
) -> None:
    served = simulated(arrivals_s, policy, service, 32)
    shorter = (replace(served[0], num_tokens=3), *served[1:])
    found = metrics(shorter)
    assert found["mean_latency_s"] == pytest.approx(found["mean_queue_s"] + found["mean_service_s"])
    assert found["num_tokens"] == 3 + 32 * (len(served) - 1)
    assert found["throughput_tokens_per_s"] == pytest.approx(found["num_tokens"] / found["total_s"])
    assert found["total_s"] == max(each.done_s for each in served) - arrivals_s[0]
    assert found["mean_ttft_s"] <= found["mean_latency_s"] <= found["total_s"]
    assert found["p95_latency_s"] <= max(each.done_s - each.arrived_s for each in served)


def test_random_arrivals_are_those_of_their_seed_and_ascend() -> None:
    assert arrivals(AT_ONCE, 3, 5.0, 1) == (0.0, 0.0, 0.0)
    moments = arrivals(POISSON, 2000, 5.0, 1)
    assert moments[0] == 0.0
    assert list(moments) == sorted(moments)
    assert moments == arrivals(POISSON, 2000, 5.0, 1) != arrivals(POISSON, 2000, 5.0, 2)
    assert moments[-1] / 1999 == pytest.approx(1 / 5, rel=0.1)  # of one seed, so always the same


# ---- predictions -----------------------------------------------------------------------------------------------------

MODEL = ModelProfile(
    name="m", layer_bytes=(100, 100), embed_bytes=50, head_bytes=60, tied=False, kv_bytes_per_position=4, hidden_bytes=8
)
SPEED = Speed(rows=(1, 256), layer_s=(2e-3, 257e-3), head_s=(4e-3, 4e-3), step_s=1e-3)
WHOLE = Shard(first_layer=0, last_layer=2, embed=True, head=True)


def forecast() -> Forecast:
    """One stage on the head's own machine; a row more takes 1 ms more a layer, and the head 3 ms a step."""
    node = NodeProfile(id="a", name="a", machine="m", host="", memory_bytes=999, num_threads=1, speed=SPEED)
    stage = StagePlan(node=node, shard=WHOLE, num_threads=1, held_bytes=310, read_bytes=260, kv_bytes_per_position=8)
    overhead = Overhead(rows=(1,), head_s=(3e-3,))
    return Forecast(model=MODEL, stages=(stage,), links=(), head_machine="m", overhead=overhead, max_batch_tokens=512)


class FakeRig:
    """Answers in no time with the tokens asked for."""

    def __init__(self) -> None:
        self.checkpoint = SimpleNamespace(spec=SimpleNamespace(vocab_size=97))
        self.load_s = (1.5, 2.0)
        self.seen: list[tuple[TokenId, ...]] = []

    async def answer(self, prompt: Sequence[TokenId], *, max_tokens: int) -> Answer:
        self.seen.append(tuple(prompt))
        began_s = asyncio.get_running_loop().time()  # perf_counter's clock on Linux: only differences count
        times_s = tuple(began_s + 1e-3 * number for number in range(max_tokens))
        tokens = tuple(TokenId(number) for number in range(max_tokens))
        return Answer(submitted_s=began_s, token_s=times_s, tokens=tokens, scheduled_s=began_s)


def experiment(**parameters: Any) -> BatchingExperiment:
    return cast(BatchingExperiment, find("batching", parameters))


def session(given_: BatchingExperiment, rig: FakeRig | None = None) -> batching._Session:
    limit = Possible(bytes_per_s=1000.0, weight_bytes=260, kv_bytes_per_position=8)
    return batching._Session(experiment=given_, rig=cast(Any, rig or FakeRig()), forecast=forecast(), limit=limit)


def test_static_batches_are_predicted_by_the_planner_one_after_another() -> None:
    chosen = experiment(requests=8, prompt_tokens=5, tokens=11, batch=(1, 4), wait_ms=0.0)
    open_ = session(chosen)
    for cell in chosen.cells[:2]:
        size = int(cell.settings["batch"])
        batch_s = forecast().ttft_s(size * 5) + 10 * forecast().decode_step_s(size, 5 + 11 / 2)
        found = open_.predicted(cell)
        num_batches = 8 // size
        assert found["mean_latency_s"] == pytest.approx(mean_batch_latency_s(num_batches * batch_s, num_batches))
        assert found["p95_latency_s"] <= num_batches * batch_s
        assert found["throughput_tokens_per_s"] == pytest.approx(88 / (num_batches * batch_s))
        assert "num_tokens" not in found  # is counted, never predicted
        # 260 bytes of weights and 10.5 positions of 8 bytes a sequence, at 1000 bytes a second.
        assert open_.limit(cell) == {"throughput_tokens_per_s": pytest.approx(size * 1000 / (260 + size * 10.5 * 8))}
    together = open_.predicted(chosen.cells[-1])
    assert together["mean_latency_s"] == pytest.approx(88 / together["throughput_tokens_per_s"])  # they are one batch


def test_a_window_that_nobody_waits_for_is_told() -> None:
    at_once = experiment(requests=8, batch=(3, 4), wait_ms=(0.0, 10.0))
    told = {cell.name: " ".join(session(at_once).notes(cell)) for cell in at_once.cells}
    assert [name for name, text in told.items() if "never waited" in text] == ["batch 4, wait 10 ms"]
    random = experiment(requests=8, batch=4, wait_ms=10.0, arrivals=POISSON)
    assert session(random).notes(random.cells[0]) == ()


def test_predictions_for_random_arrivals_are_the_mean_over_seeds() -> None:
    chosen = experiment(requests=4, prompt_tokens=5, tokens=11, batch=1, wait_ms=0.0, arrivals=POISSON, rate_per_s=1e-3)
    open_ = session(chosen)
    static, continuous = chosen.cells
    batch_s = forecast().ttft_s(5) + 10 * forecast().decode_step_s(1, 10.5)
    # A request in a quarter of an hour meets nobody.
    assert open_.predicted(static)["mean_latency_s"] == pytest.approx(batch_s, rel=1e-3)
    assert open_.predicted(continuous) == {}


async def test_a_repeat_asks_for_as_many_different_prompts_as_the_workload_has() -> None:
    rig = FakeRig()
    chosen = experiment(requests=5, prompt_tokens=6, tokens=7, batch=2, wait_ms=0.0)
    open_ = session(chosen, rig)
    for cell in chosen.cells:
        rig.seen.clear()
        found = await open_.measure(cell, seed=3)
        assert found["num_tokens"] == 5 * 7
        assert len(set(rig.seen)) == 5
        assert {len(prompt) for prompt in rig.seen} == {6}
        assert all(0 <= token < 97 for prompt in rig.seen for token in prompt)
    again = list(rig.seen)
    rig.seen.clear()
    await open_.measure(chosen.cells[0], seed=3)
    assert rig.seen == again
    await open_.measure(chosen.cells[0], seed=4)
    assert rig.seen[5:] != again
    assert open_.facts() == {"load_model_s": 3.5}


def test_an_answer_without_tokens_is_an_error() -> None:
    empty = Answer(submitted_s=0.0, token_s=(), tokens=(), scheduled_s=0.0)
    with pytest.raises(EngineError, match="without a token"):
        done_of(empty, 0.0)
    with pytest.raises(EngineError, match="without a token"):
        answer_metrics(empty)


def test_rates_with_and_without_the_first_token_count_from_other_moments() -> None:
    found = stream_metrics(ttft_s=1.0, decode_s=2.0, num_tokens=5)
    assert found == {
        "ttft_s": 1.0,
        "tpot_s": 0.5,
        "tokens_per_s": pytest.approx(5 / 3),
        "decode_tokens_per_s": 2.0,
        "num_tokens": 5,
    }
    answer = Answer(submitted_s=10.0, token_s=(11.0, 12.0, 13.0), tokens=(TokenId(1),) * 3, scheduled_s=10.5)
    assert answer_metrics(answer) == stream_metrics(ttft_s=1.0, decode_s=2.0, num_tokens=3)
    with pytest.raises(EngineError, match="1 tokens"):
        stream_metrics(ttft_s=1.0, decode_s=0.0, num_tokens=1)


def test_a_stream_is_predicted_by_the_planner_and_bounded_by_memory() -> None:
    stream = Stream(prompt_tokens=16, tokens=5)
    found = predicted_stream(forecast(), stream)
    assert found["ttft_s"] == forecast().ttft_s(16)
    assert found["tpot_s"] == pytest.approx(forecast().decode_step_s(1, 18.5))
    assert found["tokens_per_s"] == pytest.approx(5 / (found["ttft_s"] + 4 * found["tpot_s"]))
    limit = Possible(bytes_per_s=1000.0, weight_bytes=260, kv_bytes_per_position=8)
    assert possible_stream(limit, stream)["tpot_s"] == pytest.approx((260 + 18.5 * 8) / 1000)
    assert possible_stream(replace(limit, bytes_per_s=None), stream) == {}


def test_an_engine_alone_takes_its_layers_and_its_head_and_nothing_else() -> None:
    stages_ = (Shard(first_layer=0, last_layer=1, embed=True, head=False), replace(WHOLE, first_layer=1, embed=False))
    alone = EngineForecast(speed=SPEED, stages=stages_)
    assert alone.step_s(0, 100) == pytest.approx(1e-3 + 2e-3)
    assert alone.step_s(1, 100) == pytest.approx(1e-3 + 2e-3 + 4e-3)
    assert alone.prefill_s(1, 11) == pytest.approx(1e-3 + 12e-3 + 4e-3)
    reading = replace(SPEED, read_s=1e-6)
    assert replace(alone, speed=reading).step_s(0, 100) == pytest.approx(1e-3 + 2e-3 + 100e-6)


def test_ranks_divide_layers_and_head_and_pay_two_all_reduces_a_layer() -> None:
    one, two = forecast(), with_ranks(forecast(), 2)
    # Of two ranks: 2 messages an all-reduce, 0.2 ms each within a machine; 8 bytes at 1 GB/s do not count.
    all_reduces_s = 2 * 2 * 2 * 0.2e-3
    saved_s = (2 * 2e-3 + 4e-3) / 2
    assert two.decode_step_s(1, 10) == pytest.approx(one.decode_step_s(1, 10) - saved_s + all_reduces_s, abs=1e-6)
    assert with_ranks(one, 1) == one


# ---- what experiments say of themselves ------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_every_experiment_is_found_with_cells_of_different_names_and_a_baseline_among_them(kind: str) -> None:
    found = find(kind, {})
    names = [cell.name for cell in found.cells]
    assert found.name == kind
    assert len(set(names)) == len(names) > 0
    assert found.baseline is None or found.baseline in names
    assert "num_tokens" in {column.metric for column in found.columns}
    assert {figure.metric for figure in found.figures} <= {column.metric for column in found.columns}
    settings = found.conditions.settings
    assert settings["model"] == "embedded"
    assert settings["dtype"] == "bfloat16"
    for cell in found.cells:
        everything = {**settings, **cell.settings}
        assert isinstance(everything["requests"], int)  # what sanity checks need
        assert isinstance(everything["tokens"], int)


@pytest.mark.parametrize("kind", KINDS)
def test_every_experiment_refuses_a_parameter_that_it_does_not_have(kind: str) -> None:
    with pytest.raises(ConfigError, match=f"{kind} has no parameter modle; it has model, dtype"):
        find(kind, {"modle": "embedded"})


def test_an_unknown_kind_names_the_known_ones() -> None:
    with pytest.raises(ConfigError, match="no experiment 'phase'; there are baseline, phases, batching, pp-tp"):
        find("phase", {})


@pytest.mark.parametrize(
    ("kind", "parameters", "reason"),
    [
        ("batching", {"dtype": "float8"}, "dtype is 'float8'; it must be one of float32"),
        ("batching", {"quantize": "int3"}, "cannot be quantized to 'int3'"),
        ("batching", {"arrivals": "late"}, "arrivals is 'late'; it must be one of at-once, poisson"),
        ("batching", {"rate_per_s": 5.0}, "rate_per_s is 5, but all requests arrive at once. Set arrivals=poisson"),
        ("batching", {"batch": (4, 4)}, "different whole numbers"),
        ("batching", {"tokens": 1}, "tokens is 1; it must be a whole number from 2 on"),
        ("phases", {"stages": (0,)}, "different whole numbers from 1 on"),
        ("pp-tp", {"threads": 0}, "threads is 0"),
    ],
)
def test_impossible_parameters_are_refused_with_what_is_allowed(
    kind: str, parameters: Mapping[str, Any], reason: str
) -> None:
    with pytest.raises(ConfigError, match=reason):
        find(kind, parameters)


def test_random_arrivals_have_a_rate_unless_one_is_given() -> None:
    assert experiment(arrivals=POISSON).workload.rate_per_s > 0
    assert experiment(arrivals=POISSON, rate_per_s=3.0).workload.rate_per_s == 3.0
    assert experiment().conditions.settings["rate_per_s"] == 0.0


@pytest.mark.parametrize("kind", ["batching", "pp-tp", "local-vs-cluster"])
async def test_more_tokens_than_the_models_context_are_refused_before_anything_is_started(kind: str) -> None:
    with pytest.raises(ConfigError, match="prompt_tokens or tokens"):
        async with find(kind, {"prompt_tokens": 1 << 20}).opened():
            pass


def test_batching_has_every_combination_and_the_schedulers_own() -> None:
    cells = experiment(batch=(1, 4), wait_ms=(0.0, 10.0)).cells
    assert [(cell.settings.get("batch"), cell.settings.get("wait_ms")) for cell in cells] == [
        (1, 0.0),
        (4, 0.0),
        (1, 10.0),
        (4, 10.0),
        (None, None),
    ]
    assert cells[-1].name == CONTINUOUS


def test_ranks_are_refused_with_the_reason_and_pipelines_where_cores_are_missing() -> None:
    found = cast(Any, find("pp-tp", {"pp": (1, 2, 4), "tp": (1, 2), "threads": 1}))
    cells = {cell.name: cell for cell in replace(found, num_processors=2).cells}
    refused = {name: cell.refused for name, cell in cells.items()}
    assert refused == {
        "PP 1, TP 1, 1 core a rank": "",
        "PP 1, TP 1, 2 cores a rank": "",  # what two cores are worth without a cut
        "PP 2, TP 1, 1 core a rank": "",
        "PP 4, TP 1, 1 core a rank": "it needs 4 processors, and this machine gives 2",
        "PP 1, TP 2, 1 core a rank": "the engine has no ranks yet: a stage is one process",
        "PP 2, TP 2, 1 core a rank": "the engine has no ranks yet: a stage is one process",
        "PP 4, TP 2, 1 core a rank": "the engine has no ranks yet: a stage is one process",
    }


def test_two_workers_are_refused_where_there_is_one_thread() -> None:
    refused = [cell.name for cell in find("local-vs-cluster", {"threads": 1}).cells if cell.refused]
    assert refused == ["two workers"]
    assert not any(cell.refused for cell in find("local-vs-cluster", {"threads": 2}).cells)


def test_phases_have_columns_for_every_stage_and_time_them_apart() -> None:
    from tllm.lab.experiments.phases import stage_seconds

    answered = Answered(tokens=(1, 2, 3, 4), steps_s=((5.0, 6.0), (1.0, 2.0), (3.0, 9.0), (2.0, 3.0)))
    seconds = stage_seconds(answered)
    assert seconds == {
        "stage_0_prefill_s": 5.0,
        "stage_0_step_s": 2.0,
        "stage_1_prefill_s": 6.0,
        "stage_1_step_s": 3.0,
    }
    assert seconds.keys() <= {column.metric for column in find("phases", {}).columns}


def test_the_baselines_rates_give_the_first_token_to_the_prefill() -> None:
    from tllm.lab.experiments.baseline import predicted_rates, rates

    found = rates(Answered(tokens=(1, 2, 3), steps_s=((4.0,), (1.0,), (3.0,))))
    assert found["tokens_per_s"] == 3 / 8
    assert found["decode_tokens_per_s"] == 2 / 4
    assert found["step_s"] == 2.0
    alone = predicted_rates(EngineForecast(speed=SPEED, stages=(WHOLE,)), prompt_tokens=11, tokens=3)
    assert alone["prefill_s"] == pytest.approx(1e-3 + 2 * 12e-3 + 4e-3)
    assert alone["decode_loop_s"] == pytest.approx(2 * alone["step_s"])
    assert alone.keys() == found.keys() - {"num_tokens"}


# ---- where they run --------------------------------------------------------------------------------------------------


def test_several_stages_share_threads_on_processors_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stages, "processors", lambda: [3, 5, 6, 7])
    assert stages.stages_of(4, 1) == (Stage(num_threads=4),)
    assert stages.stages_of(4, 2) == (Stage(num_threads=2, cpus=(3, 5)), Stage(num_threads=2, cpus=(6, 7)))
    assert stages.pinned_stages(1, 2) == (Stage(num_threads=1, cpus=(3,)), Stage(num_threads=1, cpus=(5,)))
    with pytest.raises(ConfigError, match="3 stages cannot share 2 threads"):
        stages.stages_of(2, 3)
    with pytest.raises(ConfigError, match="need 6; this machine gives 4"):
        stages.pinned_stages(2, 3)


def test_memory_bounds_only_what_no_cache_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(subject, "_cache_bytes", lambda: 32 << 20)
    assert not subject.exceeds_caches(60 << 20)
    assert subject.exceeds_caches(300 << 20)


async def test_memory_is_not_measured_for_a_model_that_a_cache_holds(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Any
) -> None:
    monkeypatch.setattr(subject, "_cache_bytes", lambda: 32 << 20)
    found = await expected.possible(tmp_path, weight_bytes=1 << 20, kv_bytes_per_position=1, num_threads=1)
    assert found.tokens_per_s(1, 0.0) is None


def test_prompts_are_those_of_their_seed() -> None:
    drawn = subject.random_prompts(1, number=3, num_tokens=50, vocab_size=7)
    assert drawn == subject.random_prompts(1, number=3, num_tokens=50, vocab_size=7)
    assert drawn != subject.random_prompts(2, number=3, num_tokens=50, vocab_size=7)
    assert {token for prompt in drawn for token in prompt} == set(range(7))


def test_a_preset_is_float32_unless_said_and_a_model_is_what_it_is() -> None:
    def taken(**given_: Any) -> subject.Subject:
        return subject.take_subject(Parameters("any", given_))

    assert taken(model="distilgpt2", threads=1).settings["dtype"] == "float32"
    assert taken(model="distilgpt2", threads=1).title == "distilgpt2 @ float32, random weights"
    assert taken(model="distilgpt2", dtype="bfloat16", threads=1).settings["dtype"] == "bfloat16"
    assert taken(quantize="int8", threads=3).title == "embedded @ bfloat16, weights int8"
    assert "distilgpt2" in models.PRESETS
    assert Cell(name="any", settings=taken(threads=3).settings).settings["threads"] == 3
