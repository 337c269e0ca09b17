"""`tllm estimate`: which model is meant, in which form, on which machines; and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from tests.cli.test_start import without
from tllm.cli import app
from tllm.core.errors import ConfigError
from tllm.core.types import DType
from tllm.models.checkpoint import Checkpoint
from tllm.models.spec import Shard
from tllm.testing.checkpoints import tiny_checkpoint
from tllm.testing.quantized import quantized_checkpoint

SHAPE = "--layers 32 --hidden 4096 --heads 32 --kv-heads 8 --head-dim 128 --intermediate 14336 --vocab 128256"


def run(command: str) -> str:
    result = CliRunner().invoke(app, ["estimate", *command.split()], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.stdout


def figures(command: str) -> dict[str, Any]:
    """Of the first section: what is told of the model itself."""
    [section, *_] = json.loads(run(f"{command} --json"))
    return {line["label"]: line["value"] for line in section["lines"]}


def test_help_of_the_verb_and_its_commands_imports_nothing_heavy() -> None:
    for verb in ((), ("model",), ("network",)):
        shown = without(["torch", "grpc", "numpy", "rich", "matplotlib"], "estimate", *verb, "--help")
        assert shown.returncode == 0, shown.stderr
        assert "Usage: tllm estimate" in shown.stdout


def test_a_model_may_be_named_by_a_preset_by_flags_or_with_the_command() -> None:
    named = figures("llama-3.1-8b --hardware m4")
    assert named["in total"] == 8_030_261_248
    assert figures("model llama-3.1-8b --hardware m4") == named
    assert figures(f"{SHAPE} --hardware m4") == named
    assert figures(f"--hardware m4 {SHAPE}") == named


def test_a_directory_is_read_whole_or_by_its_config_alone(tmp_path: Path) -> None:
    model = tiny_checkpoint(tmp_path, hidden_size=128, shards=1, dtype=DType.FLOAT32)
    stored = figures(f"{model} --hardware m4")
    assert stored["weights"] == 4 * stored["in total"]
    for weights in model.glob("*.safetensors*"):
        weights.unlink()
    alone = figures(f"{model} --hardware m4 --dtype float32")
    assert alone == stored


def test_a_model_called_like_a_command_is_given_by_its_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny_checkpoint(tmp_path / "made", shards=1).rename(tmp_path / "network")
    monkeypatch.chdir(tmp_path)
    assert figures("./network --hardware m4")["in total"] > 0


def test_a_quantized_model_is_taken_as_it_is_stored(tmp_path: Path) -> None:
    model = tmp_path / "small"
    quantized_checkpoint(model, "mlx-4", group=32, hidden_size=64, intermediate_size=128, tied=False)
    opened = Checkpoint.open(model)
    whole = Shard(first_layer=0, last_layer=opened.spec.num_layers, embed=True, head=True)
    told = figures(f"{model} --hardware m4")
    assert told["weights"] == pytest.approx(opened.weight_bytes(whole, opened.dtype), abs=opened.spec.num_layers + 2)
    with pytest.raises(ConfigError, match=r"is quantized already .* leave out --dtype, --quantize, --format"):
        run(f"{model} --hardware m4 --quantize int4")


def test_the_form_of_weights_and_of_kv_is_chosen_apart() -> None:
    bf16, fp8 = figures("llama-3.1-8b --hardware m4"), figures("llama-3.1-8b --hardware m4 --kv-dtype fp8")
    assert fp8["KV per token"] == bf16["KV per token"] / 2
    assert fp8["weights"] == bf16["weights"]
    q4, fp32 = (
        figures("llama-3.1-8b --hardware m4 --format q4_0"),
        figures("llama-3.1-8b --hardware m4 --dtype float32"),
    )
    assert q4["KV per token"] == bf16["KV per token"] == fp32["KV per token"] / 2
    assert q4["weights"] < bf16["weights"] / 3 < fp32["weights"] / 5


def test_this_machine_is_measured_and_said_to_be_rough(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tllm.cli.plan.copied_bytes_per_s", lambda num_threads: 20e9)
    monkeypatch.setattr("tllm.cli.plan.multiplied_flop_per_s", lambda: 100e9)
    told = run("embedded")
    assert "embedded, bf16, on this machine" in told
    assert "copies memory at 20 GB/s and multiplies float32 matrices at 100 GFLOP/s" in told
    assert "batch that is bound by arithmetic 5 tokens" in " ".join(told.split())


def test_a_network_is_told_from_a_width_or_a_model() -> None:
    by_width, by_model = run("network --pp 8 --hidden 8192"), run("network --pp 8 --model llama-3-70b")
    assert by_width == by_model
    assert "impossible" in by_width
    assert "On links of 1 Gb/s with 200 µs each way" in run("network --pp 8 --hidden 8192 --link 1Gb/s,0.2ms")


def test_a_report_has_every_formula_and_the_pictures_it_shows(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    told = run(f"embedded --hardware h100 --pp 2 --prompt 64 --report {tmp_path / 'model'}")
    assert told.endswith(f"The report is {tmp_path / 'model' / 'report.md'}.\n")
    run(f"network --pp 8 --hidden 8192 --report {tmp_path / 'net'} --json")
    for name, pictures in (("model", ["batch.png", "chunks.png", "roofline.png"]), ("net", ["chunks.png"])):
        report = (tmp_path / name / "report.md").read_text()
        assert report.startswith("# ")
        assert sorted(path.name for path in (tmp_path / name).glob("*.png")) == pictures
        for picture in pictures:
            assert f"]({picture})" in report
            assert (tmp_path / name / picture).read_bytes().startswith(b"\x89PNG")
    assert "`2 (k, v) x 8 layers x 4 KV heads x 32 x 2 B`" in (tmp_path / "model" / "report.md").read_text()


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("nosuch --hardware m4", "There is no model 'nosuch'.*known shape .llama-3.2-1b"),
        ("--hardware m4", "Which model"),
        ("--layers 3 --hidden 8", "needs --heads, --head-dim, --intermediate, --vocab as well; nothing is guessed"),
        ("llama-3.1-8b --layers 3 --tied", "--layers, --tied and the model llama-3.1-8b contradict"),
        (f"{SHAPE} --experts 8", "Experts need both"),
        ("llama-3.1-8b --hardware m9", "'m9' is no known hardware; there are a100-40gb"),
        ("llama-3.1-8b --hardware m4 --nodes 3 --tp 2", "3 nodes cannot be --tp 2"),
        ("llama-3.1-8b --hardware m4 --nodes 4 --pp 3", "4 nodes cannot be --pp 3 x --tp 1"),
        ("llama-3.1-8b --hardware m4 --pp 0", "--pp is 0"),
        ("llama-3.1-8b --hardware m4 --pp 2", "2 machines need a link"),
        ("llama-3.1-8b --hardware m4 --pp 2 --link 100", "'100' is not a rate"),
        ("llama-3.1-8b --hardware m4 --pp 2 --link 1Gb/s,3", "'3' is not a time"),
        ("llama-3.1-8b --hardware m4 --quantize int8 --format q4_0", "both say how weights are held"),
        ("llama-3.1-8b --hardware m4 --format q9", "'q9' is no format of weights; there are fp32"),
        ("llama-3.1-8b --hardware m4 --kv-dtype int3", "--kv-dtype is 'int3'; possible are fp32"),
        ("llama-3.1-8b --hardware m4 --batch 1,x", "--batch is '1,x'"),
        ("llama-3.1-8b --hardware m4 --draft 3", "--draft is '3'"),
        ("llama-3.1-8b --hardware m4 --draft 3,1", "--draft is '3,1'"),
        ("network --pp 8", "Give either --hidden"),
        ("network --pp 8 --hidden 8 --model llama-3-70b", "Give either --hidden"),
        ("network --pp 8 --hidden 0", "--hidden is 0"),
        ("network --pp 8 --hidden 8 --compute-share 1:4", "--compute-share is '1:4'"),
        ("network --pp 8 --hidden 8 --compute-share 5/4", "--compute-share is 1.25"),
        ("network --pp 1 --hidden 8", "--pp is 1"),
    ],
)
def test_what_cannot_be_is_refused_with_what_to_do(command: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        run(command)
