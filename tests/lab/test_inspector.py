"""What the inspector shows of an answer is what transformers computes, and looking changes nothing."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from tllm.core.errors import ConfigError
from tllm.core.types import DType
from tllm.lab.inspection import Candidate, StagePart, StepView, kv_formula, stage_table, step_table
from tllm.lab.inspector import ChildInspector, Inspector, _answer, _view, even_stages
from tllm.testing.checkpoints import tiny_checkpoint

PROMPT = "Why batch?\nA:"  # 13 bytes, which are its tokens
NUM_TOKENS = 10
FAMILIES = ("llama", "gpt2")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {family: tiny_checkpoint(tmp_path_factory.mktemp(family), family, layers=3, shards=1) for family in FAMILIES}


def inspector(model: Path, num_stages: int) -> Inspector:
    return Inspector(model, dtype=DType.FLOAT32, num_threads=1, num_stages=num_stages)


@dataclass(frozen=True, slots=True, kw_only=True)
class Expected:
    """One step of transformers."""

    probabilities: torch.Tensor  # (V,)
    chosen: int
    kv_shape: tuple[int, ...]  # of a layer's keys, without the batch
    kv_bytes: int  # of all layers


def steps_of_transformers(model: Path) -> Iterator[Expected]:
    reference = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32, attn_implementation="eager").eval()
    ids = torch.tensor([list(PROMPT.encode())])
    cache = None
    with torch.inference_mode():
        for _ in range(NUM_TOKENS):
            output = reference(ids, past_key_values=cache, use_cache=True)
            cache, logits = output.past_key_values, output.logits[0, -1]
            ids = logits.argmax().reshape(1, 1)
            kept = [(layer.keys, layer.values) for layer in cache.layers]
            yield Expected(
                probabilities=logits.softmax(0),
                chosen=int(ids),
                kv_shape=tuple(kept[0][0].shape[1:]),
                kv_bytes=sum(part.nbytes for layer in kept for part in layer),
            )


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("num_stages", [1, 2])
def test_logits_candidates_and_kv_are_those_of_transformers(
    models: dict[str, Path], family: str, num_stages: int
) -> None:
    looking = inspector(models[family], num_stages)
    ids = looking.prompt_ids(PROMPT)
    views = looking.inspect(ids, NUM_TOKENS)
    assert len(ids) == 13
    assert [view.num_positions for view in views] == [*range(13, 23)]
    assert [view.num_rows for view in views] == [13] + [1] * 9
    for view, expected in zip(views, steps_of_transformers(models[family]), strict=True):
        assert view.chosen.token == expected.chosen
        assert view.logits_shape == (1, len(expected.probabilities))
        assert view.kv_shape == (2, *expected.kv_shape)
        assert view.kv_bytes == expected.kv_bytes == sum(stage.kv_bytes for stage in view.stages)
        best = expected.probabilities.topk(5)
        assert [each.token for each in view.candidates] == best.indices.tolist()
        assert [each.probability for each in view.candidates] == pytest.approx(best.values.tolist(), rel=1e-3)
    per_position = views[0].kv_bytes // 13
    assert {b.kv_bytes - a.kv_bytes for a, b in itertools.pairwise(views)} == {per_position}


def test_the_formula_gives_the_bytes_that_it_stands_beside(models: dict[str, Path]) -> None:
    looking = inspector(models["llama"], 1)
    views = looking.inspect(looking.prompt_ids(PROMPT), NUM_TOKENS)
    text = kv_formula(views, num_layers=3, dtype=DType.FLOAT32)
    assert text == (
        "2 (keys, values) x 3 layers x 2 KV heads x 16 x 4 B (float32) x 22 positions = 16,896 B; "
        "every step adds one position, 768 B"
    )
    assert views[-1].kv_bytes == 16_896 == 22 * looking.kv_bytes_per_position()


def test_stages_share_layers_and_kv_and_all_but_the_last_send_hidden_states(models: dict[str, Path]) -> None:
    looking = inspector(models["llama"], 2)
    views = looking.inspect(looking.prompt_ids(PROMPT), 3)
    assert [(stage.first_layer, stage.last_layer) for stage in views[0].stages] == [(0, 1), (1, 3)]
    for view in views:
        assert view.stages[1].kv_bytes == 2 * view.stages[0].kv_bytes
        assert [stage.sent_bytes for stage in view.stages] == [view.num_rows * 64 * 4, 0]
        assert view.seconds == sum(stage.seconds for stage in view.stages)
        assert all(stage.seconds > 0 for stage in view.stages)


def test_an_answer_is_the_same_before_while_and_after_it_is_looked_at(models: dict[str, Path]) -> None:
    looking = inspector(models["gpt2"], 1)
    ids = looking.prompt_ids(PROMPT)
    before = looking.answer(ids, 5)
    views = looking.inspect(ids, 5, num_candidates=1)
    after = looking.answer(ids, 5)
    assert before.tokens == tuple(view.chosen.token for view in views) == after.tokens
    assert [view.candidates for view in views] == [(view.chosen,) for view in views]
    assert len(before.steps_s) == before.num_tokens == 5
    assert before.prefill_s == sum(before.steps_s[0])
    assert before.decode_loop_s == pytest.approx(sum(sum(step) for step in before.steps_s[1:]))


def test_phases_are_those_of_the_same_answer(models: dict[str, Path]) -> None:
    looking = inspector(models["llama"], 1)
    phases = looking.phases(PROMPT, 4)
    assert phases.answered.tokens == looking.answer(looking.prompt_ids(PROMPT), 4).tokens
    assert phases.num_prompt_tokens == 13
    assert min(phases.load_model_s, phases.load_tokenizer_s, phases.tokenize_s) > 0
    looking.close()


def test_more_stages_than_layers_are_refused(models: dict[str, Path]) -> None:
    with pytest.raises(ConfigError, match=r"3 layers cannot be cut into 4 stages; 1 to 3"):
        inspector(models["llama"], 4)


@pytest.mark.parametrize("num_layers", range(1, 9))
def test_even_stages_cover_every_layer_once_and_differ_by_one_at_most(num_layers: int) -> None:
    for num_stages in range(1, num_layers + 1):
        shards = even_stages(num_layers, num_stages)
        assert [layer for shard in shards for layer in shard.layers] == [*range(num_layers)]
        sizes = [len(shard.layers) for shard in shards]
        assert max(sizes) - min(sizes) <= 1
        assert [shard.embed for shard in shards] == [True] + [False] * (num_stages - 1)
        assert [shard.head for shard in shards] == [False] * (num_stages - 1) + [True]


def without_times(view: StepView) -> StepView:
    return replace(view, stages=tuple(replace(stage, seconds=0.0) for stage in view.stages))


def test_a_child_sees_what_its_parent_would(models: dict[str, Path]) -> None:
    here = inspector(models["llama"], 2)
    ids = here.prompt_ids(PROMPT)
    with ChildInspector(models["llama"], dtype=DType.FLOAT32, num_threads=1, num_stages=2) as child:
        assert child.prompt_ids(PROMPT) == ids
        assert child.answer(ids, 4).tokens == here.answer(ids, 4).tokens
        expected = [without_times(view) for view in here.inspect(ids, 4)]
        assert [without_times(view) for view in child.inspect(ids, 4)] == expected
        assert child.phases(PROMPT, 2).text == here.phases(PROMPT, 2).text
        assert child.step_bytes() == here.step_bytes()
        assert child.kv_bytes_per_position() == here.kv_bytes_per_position()


def test_a_view_survives_being_sent(models: dict[str, Path]) -> None:
    looking = inspector(models["llama"], 1)
    ids = list(looking.prompt_ids(PROMPT))
    sent = json.loads(json.dumps(_answer(looking, "inspect", {"ids": ids, "num_tokens": 2})))
    assert [without_times(_view(view)) for view in sent] == [without_times(view) for view in looking.inspect(ids, 2)]


def view(text: str, **changes: object) -> StepView:
    chosen = Candidate(token=7, text=text, probability=0.5)
    stages = (
        StagePart(first_layer=0, last_layer=2, seconds=1e-3, kv_bytes=1000, sent_bytes=256),
        StagePart(first_layer=2, last_layer=4, seconds=2e-3, kv_bytes=2000, sent_bytes=0),
    )
    given = StepView(
        num_rows=1,
        num_positions=14,
        kv_shape=(2, 1, 14, 8),
        kv_bytes=3000,
        logits_shape=(1, 259),
        candidates=(chosen, Candidate(token=8, text="", probability=0.25)),
        chosen=chosen,
        stages=stages,
    )
    return replace(given, **changes)


def test_a_table_shows_spaces_and_line_ends_and_keeps_its_columns() -> None:
    head, _, prefill, decode = step_table([view(" a\n", num_rows=13, num_positions=13), view("|")])
    assert prefill == (
        r"| prefill | 13 | 3.00 | 13 | 3 KB | (1, 259) | `" + '" a\\n"' + r"` | `" + '" a\\n"' + "` 50.0%, #8 25.0% |"
    )
    assert r'`"\|"`' in decode
    assert decode.replace(r"\|", "").count("|") == head.count("|")


def test_the_stages_table_has_the_median_step_and_what_is_sent() -> None:
    fast = view("a")
    slow = replace(fast, stages=tuple(replace(stage, seconds=1.0) for stage in fast.stages))
    lines = list(stage_table([fast, fast, slow, fast]))
    assert lines[2:] == [
        "| 0 | 0..1 | 1.00 | 1.00 | 1 KB | 256 B | 256 B |",
        "| 1 | 2..3 | 2.00 | 2.00 | 2 KB |  |  |",
    ]
    assert [*stage_table([fast])][2] == "| 0 | 0..1 | 1.00 | N/A | 1 KB | 256 B | 256 B |"
