"""A record comes back as it was added, from both files, and is complete or refused."""

from __future__ import annotations

import json
import math
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from types import MappingProxyType

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tllm.core.errors import ConfigError
from tllm.lab import environment as environments
from tllm.lab.environment import UNKNOWN, environment, revision
from tllm.lab.record import Record, Records, records_path, utc_now

RECORD = Record(
    experiment="batching",
    run="batching-1",
    at="2026-01-31T12:00:00+00:00",
    environment={"cores": "2"},
    settings={"batch": 4, "wait_ms": 0.5, "model": "tiny", "continuous": False},
    repeat=0,
    seed=7,
    metrics={"total_s": 1.25, "num_tokens": 512},
    notes="one\ntwo",
)

texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)
names = texts.filter(bool)
finite = st.floats(allow_nan=False, allow_infinity=False)
kept = st.builds(
    Record,
    experiment=names,
    run=names,
    at=st.datetimes().map(lambda moment: moment.isoformat() + "+00:00"),
    environment=st.dictionaries(texts, texts, max_size=2),
    settings=st.dictionaries(texts, texts | st.integers() | finite | st.booleans(), max_size=3),
    repeat=st.integers(0, 2**63 - 1),
    seed=st.integers(0, 2**63 - 1),
    metrics=st.dictionaries(texts, finite, max_size=3),
    notes=texts,
)


@contextmanager
def kept_in() -> Iterator[Records]:
    with TemporaryDirectory() as directory, Records(Path(directory) / "lab" / "records.sqlite") as records:
        yield records


def exact(record: Record) -> str:
    """Types included: 1, 1.0 and true are equal and not the same."""
    return repr(record)


@given(st.lists(kept, min_size=1, max_size=3))
@settings(max_examples=15, deadline=None)
def test_records_come_back_from_both_files_as_they_were_added(added: list[Record]):
    with kept_in() as records:
        for record in added:
            records.add(record)
        lines = records.lines_path.read_text().splitlines()
        assert list(map(exact, records.find())) == list(map(exact, added))
        assert [exact(Record.from_json(line)) for line in lines] == list(map(exact, added))


def test_records_outlive_the_process_that_added_them(tmp_path: Path):
    path = tmp_path / "records.sqlite"
    with Records(path) as records:
        records.add(RECORD)
    with Records(path) as records:
        records.add(replace(RECORD, repeat=1))
        assert [record.repeat for record in records.find()] == [0, 1]


def test_records_are_found_by_experiment_and_by_run(tmp_path: Path):
    with Records(tmp_path / "records.sqlite") as records:
        for experiment, run in (("a", "a-1"), ("a", "a-2"), ("b", "b-1")):
            records.add(replace(RECORD, experiment=experiment, run=run))
        assert [record.run for record in records.find(experiment="a")] == ["a-1", "a-2"]
        assert [record.run for record in records.find(run="b-1")] == ["b-1"]
        assert records.find(experiment="a", run="b-1") == ()


@pytest.mark.parametrize("name", [field.name for field in fields(Record)])
def test_a_line_without_one_of_the_fields_is_refused(name: str):
    values = json.loads(RECORD.as_json())
    del values[name]
    with pytest.raises(ConfigError, match=f"lacks {name}; it must have exactly experiment"):
        Record.from_json(json.dumps(values))


@pytest.mark.parametrize("line", ["", "7", "{", '{"experiment": "a", "speed": 3}'])
def test_what_is_no_record_is_refused(line: str):
    with pytest.raises(ConfigError, match="A record"):
        Record.from_json(line)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("experiment", ""),
        ("run", None),
        ("at", "yesterday"),
        ("at", "2026-01-31T12:00:00"),  # of which place?
        ("at", "2026-01-31T12:00:00+08:00"),
        ("repeat", -1),
        ("repeat", True),
        ("seed", 2**63),
        ("seed", 1.5),
        ("environment", {"cores": 2}),
        ("settings", {"batch": [1, 4]}),
        ("settings", None),
        ("metrics", {"total_s": math.nan}),
        ("metrics", {"total_s": math.inf}),
        ("metrics", {"total_s": "1.25"}),
        ("metrics", {"met": True}),
        ("notes", None),
    ],
)
def test_a_field_without_a_possible_value_is_refused(field: str, value: object):
    with pytest.raises(ConfigError, match=f"A record's {field}"):
        replace(RECORD, **{field: value})


def test_any_mapping_can_be_kept(tmp_path: Path):
    with Records(tmp_path / "records.sqlite") as records:
        records.add(replace(RECORD, metrics=MappingProxyType({"total_s": 1.5})))
        assert records.find()[0].metrics == {"total_s": 1.5}


def test_a_record_whose_line_cannot_be_written_is_not_kept_at_all(tmp_path: Path):
    with Records(tmp_path / "records.sqlite") as records:
        records.lines_path.mkdir()
        with pytest.raises(IsADirectoryError):
            records.add(RECORD)
        assert records.find() == ()


def test_a_file_of_something_else_or_of_another_version_is_refused(tmp_path: Path):
    other = tmp_path / "other.sqlite"
    other.write_text("not a database, but long enough to be read as a page of one" * 20)
    with pytest.raises(ConfigError, match="is not a file of records"):
        Records(other)
    later = tmp_path / "later.sqlite"
    with sqlite3.connect(later) as connection:
        connection.execute("PRAGMA user_version = 99")
    connection.close()
    with pytest.raises(ConfigError, match="version 99"):
        Records(later)


def test_a_description_replaces_the_one_before_and_keeps_its_place(tmp_path: Path):
    with Records(tmp_path / "records.sqlite") as records:
        for run, experiment in (("a-1", "a"), ("b-1", "b"), ("a-2", "a")):
            records.describe(run, experiment, "begun")
        records.describe("a-1", "a", "done")
        assert (records.description("a-1"), records.description("a-2")) == ("done", "begun")
        assert records.runs() == ("a-1", "b-1", "a-2")
        assert records.runs("a") == ("a-1", "a-2")
        with pytest.raises(ConfigError, match=r"no run 'c'; it has a-1, b-1, a-2\."):
            records.description("c")


def test_records_are_kept_with_the_users_state():
    assert records_path().parts[-3:] == ("tllm", "lab", "records.sqlite")
    assert replace(RECORD, at=utc_now()).at.endswith("+00:00")


def test_an_environment_tells_everything_or_says_that_it_is_unknown(monkeypatch: pytest.MonkeyPatch):
    known = environment()
    assert list(known) == ["machine", "processor", "cores", "memory", "os", "python", "torch", "tllm", "revision"]
    assert all(isinstance(value, str) and value for value in known.values())
    monkeypatch.setattr(environments.subprocess, "run", failing)
    assert environment()["revision"] == UNKNOWN


def failing(*_: object, **__: object) -> None:
    raise FileNotFoundError("git")


def test_a_file_that_no_checkout_knows_has_no_revision(tmp_path: Path):
    assert revision(tmp_path / "file.py") == UNKNOWN
