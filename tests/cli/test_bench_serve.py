"""`tllm bench serve` against our own API on a socket, behind which answers are scripted."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from tests.api.fake_deployment import FakeDeployment, Script
from tests.api.serving import Server
from tests.cli.http_server import answering
from tllm.api.state import ApiState, Limits
from tllm.cli.bench import app
from tllm.core.errors import ConfigError, QueueFullError, TransportError, UnavailableError
from tllm.lab.record import Records, records_path


@pytest.fixture(scope="module")
def _shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Server, FakeDeployment]]:
    deployment = FakeDeployment.in_directory(tmp_path_factory.mktemp("tokenizer"))
    with Server(ApiState(version="1.2.3", deployments={"fake": deployment}, limits=Limits())) as server:
        yield server, deployment


@pytest.fixture
def server(_shared: tuple[Server, FakeDeployment]) -> Server:
    _shared[1].reset()
    return _shared[0]


@pytest.fixture
def deployment(server: Server, _shared: tuple[Server, FakeDeployment]) -> FakeDeployment:
    return _shared[1]


def bench(url: str, *arguments: str, exit_code: int = 0) -> str:
    """What it prints. Raises what it raises."""
    result = CliRunner().invoke(app, ["serve", "--url", url, *arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == exit_code, result.output
    return result.stdout


def measured(server: Server, *arguments: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(bench(server.url, "--json", *arguments))
    return found


def test_tokens_are_counted_to_the_last_one(server: Server, deployment: FakeDeployment):
    made = measured(
        server, "--num-prompts", "6", "--concurrency", "3", "--input-len", "40:60", "--output-len", "5", "--ignore-eos"
    )
    counted = deployment.submitted[2:]  # after the warm-up
    metrics = made["metrics"]
    assert metrics["num_completed"] == 6
    assert metrics["num_answer_tokens"] == 30
    assert metrics["num_prompt_tokens"] == sum(len(request.prompt) for request in counted)
    assert all(40 <= len(request.prompt) <= 60 and request.params.max_tokens == 5 for request in counted)
    assert metrics["peak_concurrency"] <= 3
    assert 0 < metrics["ttft_median_s"] <= metrics["ttft_p99_s"] <= metrics["duration_s"]
    assert metrics["total_tokens_per_s"] == pytest.approx(
        (metrics["num_answer_tokens"] + metrics["num_prompt_tokens"]) / metrics["duration_s"]
    )


def test_the_same_seed_asks_the_server_the_same(server: Server, deployment: FakeDeployment):
    for seed in ("5", "5", "6"):
        bench(
            server.url,
            "--num-prompts",
            "3",
            "--warmup",
            "0",
            "--dataset",
            "sharegpt",
            "--input-len",
            "90",
            "--seed",
            seed,
        )
    asked = [(request.prompt, request.params.max_tokens) for request in deployment.submitted]
    assert asked[:3] == asked[3:6]
    assert asked[:3] != asked[6:]
    salts = [request.salt for request in deployment.submitted]
    assert salts[0] == salts[2] != salts[3]  # no run finds the prompts of another in a cache


def test_the_table_has_every_figure_and_says_what_to_know(server: Server):
    printed = bench(
        server.url, "--num-prompts", "5", "--request-rate", "200", "--output-len", "40", "--percentiles", "90,99.9",
        "--goodput", "ttft:5s e2e:9s",
    )  # fmt: skip
    rows = {line.strip().partition("  ")[0]: line.split() for line in printed.splitlines()}
    assert "200 requests/s; prompts of 128 tokens, answers of 40; seed 0" in printed
    assert rows["mean"] == ["mean", "median", "p90", "p99.9"]
    for name in ("TTFT", "TPOT", "ITL", "E2E", "client late", "client queue"):
        assert len(rows[name]) == len(name.split()) + 8
    assert rows["requests"][1:5] == ["5", "answered,", "0", "failed,"]
    assert rows["tokens"][1:] == ["640", "of", "prompts,", "70", "of", "answers"]  # 14 each: the text and its end
    assert "100.0% within ttft:5 s e2e:9 s" in printed
    assert "5 answers ended before the length that was asked for; --ignore-eos" in printed


def test_a_chat_is_asked_in_words_of_the_right_length(server: Server, deployment: FakeDeployment):
    made = measured(server, "--endpoint", "chat", "--num-prompts", "4", "--input-len", "200")
    lengths = [len(request.prompt) for request in deployment.submitted[-4:]]
    assert made["metrics"]["num_prompt_tokens"] == sum(lengths)
    assert all(140 < length < 256 for length in lengths)  # words of 2 to 9 bytes: 40 of them are never far from 200


def test_refusals_are_counted_and_explained(server: Server, deployment: FakeDeployment):
    deployment.say("x" * 30, token_s=0.002)
    deployment.refusal, deployment.num_admitted = QueueFullError(7, 3.0), 1
    arguments = ("--num-prompts", "4", "--request-rate", "inf", "--warmup", "1")
    printed = bench(server.url, *arguments)
    assert "1 answered, 3 failed" in printed
    assert "3 x too_many: HTTP 429: 7 requests are waiting" in printed
    assert "lower --request-rate" in printed
    deployment.num_admitted = 0
    assert "0 answered, 4 failed" in bench(server.url, *arguments[:-1], "0", exit_code=1)


def test_a_generation_that_fails_is_counted(server: Server, deployment: FakeDeployment):
    error = UnavailableError("out of nodes", state="degraded")
    good, bad = Script(tokens=deployment.ids("Good")), Script(tokens=deployment.ids("Ba"), error=error)
    deployment.script = lambda request: bad if len(deployment.submitted) == 2 else good
    made = measured(server, "--num-prompts", "3", "--warmup", "0")
    assert made["metrics"]["num_completed"] == 2
    assert [(each["kind"], each["num"]) for each in made["failures"]] == [("failed", 1)]
    assert "out of nodes" in made["failures"][0]["example"]


def test_a_run_is_kept_in_a_file_a_picture_and_the_records(server: Server, tmp_path: Path):
    file, picture = tmp_path / "run.json", tmp_path / "run.png"
    bench(server.url, "--num-prompts", "3", "--seed", "11", "--save", str(file), "--picture", str(picture))
    saved = json.loads(file.read_text())
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert [request["index"] for request in saved["requests"]] == [0, 1, 2]
    assert all(len(request["frames_after_s"]) == request["num_answer_tokens"] for request in saved["requests"])
    assert all(request["failure"] is None for request in saved["requests"])
    with Records(records_path()) as records:
        kept = records.find(experiment="serve", run=saved["run"])
    assert [record.metrics for record in kept] == [saved["metrics"]]
    assert kept[0].seed == 11
    assert kept[0].settings["model"] == "fake"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--burstiness", "2"], "--request-rate"),
        (["--request-rate", "0"], "above 0"),
        (["--request-rate", "inf", "--duration", "1s"], "--num-prompts"),
        (["--concurrency", "0"], "at least 1"),
        (["--num-prompts", "0"], "at least 1"),
        (["--duration", "3"], "not a time"),
        (["--warmup", "-1"], "at least 0"),
        (["--input-len", "x"], "not a length"),
        (["--input-len", "5:9", "--range-ratio", "0.5"], "a range already"),
        (["--range-ratio", "1"], "less than 1"),
        (["--dataset", "uniform"], "needs a range"),
        (["--dataset", "sharegpt", "--range-ratio", "0.5"], "no effect"),
        (["--goodput", "speed:9ms"], "not a limit"),
        (["--percentiles", "0,50"], "between 0 and 100"),
        (["--picture", "x.jpg"], r"\.png"),
        (["--header", "oops"], "Name: value"),
        (["--url", "nonsense"], "not a URL"),
    ],
)
def test_what_cannot_be_measured_is_refused(arguments, said):
    with pytest.raises(ConfigError, match=said):
        bench("http://127.0.0.1:9", *arguments)


def test_a_server_that_is_not_there_or_has_another_model_is_said(server: Server):
    with pytest.raises(TransportError, match="Check the URL"):
        bench("http://127.0.0.1:9")
    with pytest.raises(UnavailableError, match=r"does not exist.*Check --model"):
        bench(server.url, "--model", "other")
    with (
        answering('{"error": {"message": "Missing or wrong API key."}}', status=401, kind="application/json") as url,
        pytest.raises(UnavailableError, match=r"wrong API key.*--api-key"),
    ):
        bench(url)
