"""How many KV blocks a pipeline gets: what every stage can hold, and never more than its machine offers."""

from __future__ import annotations

import pytest

from tllm.cluster.rollout import kv_shape
from tllm.core.config import ModelConfig
from tllm.core.errors import PlanError
from tllm.models.spec import Shard
from tllm.planner.plan import Plan, StagePlan
from tllm.planner.profile import NodeProfile

GB = 10**9


def plan(*nodes: tuple[str, int, int], layers: int = 4) -> Plan:
    """Stages of `layers` layers, each (machine, memory its node offers, workers on that node); 1 GB of weights each."""
    stages = [
        StagePlan(
            node=NodeProfile(
                id=f"n{index}",
                name=machine,
                machine=machine,
                host="",
                memory_bytes=memory,
                num_threads=1,
                num_workers=workers,
            ),
            shard=Shard(
                first_layer=index * layers,
                last_layer=(index + 1) * layers,
                embed=index == 0,
                head=index == len(nodes) - 1,
            ),
            num_threads=1,
            held_bytes=GB,
            read_bytes=GB,
            kv_bytes_per_position=1000,
        )
        for index, (machine, memory, workers) in enumerate(nodes)
    ]
    return Plan(stages=tuple(stages))


def test_blocks_are_the_least_that_any_stage_can_hold():
    cut = plan(("a", 9 * GB, 1), ("b", 9 * GB, 1))
    shape = kv_shape(cut, [8 * GB, 40 * 64 * 1000 * 2], 128, ModelConfig(block_size=64))
    assert shape.num_blocks == 40
    assert shape.max_model_len == 128


def test_stages_on_one_device_share_what_is_free_there_whichever_node_runs_them():
    alone = kv_shape(plan(("a", 9 * GB, 1)), [GB], 10**6, ModelConfig())
    together = kv_shape(plan(("a", 9 * GB, 1), ("a", 9 * GB, 1)), [GB, GB], 10**6, ModelConfig())
    assert together.num_blocks == alone.num_blocks // 2


def test_the_cache_stays_within_the_memory_that_the_node_offers_beside_its_weights():
    shape = kv_shape(plan(("a", GB + 64 * 1000 * 50, 1)), [100 * GB], 10**6, ModelConfig(block_size=64))
    assert shape.num_blocks == 50


def test_nobody_takes_more_than_several_contexts_need():
    shape = kv_shape(plan(("a", 900 * GB, 1)), [800 * GB], 2**20, ModelConfig(block_size=64))
    assert shape.num_blocks == 8 * 2**20 // 64


@pytest.mark.parametrize("free", [GB, 3 * GB])
def test_more_kv_memory_than_a_stage_can_have_is_refused(free):
    cut = plan(("a", 9 * GB, 1), ("a", 9 * GB, 1))
    with pytest.raises(PlanError, match="--kv-memory asks for 2 GB on a"):
        kv_shape(cut, [free, free], 128, ModelConfig(kv_bytes=2 * GB))


def test_a_context_that_does_not_fit_is_refused_when_it_was_asked_for_and_shortened_when_not():
    cut = plan(("a", GB + 64 * 1000 * 4, 1))
    assert kv_shape(cut, [GB], 4096, ModelConfig()).max_model_len == 256
    with pytest.raises(PlanError, match="256 positions, fewer than the 4096"):
        kv_shape(cut, [GB], 4096, ModelConfig(max_model_len=4096))
