"""`tllm lab` measures what it is told to, keeps it, and makes the same report from what it kept."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest
from click.testing import Result
from typer.testing import CliRunner

from tests.lab.fake_experiment import FakeExperiment
from tllm.cli import app
from tllm.core.errors import ConfigError, EngineError
from tllm.lab import experiments
from tllm.lab.record import Records, records_path


class Found:
    """In place of the experiments: the fake one, and what it was asked for with."""

    def __init__(self) -> None:
        self.experiment = FakeExperiment()
        self.parameters: Mapping[str, object] = {}

    def find(self, kind: str, parameters: Mapping[str, object]) -> FakeExperiment:
        self.parameters = parameters
        return self.experiment


@pytest.fixture
def found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Found:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    fake = Found()
    monkeypatch.setattr(experiments, "find", fake.find)
    return fake


def lab(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["lab", *map(str, arguments)])


def test_a_run_is_measured_kept_and_reported(found: Found, tmp_path: Path):
    result = lab("run", "fake", "--out", tmp_path / "out")
    assert result.exit_code == 0, result.output
    assert (
        "2 cells of 3 can be measured here, each 1 + 5 times: 12 measurements, none longer than 300 s" in result.stderr
    )
    assert "10 measurements to come: about" in result.stderr
    assert "| batch=4 | 5 |" in result.stdout
    assert "* batch=8: **N/A**: there is no room." in result.stdout
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["report.md", "throughput.png"]
    with Records(records_path()) as records:
        assert len(records.find(experiment="fake")) == 10


def test_a_report_made_again_is_the_same(found: Found, tmp_path: Path):
    lab("run", "fake", "--no-pictures", "--out", tmp_path / "first")
    name = re.search(r"^Run: (.*)$", (tmp_path / "first" / "report.md").read_text(), re.MULTILINE)
    assert name
    for number, which in enumerate(([], ["fake"], [name[1]])):
        result = lab("report", *which, "--no-pictures", "--out", tmp_path / str(number))
        assert result.exit_code == 0, result.output
        again, first = (tmp_path / each / "report.md" for each in (str(number), "first"))
        assert again.read_text() == first.read_text()
        assert str(again) in result.stdout


def test_a_report_is_of_the_latest_run(found: Found):
    lab("run", "fake", "--no-pictures", "--repeats", 2)
    lab("run", "fake", "--no-pictures", "--repeats", 3)
    with Records(records_path()) as records:
        first, second = records.runs("fake")
    assert first != second
    assert f"reports/{second}/report.md" in lab("report", "--no-pictures").stdout
    assert f"reports/{first}/report.md" in lab("report", first, "--no-pictures").stdout


def test_flags_go_before_the_file_and_what_is_common_stays_with_the_runner(found: Found, tmp_path: Path):
    path = tmp_path / "spec.toml"
    path.write_text('[experiment]\nkind = "fake"\nrepeats = 6\nwarmups = 0\nmodel = "one"\nbatch = [1, 4]\n')
    flags = ("--repeats", 2, "--model", "two", "--dtype", "float32", "--set", "wait_ms=[0,10]", "--set", "limit_s=9")
    result = lab("run", path, "--no-pictures", *flags)
    assert result.exit_code == 0, result.output
    assert found.parameters == {"model": "two", "dtype": "float32", "batch": (1, 4), "wait_ms": (0, 10)}
    assert len(found.experiment.seen) == 4
    assert "none longer than 9 s" in result.stderr


def test_one_thing_is_not_taken_from_two_flags(found: Found):
    result = lab("run", "fake", "--model", "one", "--set", "model=two")
    assert isinstance(result.exception, ConfigError)
    assert "model: given by --set and by a flag" in str(result.exception)


def test_a_failing_cell_is_told_and_leaves_the_others(found: Found):
    found.experiment.failing = {"batch=4": 2}
    result = lab("run", "fake", "--no-pictures")
    assert result.exit_code == 0
    assert result.stderr.count("batch=4 failed: out of memory") == 1
    assert "* batch=4: **FAILED**: out of memory." in result.stdout


def test_a_run_of_which_nothing_could_be_measured_is_an_error_with_a_report(found: Found, tmp_path: Path):
    found.experiment.failing = {"batch=1": 1, "batch=4": 1}
    result = lab("run", "fake", "--no-pictures", "--out", tmp_path / "out")
    assert isinstance(result.exception, EngineError)
    assert "out of memory" in (tmp_path / "out" / "report.md").read_text()


def test_pictures_are_asked_for_before_anything_is_measured(found: Found, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    result = lab("run", "fake")
    assert isinstance(result.exception, ConfigError)
    assert "tllm[lab]" in str(result.exception)
    assert found.experiment.seen == []
    assert lab("run", "fake", "--no-pictures").exit_code == 0


def test_an_interrupted_run_tells_how_its_records_are_shown(found: Found, monkeypatch: pytest.MonkeyPatch):
    async def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("tllm.lab.runner.run", interrupted)
    result = lab("run", "fake", "--no-pictures")
    assert result.exit_code != 0
    assert re.search(r"`tllm lab report fake-\d{8}-\d{6}` shows it", result.stderr)


def test_what_is_not_kept_is_not_reported(found: Found):
    assert "has no run yet" in str(lab("report", "--no-pictures").exception)
    lab("run", "fake", "--no-pictures", "--repeats", 1)
    result = lab("report", "other", "--no-pictures")
    assert isinstance(result.exception, ConfigError)
    assert "no run and no experiment 'other'; it has fake-" in str(result.exception)


def test_the_list_has_every_experiment_and_every_run(found: Found):
    lab("run", "fake", "--no-pictures", "--repeats", 1)
    with Records(records_path()) as records:
        (name,) = records.runs()
    shown = lab("list").stdout
    assert f"  {name}\n" in shown
    for kind in ("baseline", "phases", "batching", "pp-tp", "local-vs-cluster"):
        assert re.search(rf"^{kind} ", shown, re.MULTILINE)


def test_the_verb_imports_nothing_heavy_before_it_is_used():
    program = "import sys, tllm.cli; print([m for m in ('torch', 'matplotlib', 'sqlite3', 'grpc') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
