"""Does `tllm bench serve` agree with an independent client? Both measure the same server, in turns, with equal loads.

    turn 1   tllm  guidellm      turn 2   guidellm  tllm      ...

The server is started once and stays up. Both run a closed loop of prompts and answers of fixed lengths, the answers
always of full length; prompts are new in every turn, so that no prefix is cached. The order changes from turn to turn,
and what is compared is the median over the turns of the ratio within one.

guidellm wants an environment of its own; it needs a tokenizer on disk and no network:

    python3 -m venv ENV
    ENV/bin/pip install -c constraints.txt torch
    ENV/bin/pip install guidellm
    python -m scripts.compare_clients --guidellm ENV/bin/guidellm

With --paced the server computes nothing and answers by the clock (200 ms to the first token, 20 ms for each other), so
that what differs is the clients alone, also on a busy machine.

Run the other comparison on a quiet machine. guidellm starts several processes, which take from a server on the same
processors: so the server gets the first half of them and the clients the rest (Linux; elsewhere all share), and
guidellm one worker.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tests.api.fake_deployment import FakeDeployment, Script
from tests.api.serving import Server as InProcess
from tllm.api.state import ApiState, Limits
from tllm.core.config import EMBEDDED_MODEL
from tllm.lab.environment import environment
from tllm.lab.server import Server, serving
from tllm.models.repository import resolve_model

ASKED = 0.05  # that the medians may differ
RUN_S = 900.0
PACED_TTFT_S, PACED_TPOT_S = 0.2, 0.02


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    num_requests: int
    concurrency: int
    prompt: int
    answer: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Figures:
    """What one client reports of one run, by its own reckoning."""

    requests_per_s: float
    answer_tokens_per_s: float
    ttft_median_s: float
    tpot_median_s: float
    e2e_median_s: float
    num_prompt_tokens: int
    num_answer_tokens: int


UNITS = {  # name: unit and factor
    "requests_per_s": ("requests/s", 1.0),
    "answer_tokens_per_s": ("tokens/s", 1.0),
    "ttft_median_s": ("ms", 1e3),
    "tpot_median_s": ("ms", 1e3),
    "e2e_median_s": ("ms", 1e3),
}


def ours(server: Server, load: Load, seed: int) -> Figures:
    command = [
        *(sys.executable, "-m", "tllm", "bench", "serve", "--url", server.url, "--json", "--ignore-eos"),
        *("--num-prompts", str(load.num_requests), "--concurrency", str(load.concurrency), "--warmup", "0"),
        *("--input-len", str(load.prompt), "--output-len", str(load.answer), "--seed", str(seed)),
    ]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, timeout=RUN_S, check=True)
    made = json.loads(done.stdout)["metrics"]
    assert made["num_completed"] == load.num_requests, f"only {made['num_completed']} requests were answered"
    return Figures(
        requests_per_s=made["requests_per_s"],
        answer_tokens_per_s=made["answer_tokens_per_s"],
        ttft_median_s=made["ttft_median_s"],
        tpot_median_s=made["tpot_median_s"],
        e2e_median_s=made["e2e_median_s"],
        num_prompt_tokens=int(made["num_prompt_tokens"]),
        num_answer_tokens=int(made["num_answer_tokens"]),
    )


def theirs(guidellm: Path, server: Server, tokenizer: Path, load: Load, seed: int) -> Figures:
    with tempfile.TemporaryDirectory(prefix="tllm-guidellm-") as directory:
        report = Path(directory) / "report.json"
        command = [
            *(str(guidellm), "run", "--disable-console"),
            *("--backend", f"kind=openai_http,target={server.url},model={server.model},request_format=/v1/completions"),
            *("--profile", f"kind=concurrent,streams={load.concurrency}"),
            *("--constraint", f"kind=max_requests,count={load.num_requests}"),
            *("--tokenizer", f"kind=huggingface_auto,model={tokenizer}"),
            *("--data", f"kind=synthetic_text,prompt_tokens={load.prompt},output_tokens={load.answer}"),
            *("--seed", f"kind=static,value={seed}"),
            *("--output", f"kind=json,path={report}"),
        ]
        own = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "GUIDELLM__MAX_WORKER_PROCESSES": "1"}
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=RUN_S, env={**os.environ, **own}, cwd=directory
        )
        assert done.returncode == 0, done.stdout + done.stderr
        made = json.loads(report.read_text())["benchmarks"][0]
    totals = made["metrics"]["request_totals"]
    assert totals["successful"] == load.num_requests, f"guidellm: {totals}"

    def figure(name: str, statistic: str) -> float:
        return float(made["metrics"][name]["successful"][statistic])

    return Figures(
        requests_per_s=figure("requests_per_second", "mean"),
        answer_tokens_per_s=figure("output_tokens_per_second", "mean"),
        ttft_median_s=figure("time_to_first_token_ms", "median") / 1e3,
        # Its "time per output token" counts the first one too; ours is what it calls the latency between tokens.
        tpot_median_s=statistics.median(r["inter_token_latency_ms"] for r in made["requests"]["successful"]) / 1e3,
        e2e_median_s=figure("request_latency", "median"),
        num_prompt_tokens=round(figure("prompt_token_count", "total_sum")),
        num_answer_tokens=round(figure("output_token_count", "total_sum")),
    )


@contextmanager
def apart(arguments: Sequence[str]) -> Iterator[Server]:
    """A server on the first half of the processors; the caller, and what it starts, on the others meanwhile."""
    every = sorted(os.sched_getaffinity(0)) if sys.platform == "linux" else []
    half = len(every) // 2
    if half == 0:
        with serving(arguments) as server:
            yield server
        return
    os.sched_setaffinity(0, every[:half])
    try:
        with serving(arguments) as server:
            os.sched_setaffinity(0, every[half:])
            yield server
    finally:
        os.sched_setaffinity(0, every)


@contextmanager
def paced(directory: Path) -> Iterator[Server]:
    """Our API in this process, with answers that take as long as they are told to; its tokenizer is in `directory`."""
    deployment = FakeDeployment.in_directory(directory)
    deployment.max_model_len = 1 << 20
    script = Script(tokens=deployment.ids("x" * 4096), first_token_s=PACED_TTFT_S, token_s=PACED_TPOT_S)
    deployment.script = lambda request: script
    state = ApiState(version="paced", deployments={"paced": deployment}, limits=Limits())
    with InProcess(state) as server:
        yield Server(url=server.url, model="paced")


def report(turns: Sequence[tuple[Figures, Figures]]) -> bool:
    """Prints the table; whether throughput and TTFT agree as asked."""
    print(f"\n{'median of the turns':<24}{'tllm':>12}{'guidellm':>12}{'ratio':>9}{'range of ratios':>20}")
    agree = True
    for name, (unit, factor) in UNITS.items():
        pairs = [(getattr(mine, name), getattr(other, name)) for mine, other in turns]
        ratios = [mine / other for mine, other in pairs]
        ratio = statistics.median(ratios)
        mine, other = (factor * statistics.median(column) for column in zip(*pairs, strict=True))
        told = ""
        if name in ("requests_per_s", "answer_tokens_per_s", "ttft_median_s"):
            is_met = abs(ratio - 1) <= ASKED
            agree = agree and is_met
            told = f"   within {ASKED:.0%}: {'met' if is_met else 'missed'}"
        label = f"{name.removesuffix('_s').removesuffix('_per').replace('_', ' ')} [{unit}]"
        print(
            f"{label:<24}{mine:>12.4g}{other:>12.4g}{ratio:>9.3f}{min(ratios):>12.3f} .. {max(ratios):.3f}{told}",
            flush=True,
        )
    mine, other = turns[0]
    print(
        f"tokens in a turn: {mine.num_prompt_tokens} + {mine.num_answer_tokens} and "
        f"{other.num_prompt_tokens} + {other.num_answer_tokens}"
    )
    return agree


def in_turns(
    server: Server, guidellm: Path, tokenizer: Path, load: Load, num_turns: int
) -> Sequence[tuple[Figures, Figures]]:
    ours(server, load, seed=0)  # warms the server up
    turns = []
    for turn in range(1, num_turns + 1):
        if turn % 2:
            mine = ours(server, load, turn)
            other = theirs(guidellm, server, tokenizer, load, turn)
        else:
            other = theirs(guidellm, server, tokenizer, load, turn)
            mine = ours(server, load, turn)
        turns.append((mine, other))
        print(f"turn {turn}: {mine.answer_tokens_per_s:.4g} and {other.answer_tokens_per_s:.4g} tokens/s", flush=True)
    return turns


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--guidellm", type=Path, required=True, help="the command, in an environment of its own")
    parser.add_argument("--model", default=EMBEDDED_MODEL, help="what is served; its directory has the tokenizer")
    parser.add_argument("--paced", action="store_true", help="a server that answers by the clock instead of a model")
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--requests", type=int, default=32)
    parser.add_argument("--concurrency", type=int, default=4)
    parser.add_argument("--prompt", type=int, default=128)
    parser.add_argument("--answer", type=int, default=64)
    parser.add_argument("--server", nargs="*", default=[], help="more arguments of tllm serve, such as --server=--pin")
    arguments = parser.parse_args()
    load = Load(
        num_requests=arguments.requests,
        concurrency=arguments.concurrency,
        prompt=arguments.prompt,
        answer=arguments.answer,
    )
    print(", ".join(f"{name} {value}" for name, value in environment().items()))
    print(f"{'paced' if arguments.paced else arguments.model}, {load}", flush=True)
    if arguments.paced:
        with tempfile.TemporaryDirectory(prefix="tllm-paced-") as directory, paced(Path(directory)) as server:
            turns = in_turns(server, arguments.guidellm, Path(directory), load, arguments.turns)
    else:
        with apart([arguments.model, *arguments.server]) as server:
            tokenizer = resolve_model(arguments.model)
            turns = in_turns(server, arguments.guidellm, tokenizer, load, arguments.turns)
    sys.exit(0 if report(turns) else 1)


if __name__ == "__main__":
    main()
