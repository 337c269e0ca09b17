"""What the planner predicts beside what is then measured, and whether the plan that it chooses is ever slower than one
node alone. Prints tables for docs/lab/LOG.md.

    loopback       pipelines of 1, 2 and 3 one-core nodes of this machine
    links          pipelines of 2 such nodes over emulated links of several rates and delays
    never-slower   a node with processors of its own, one that shares its processor with something that never stops, and
                   one behind a slow link: the chosen plan, and each of them alone

    this process ──HTTP──▶ head ──▶ [link] ──▶ node ──▶ [link] ──▶ node
                             ▲                                      │
                             └──────────── [link] ◀─────────────────┘

Every node is a `tllm join` that takes itself for another machine (`unshare --uts`), so that all that passes between
nodes and head does so over TCP and TLS. Predictions are those that the cluster itself shows, from speeds and links that
it measured when its nodes joined. Figures that are compared were measured in turns, on clusters that are up at the same
time.

Run from the repository's root, on a quiet machine, as root: `python -m scripts.bench_plan`.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import math
import os
import random
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import httpx

from tests.system.processes import Server, Tllm, tllm
from tllm.cluster.machine import processors
from tllm.cluster.speeds import processor_name
from tllm.core.config import EMBEDDED_MODEL
from tllm.testing.links import emulated_link
from tllm.transport import rpc

PROMPT_TOKENS = 512  # what the planner takes for a typical prompt
READY_S = 300.0
SILENCE_S = 300.0
NUM_PORTS = 3  # of a node behind links: its agent's, its worker's and one more
PARTS = ("loopback", "links", "never-slower")


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """A link, the same in both directions."""

    mbit_per_s: float
    delay_s: float  # one way


@dataclass(frozen=True, slots=True, kw_only=True)
class Node:
    """A machine to be played. What others send it passes links of that shape, and so does what it sends the head."""

    name: str
    cpus: tuple[int, ...]
    link: Shape | None = None
    memory: str | None = None  # that it offers


@dataclass(frozen=True, slots=True, kw_only=True)
class Effort:
    """How much is measured."""

    num_answers: int
    num_tokens: int  # of an answer


class Cluster:
    """A head and its nodes, serving: what they predict, and the answers that were measured."""

    def __init__(self, client: httpx.Client, model: str) -> None:
        self._client = client
        self._model = model
        self._prompts = random.Random(0)
        self.rates: list[float] = []  # tokens per second after the first
        self.ttfts_s: list[float] = []
        status = self._status()
        self._epoch: int = status["epoch"]
        self.predicted_rate: float = status["predicted_tokens_per_s"] or math.nan
        self.predicted_ttft_s: float = status["predicted_ttft_s"] or math.nan
        self.bound: str = status["bound_by"]
        stages = sorted(
            (stage["first_layer"], stage["last_layer"], node["name"])
            for node in status["nodes"]
            for stage in node["stages"]
        )
        self.stages = ", ".join(f"{name} {last - first}" for first, last, name in stages)

    def warm_up(self, effort: Effort) -> None:
        """An answer that does not count."""
        self._answer(effort)

    def measure(self, effort: Effort) -> None:
        """One answer. Raises AssertionError when it came from another plan than the one that predicted it."""
        rate, ttft_s = self._answer(effort)
        assert self._status()["epoch"] == self._epoch, "the cluster made another plan meanwhile"
        self.rates.append(rate)
        self.ttfts_s.append(ttft_s)

    def _answer(self, effort: Effort) -> tuple[float, float]:
        """Tokens per second after the first, and seconds to the first, of a prompt that no cache knows."""
        body = {
            "model": self._model,
            "prompt": [self._prompts.randrange(3, 256) for _ in range(PROMPT_TOKENS)],
            "max_tokens": effort.num_tokens,
            "ignore_eos": True,
            "temperature": 0,
            "stream": True,
            "return_token_ids": True,  # a frame for every token, also for those that have no text
        }
        asked_s = time.perf_counter()
        with self._client.stream("POST", "/v1/completions", json=body) as response:
            response.raise_for_status()
            lines = [(time.perf_counter(), line) for line in response.iter_lines() if line.startswith("data: {")]
        frames = [(at_s, json.loads(line.removeprefix("data: "))) for at_s, line in lines]
        assert not (errors := [frame["error"] for _, frame in frames if "error" in frame]), errors
        times_s = [at_s for at_s, frame in frames for choice in frame["choices"] for _ in choice.get("token_ids") or ()]
        assert len(times_s) == effort.num_tokens, f"{len(times_s)} tokens came instead of {effort.num_tokens}"
        return (effort.num_tokens - 1) / (times_s[-1] - times_s[0]), times_s[0] - asked_s

    def _status(self) -> dict[str, Any]:
        found: dict[str, Any] = self._client.get("/tllm/v1/cluster").raise_for_status().json()
        return found


class Rig:
    """Starts clusters, which are gone when its context is left. Nodes of one name are one machine: it measures its
    speed once, and keeps its weights, for all clusters of the rig and for none of another."""

    def __init__(self, state: Path) -> None:
        self._state = state
        self._num_clusters = itertools.count()
        self._hosts = (f"127.0.{high}.{low}" for high in range(1, 256) for low in range(1, 255))

    def measure_speeds(self, model: str, nodes: Sequence[Node]) -> None:
        """Let nodes, at least two, find out how fast they are, which they remember. Heads measure machines side by
        side, and these share processors and memory: as one machine's, they are measured one after the other."""
        with self.cluster(model, [replace(node, link=None) for node in nodes], use_all=False, machine="all"):
            pass

    @contextmanager
    def cluster(
        self, model: str, nodes: Sequence[Node], *, use_all: bool = True, machine: str | None = None
    ) -> Iterator[Cluster]:
        """Nodes that joined a head of their own, which computes nothing itself. `machine`: that all of them are on;
        each on its own by default."""
        state = self._state / f"head-{next(self._num_clusters)}"
        flags = ("--port", "0", "--grpc-port", "0", "--no-local", "--nodes", str(len(nodes)))
        with ExitStack() as stack:
            server = stack.enter_context(
                tllm("serve", model, *flags, *["--use-all"] * use_all, kind=Server, XDG_STATE_HOME=str(state))
            )
            port = int(server.wait_for(r"tllm join \S+:(\d+)")[1])
            token = rpc.TokenStore(rpc.Authority.open(state / "tllm" / "cluster")).default()
            for node in nodes:
                self._join(stack, node, machine or node.name, port, token)
            server.wait_for(r"API\s+http", deadline_s=READY_S)
            client = stack.enter_context(httpx.Client(base_url=server.url, timeout=SILENCE_S))
            yield Cluster(client, server.model)

    def _join(self, stack: ExitStack, node: Node, machine: str, port: int, token: str) -> None:
        address, flags = f"127.0.0.1:{port}", []
        if node.link is not None:
            address = _link(stack, node.link, target_port=port)
            host, ports = next(self._hosts), free_ports(NUM_PORTS)
            for each in ports:
                _link(stack, node.link, target_port=each, host=host, port=each)
            flags = ["--listen", "127.0.0.1", "--advertise", host, "--ports", f"{ports[0]}-{ports[-1]}"]
        if node.memory is not None:
            flags += ["--memory", node.memory]
        elsewhere = ["unshare", "--uts", "sh", "-c", f'hostname {machine} && exec "$@"', "sh"]
        joined: Tllm = stack.enter_context(
            tllm(
                *("join", address, "--name", node.name, "--threads", str(len(node.cpus)), "--pin", *flags),
                before=["taskset", "-c", ",".join(map(str, node.cpus)), *elsewhere],
                XDG_STATE_HOME=str(self._state / node.name),
                TLLM_TOKEN=token,
            )
        )
        joined.wait_for("Joined")


def _link(stack: ExitStack, shape: Shape, *, target_port: int, host: str = "127.0.0.1", port: int = 0) -> str:
    link = stack.enter_context(emulated_link(target=("127.0.0.1", target_port), listen_host=host, listen_port=port))
    link.shape(delay_s=shape.delay_s, rate_bits_per_s=shape.mbit_per_s * 1e6)
    return link.address


@contextmanager
def rig() -> Iterator[Rig]:
    with tempfile.TemporaryDirectory(prefix="bench-plan-") as state:
        yield Rig(Path(state))


def free_ports(number: int) -> range:
    """Consecutive ones that nobody listens on."""
    for first in range(26000, 32000, number):
        with ExitStack() as stack:
            try:
                for port in range(first, first + number):
                    stack.enter_context(contextlib.closing(socket.create_server(("", port))))
            except OSError:
                continue
            return range(first, first + number)
    raise OSError(f"no {number} consecutive ports are free")


def in_turns(clusters: Sequence[Cluster], effort: Effort) -> None:
    for cluster in clusters:
        cluster.warm_up(effort)
    for _ in range(effort.num_answers):
        for cluster in clusters:
            cluster.measure(effort)


# Tables ---------------------------------------------------------------------------------------------------------------

COLUMNS = (
    *("layers", "tokens/s predicted", "measured (range)", "error"),
    *("TTFT predicted", "measured (range)", "error", "bound by"),
)


def head_of_table(first: str) -> None:
    print(f"\n| {' | '.join((first, *COLUMNS))} |\n|{'---|' * (1 + len(COLUMNS))}", flush=True)


def row(first: str, cluster: Cluster) -> tuple[float, float]:
    """Prints it; the errors of tokens per second and of TTFT, nan where nothing was predicted."""
    rate_columns, rate_error = _figures(cluster.predicted_rate, cluster.rates, "")
    ttft_columns, ttft_error = _figures(cluster.predicted_ttft_s * 1e3, [1e3 * s for s in cluster.ttfts_s], " ms")
    print(f"| {' | '.join((first, cluster.stages, *rate_columns, *ttft_columns, cluster.bound))} |", flush=True)
    return rate_error, ttft_error


def _figures(predicted: float, measured: Sequence[float], unit: str) -> tuple[tuple[str, str, str], float]:
    """Columns: predicted, median and range of what was measured, error; and the error as a number."""
    median = statistics.median(measured)
    error = predicted / median - 1
    middle = f"{median:.4g} ({min(measured):.4g} .. {max(measured):.4g}){unit}"
    return (("", middle, "") if math.isnan(error) else (f"{predicted:.4g}{unit}", middle, f"{error:+.1%}")), error


def summary(errors: Sequence[tuple[float, float]]) -> None:
    for what, found in zip(("tokens/s", "TTFT"), zip(*errors, strict=True), strict=True):
        worst = max(found, key=abs)
        print(f"{what}: median error {statistics.median(map(abs, found)):.1%}, worst {worst:+.1%}", flush=True)


# Parts ----------------------------------------------------------------------------------------------------------------


def one_core_nodes(number: int, link: Shape | None = None) -> list[Node]:
    """Neighbours in a pipeline have different processors, as far as there are two."""
    cpus = processors()
    return [Node(name=f"n{index}", cpus=(cpus[index % len(cpus)],), link=link) for index in range(number)]


def loopback(model: str, effort: Effort, most: int) -> None:
    """A node that nobody could choose stands beside the pipeline of one: where there is nothing to choose, nothing is
    measured and predicted."""
    nodes = one_core_nodes(most)
    nobody = Node(name="nobody", cpus=nodes[-1].cpus, memory="1KiB")
    head_of_table(f"loopback, {model}")
    with rig() as made, ExitStack() as stack:
        made.measure_speeds(model, [*nodes, nobody])
        clusters = [
            stack.enter_context(made.cluster(model, nodes[:number] if number > 1 else [nodes[0], nobody]))
            for number in range(1, most + 1)
        ]
        in_turns(clusters, effort)
        summary([row(f"{number}", cluster) for number, cluster in enumerate(clusters, 1)])


def links(model: str, effort: Effort, shapes: Sequence[Shape]) -> None:
    head_of_table(f"links, {model}: Mb/s, ms one way")
    errors = []
    with rig() as made:
        made.measure_speeds(model, one_core_nodes(2))
        for shape in shapes:
            with made.cluster(model, one_core_nodes(2, shape)) as cluster:
                in_turns([cluster], effort)
                errors.append(row(f"{shape.mbit_per_s:g}, {shape.delay_s * 1e3:g}", cluster))
    summary(errors)


def never_slower(model: str, effort: Effort) -> None:
    cpus = processors()
    own = tuple(cpus[1:]) or tuple(cpus)
    nodes = [
        Node(name="free", cpus=own),
        Node(name="busy", cpus=(cpus[0],)),
        Node(name="far", cpus=own, link=Shape(mbit_per_s=10, delay_s=0.025)),
    ]
    with rig() as made, ExitStack() as stack:
        stack.enter_context(endless_loop(cpus[0]))
        made.measure_speeds(model, nodes)
        chosen = stack.enter_context(made.cluster(model, nodes, use_all=False))
        alone = {node.name: stack.enter_context(made.cluster(model, [node])) for node in nodes}
        in_turns([chosen, *alone.values()], effort)
    head_of_table(f"never slower, {model}")
    row("chosen of all three", chosen)
    for name, cluster in alone.items():
        row(f"{name} alone", cluster)
    best = max(alone.values(), key=lambda cluster: statistics.median(cluster.rates))
    ratio = statistics.median(mine / theirs for mine, theirs in zip(chosen.rates, best.rates, strict=True))
    verdict = "never slower" if ratio >= 0.95 else "SLOWER"
    print(
        f"{verdict}: the chosen plan is {ratio:.3f} times as fast as the best node alone (median of turns)", flush=True
    )


@contextmanager
def endless_loop(cpu: int) -> Iterator[None]:
    """Something else that wants this processor all the time."""
    with subprocess.Popen(["taskset", "-c", str(cpu), sys.executable, "-c", "while True: pass"]) as process:
        try:
            yield
        finally:
            process.kill()


def print_environment() -> None:
    """The memory is read by a process of its own: its gigabyte would stay in this one."""
    num_cores = len(processors())
    code = "import sys; from tllm.lab.system import read_bandwidth; print(read_bandwidth(int(sys.argv[1])))"
    rates = []
    for threads in sorted({1, num_cores}):
        command = [sys.executable, "-c", code, str(threads)]
        found = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        rates.append(f"{threads} read {float(found.stdout) / 1e9:.1f} GB/s")
    print(f"{processor_name()}, {num_cores} cores: {', '.join(rates)}; load {os.getloadavg()[0]:.1f}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", choices=PARTS, action="append", help="may be given several times; all by default")
    parser.add_argument(
        "--model", action="append", help="for the parts loopback and never-slower; several for loopback"
    )
    parser.add_argument("--links-model", default=EMBEDDED_MODEL, help="small, so that links are what counts")
    parser.add_argument("--mbit", type=float, action="append", help="rates of links; 10, 100 and 1000 by default")
    parser.add_argument("--delay-ms", type=float, action="append", help="one way; 0.2, 6.4 and 25 by default")
    parser.add_argument("--answers", type=int, default=7, help="measured for every figure")
    parser.add_argument("--tokens", type=int, default=65, help="of an answer")
    parser.add_argument("--quick", action="store_true", help="the embedded model, two links, three answers")
    arguments = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("ended by a signal"))  # leaving every context on its way
    effort = Effort(num_answers=3 if arguments.quick else arguments.answers, num_tokens=arguments.tokens)
    models = arguments.model or ([EMBEDDED_MODEL] if arguments.quick else [".bench/llama-3.2-1b", ".bench/qwen3-0.6b"])
    rates = arguments.mbit or ([100] if arguments.quick else [10, 100, 1000])
    delays_ms = arguments.delay_ms or ([0.2, 6.4] if arguments.quick else [0.2, 6.4, 25])
    print_environment()
    for part in arguments.part or PARTS:
        match part:
            case "loopback":
                for model in models:
                    loopback(model, effort, most=2 if arguments.quick else 3)
            case "links":
                shapes = [Shape(mbit_per_s=rate, delay_s=delay / 1e3) for rate in rates for delay in delays_ms]
                links(arguments.links_model, effort, shapes)
            case "never-slower":
                never_slower(models[-1], effort)


if __name__ == "__main__":
    main()
