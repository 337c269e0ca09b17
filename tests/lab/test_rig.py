"""A pipeline on the bench answers as any other does, over cables too, and can be driven anew."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from tllm.core.errors import EngineError, UnavailableError
from tllm.lab.forecast import Forecast, Overhead
from tllm.lab.rig import Answer, LinkShape, Stage, decode_rate, pipeline
from tllm.models.spec import Shard
from tllm.planner.plan import StagePlan
from tllm.planner.predict import chain_of
from tllm.planner.profile import ModelProfile, NodeProfile, Speed
from tllm.testing.checkpoints import tiny_checkpoint

PROMPT = tuple(range(3, 40))


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("rig"), "llama")


async def test_cables_and_chunks_change_no_token(tiny: Path) -> None:
    async with pipeline(tiny, stages=[Stage(), Stage()], with_links=True) as rig:
        with pytest.raises(UnavailableError, match="measured"):
            rig.forecast()
        rig.shape([LinkShape(bytes_per_s=1e9, delay_s=0.0)] * 3)
        await rig.serve(max_model_len=128)
        whole = await rig.answer(PROMPT, max_tokens=8)
        rig.shape([LinkShape(bytes_per_s=1e9, delay_s=10e-3)] * 3)
        await rig.serve(max_model_len=128, prefill_chunk=8)
        cut = await rig.answer(PROMPT, max_tokens=8)
        assert len(whole.tokens) == 8
        assert cut.tokens == whole.tokens
        assert cut.tpot_s > 30e-3  # three cables
        assert cut.ttft_s > 30e-3
        together = await rig.answers([PROMPT, PROMPT], max_tokens=8)
        assert [answer.tokens for answer in together] == [whole.tokens] * 2
        with pytest.raises(EngineError):
            await rig.serve(max_model_len=128, max_sequences=1 << 28)


def test_decoding_counts_while_all_streams_decode() -> None:
    def answer(first_s: float, interval_s: float) -> Answer:
        times_s = tuple(first_s + interval_s * index for index in range(5))
        return Answer(submitted_s=0.0, scheduled_s=0.0, token_s=times_s, tokens=())

    early, late = answer(1.0, 1.0), answer(2.5, 1.0)
    # After 2.5 s and until 5 s the first has tokens at 3, 4 and 5, the second at 3.5 and 4.5.
    assert decode_rate([early, late]) == pytest.approx(5 / 2.5)
    assert early.tpot_s == 1.0
    assert math.isnan(Answer(submitted_s=0.0, scheduled_s=0.0, token_s=(1.0,), tokens=()).tpot_s)


def test_a_forecast_is_the_planners_with_what_a_step_costs_beside() -> None:
    model = ModelProfile(
        name="m", layer_bytes=(10, 10), embed_bytes=5, head_bytes=5, tied=False, kv_bytes_per_position=1, hidden_bytes=8
    )
    speed = Speed(rows=(1, 256), layer_s=(1e-3, 256e-3), head_s=(2e-3, 2e-3), step_s=1e-3)
    node = NodeProfile(id="a", name="a", machine="m", host="", memory_bytes=100, num_threads=1, speed=speed)

    def stage(first: int, last: int) -> StagePlan:
        return StagePlan(
            node=node,
            shard=Shard(first_layer=first, last_layer=last, embed=first == 0, head=last == 2),
            num_threads=1,
            held_bytes=30,
            read_bytes=25,
            kv_bytes_per_position=2,
        )

    stages = (stage(0, 1), stage(1, 2))
    overhead = Overhead(rows=(1, 4), head_s=(1e-3, 4e-3), handover_s=0.5e-3, first_s=2e-3)
    forecast = Forecast(model=model, stages=stages, links=(), head_machine="m", overhead=overhead, max_batch_tokens=16)
    bare = chain_of(model, stages, [], head_machine="m", head_step_s=0.0)
    assert bare is not None
    for batch, head_s in ((1, 1e-3), (4, 4e-3), (9, 4e-3)):
        expected_s = bare.round_trip(batch, context=10, num_steps=1).cycle_s + head_s + overhead.handover_s
        assert forecast.round_trip(batch, 10, num_steps=1).cycle_s == pytest.approx(expected_s)
        assert forecast.tokens_per_s(batch, 10) == pytest.approx(batch / forecast.decode_step_s(batch, 10))
    assert forecast.ttft_s(16) == pytest.approx(bare.prefill_s(16, 16) + 1e-3 + overhead.handover_s + overhead.first_s)
    assert forecast.ttft_s(64, chunk=1 << 20) == forecast.ttft_s(64)
