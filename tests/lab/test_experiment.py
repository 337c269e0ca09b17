"""Every cell is measured as often as any other, in an order drawn from the seed; what is given is taken or refused."""

from __future__ import annotations

import asyncio
import itertools
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.lab.fake_experiment import FakeExperiment, cell
from tllm.core.errors import ConfigError
from tllm.lab.description import Description
from tllm.lab.experiment import Parameters
from tllm.lab.record import Record, Records
from tllm.lab.runner import CELL, Progress, run
from tllm.lab.spec import Spec, parse_settings, read_spec, spec_of


def spec(**values: float) -> Spec:
    return spec_of("fake", values)


def measured(
    directory: Path, experiment: FakeExperiment, spec: Spec, progress: list[Progress] | None = None
) -> tuple[Description, tuple[Record, ...]]:
    """A clock that ticks once a reading: every measurement takes one second."""
    clock = itertools.count()
    with Records(directory / "records.sqlite") as records:
        running = run(
            experiment,
            spec,
            records,
            name="fake-1",
            environment={"cores": "2"},
            on_progress=(progress if progress is not None else []).append,
            clock=lambda: float(next(clock)),
        )
        return asyncio.run(running), records.find(experiment="fake", run="fake-1")


def test_every_cell_is_warmed_up_first_and_then_repeated_in_one_shuffled_order(tmp_path: Path):
    experiment = FakeExperiment()
    _, records = measured(tmp_path, experiment, spec(repeats=6, warmups=2, seed=3))
    cells = [name for name, _ in experiment.seen]
    assert cells[:4] == ["batch=1", "batch=1", "batch=4", "batch=4"]
    repeats = cells[4:]
    assert sorted(repeats) == ["batch=1"] * 6 + ["batch=4"] * 6
    assert repeats != sorted(repeats)
    assert repeats != ["batch=1", "batch=4"] * 6
    assert len(records) == 12  # no warm-up is kept


@given(repeats=st.integers(1, 6), warmups=st.integers(0, 2), seed=st.integers(0, 2**53), number=st.integers(1, 4))
@settings(max_examples=8, deadline=None)
def test_every_cell_has_every_repeat_once_with_the_same_seeds(
    tmp_path_factory: pytest.TempPathFactory, repeats: int, warmups: int, seed: int, number: int
):
    cells = tuple(cell(batch) for batch in range(1, number + 1))
    experiment = FakeExperiment(cells=cells, tokens_per_s={each.name: 50.0 for each in cells})
    _, records = measured(tmp_path_factory.mktemp("run"), experiment, spec(repeats=repeats, warmups=warmups, seed=seed))
    kept = sorted((str(record.settings[CELL]), record.repeat, record.seed) for record in records)
    assert kept == sorted((each.name, repeat, seed + repeat) for each in cells for repeat in range(repeats))


def test_the_same_seed_gives_the_same_order_and_another_one_another(tmp_path: Path):
    orders = []
    for number, seed in enumerate((1, 1, 2)):
        experiment = FakeExperiment()
        measured(tmp_path / str(number), experiment, spec(repeats=8, seed=seed))
        orders.append([name for name, _ in experiment.seen])
    assert orders[0] == orders[1] != orders[2]


def test_a_record_has_the_settings_of_its_cell_and_of_the_experiment(tmp_path: Path):
    _, records = measured(tmp_path, FakeExperiment(), spec(repeats=1))
    record = next(each for each in records if each.settings[CELL] == "batch=4")
    assert record.settings == {"requests": 16, "tokens": 32, "arrivals": "at-once", "batch": 4, CELL: "batch=4"}
    assert record.environment == {"cores": "2"}
    assert record.metrics["num_tokens"] == 512


def test_a_cell_that_fails_fails_alone_and_is_not_tried_again(tmp_path: Path):
    experiment = FakeExperiment(failing={"batch=4": 3})
    progress: list[Progress] = []
    description, records = measured(tmp_path, experiment, spec(repeats=5), progress)
    assert description.failures == {"batch=4": "out of memory"}
    assert [name for name, _ in experiment.seen].count("batch=4") == 3
    kept = [record.settings[CELL] for record in records]
    assert (kept.count("batch=1"), kept.count("batch=4")) == (5, 1)
    assert progress[-1].num_done == progress[-1].num_total == 12
    assert {each.cell for each in progress if each.failure} == {"batch=4"}
    assert not experiment.is_open


def test_a_measurement_that_takes_too_long_fails(tmp_path: Path):
    experiment = FakeExperiment(hanging=frozenset({"batch=4"}))
    description, records = measured(tmp_path, experiment, spec(repeats=2, limit_s=0.01))
    assert description.failures == {"batch=4": "took longer than 0.01 s"}
    assert len(records) == 2


def test_a_figure_that_cannot_be_kept_fails_its_cell(tmp_path: Path):
    description, records = measured(tmp_path, FakeExperiment(extra={"ttft_s": float("nan")}), spec())
    assert set(description.failures) == {"batch=1", "batch=4"}
    assert "ttft_s = nan" in description.failures["batch=1"]
    assert records == ()


def test_the_time_that_is_left_is_known_once_every_cell_was_measured(tmp_path: Path):
    progress: list[Progress] = []
    measured(tmp_path, FakeExperiment(), spec(repeats=5), progress)
    assert [each.phase for each in progress[:3]] == ["warm-up", "warm-up", "repeat"]
    assert progress[0].left_s is None
    assert [each.left_s for each in progress[1:]] == [float(left) for left in range(10, -1, -1)]


def test_a_run_that_a_bug_ends_is_described_and_keeps_its_records(tmp_path: Path):
    experiment = FakeExperiment(tokens_per_s={"batch=1": 100.0})  # no figure for batch=4
    with pytest.raises(KeyError):
        measured(tmp_path, experiment, spec(warmups=0, repeats=5, seed=1))
    with Records(tmp_path / "records.sqlite") as records:
        assert Description.from_json(records.description("fake-1")).predicted["batch=4"]
        assert all(record.settings[CELL] == "batch=1" for record in records.find())
    assert not experiment.is_open


def test_a_description_comes_back_as_it_was_kept(tmp_path: Path):
    description, _ = measured(tmp_path, FakeExperiment(failing={"batch=4": 1}), spec())
    with Records(tmp_path / "records.sqlite") as records:
        assert Description.from_json(records.description("fake-1")) == description
    assert description.facts == {"load_model_s": 0.125}
    with pytest.raises(ConfigError, match="another version"):
        Description.from_json('{"run": "fake-1"}')


# ---- what is given ---------------------------------------------------------------------------------------------------


def test_parameters_are_taken_as_given_or_by_default():
    given = Parameters("fake", {"batch": (1, 4), "wait_ms": 10, "model": "tiny", "pin": True, "threads": 2})
    assert given.counts("batch", (1,)) == (1, 4)
    assert given.numbers("wait_ms", (0.0,)) == (10.0,)
    assert given.text("model", "other") == "tiny"
    assert given.flag("pin", default=False)
    assert given.count("threads", 1) == 2
    assert given.optional_text("dtype") is None
    assert given.count("requests", 16) == 16
    assert given.number("rate", 2.5) == 2.5
    assert given.choice("arrivals", ("at-once", "poisson"), "poisson") == "poisson"
    given.done()


def test_a_parameter_that_nobody_took_is_refused_with_those_there_are():
    given = Parameters("fake", {"bacth": 4})
    given.count("batch", 1)
    given.optional_text("dtype")
    with pytest.raises(ConfigError, match=r"The experiment fake has no parameter bacth; it has batch, dtype\."):
        given.done()


@pytest.mark.parametrize(
    ("value", "take"),
    [
        (0, lambda given: given.count("x", 1)),
        (True, lambda given: given.count("x", 1)),
        (1.5, lambda given: given.count("x", 1)),
        ((1, 1), lambda given: given.counts("x", (1,))),
        ((), lambda given: given.counts("x", (1,))),
        ((1, "a"), lambda given: given.counts("x", (1,))),
        (float("inf"), lambda given: given.number("x", 1)),
        (float("nan"), lambda given: given.numbers("x", (1,))),
        (-1, lambda given: given.number("x", 1)),
        ("", lambda given: given.text("x", "a")),
        (7, lambda given: given.optional_text("x")),
        ("c", lambda given: given.choice("x", ("a", "b"), "a")),
        (1, lambda given: given.flag("x", default=True)),
    ],
)
def test_a_parameter_without_a_possible_value_is_refused(value, take):
    with pytest.raises(ConfigError, match=r"The experiment fake: x is .*; it must be "):
        take(Parameters("fake", {"x": value}))


def test_a_spec_has_what_is_common_and_leaves_the_rest_to_its_kind():
    spec = spec_of("fake", {"repeats": 7, "seed": 4, "batch": (1, 4)})
    assert (spec.repeats, spec.warmups, spec.seed, spec.parameters) == (7, 1, 4, {"batch": (1, 4)})


@pytest.mark.parametrize("values", [{"repeats": 0}, {"warmups": -1}, {"seed": 2**60}, {"limit_s": 0}, {"seed": "a"}])
def test_a_spec_that_cannot_be_run_is_refused(values):
    with pytest.raises(ConfigError, match="The experiment fake: "):
        spec_of("fake", values)


def test_a_file_gives_its_kind_and_its_values(tmp_path: Path):
    path = tmp_path / "spec.toml"
    path.write_text('[experiment]\nkind = "batching"\nrepeats = 6\nbatch = [1, 4]\nwait_ms = 0.5\n')
    assert read_spec(path) == ("batching", {"repeats": 6, "batch": (1, 4), "wait_ms": 0.5})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("batch = 1", "it must have one table"),
        ("", "has nothing; it must have one table"),
        ("[experiment]\nkind = 1", "kind is 1"),
        ("[experiment]", "kind is None"),
        ('[experiment]\nkind = "fake"\nbatch = [[1]]', "batch is"),
        ('[experiment]\nkind = "fake"\nat = 2026-01-31', "at is"),
        ("[experiment", "is not TOML"),
    ],
)
def test_a_file_that_is_no_spec_is_refused(tmp_path: Path, text: str, message: str):
    path = tmp_path / "spec.toml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=message):
        read_spec(path)
    with pytest.raises(ConfigError, match="cannot be read"):
        read_spec(tmp_path / "none.toml")


def test_settings_are_values_as_in_a_file_or_else_texts():
    given = ["batch=[1,4]", "wait_ms = 0.5", "pin=true", "model=a/b=c", 'name="x y"']
    assert parse_settings(given) == {"batch": (1, 4), "wait_ms": 0.5, "pin": True, "model": "a/b=c", "name": "x y"}
    for wrong in ("batch", "=4", "batch="):
        with pytest.raises(ConfigError, match="give key=value"):
            parse_settings([wrong])
