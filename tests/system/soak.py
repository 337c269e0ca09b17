"""A soak: a cluster under load whose parts are killed, stopped, cut off and brought back at random, and a judge.

    clients ──▶ head ◀── links ──▶ machines          faults: drawn from a seed, one at a time on each machine

What is judged:
    Every request ends in the text that it had before any fault, or is cancelled by its client, or ends in an error
    while no node was ready to compute. None takes longer than REQUEST_S.
    When all is healed, service is back within BACK_S: every node is there once, ready, and has a part.
    The head holds no more than before: blocks, descriptors, processes, memory. At the end no process is left.

Pauses are what clients saw: the time between two pieces of a stream, or before its first. A pause belongs to the
first fault that struck in it, or else to the last one before it.
This file does not know how a report is printed.
"""

from __future__ import annotations

import json
import math
import random
import statistics
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field, replace
from enum import StrEnum
from pathlib import Path

import httpx
import psutil

from tests.system.machines import Machine, machine
from tests.system.processes import START_S, Server, alive, poll, serve
from tests.system.random_models import DEMO, remember_speed
from tests.system.recovery import Footprint
from tllm.core.config import split_address
from tllm.testing.links import Direction, EmulatedLink
from tllm.transport import rpc

REQUEST_S = 60.0  # for one answer, whatever happens meanwhile
BACK_S = 15.0  # for service to be back once nothing is broken any more
_RSS_BYTES = 20 << 20  # that the head may grow
_NUM_DESCRIPTORS = 4  # of connections that their other side has yet to close
_WATCH_S = 0.2
_PAUSE_S = 0.3  # shorter ones are no pauses
_NUM_PIECES_CANCELLED = 12  # at most, before a client changes its mind
_CANCELLED = 0.08  # of requests

_NUM_TOKENS = (40, 80, 120, 24)
_PROMPTS = ("tell me", "What is a layer?", "Why is it slow?", "How do I join?", "What is a block?", "Who are you?")


class Kind(StrEnum):
    """What goes wrong. Every name is what it says in the report."""

    KILL_WORKER = "kill a worker"
    KILL_NODE = "kill a node"
    PAUSE_WORKER = "stop a worker for 0.5..2 s"
    STOP_WORKER = "stop a worker for ever"
    PAUSE_AGENT = "stop an agent for 1..6 s"
    BLACK_HOLE = "black hole for 1..8 s"
    ONE_WAY = "silence one way for 1..8 s"
    SLOW = "5 Mb/s and 100 ms for 2..8 s"
    RESET = "reset connections"
    RESTART = "restart a node"


_OF_WORKERS = (Kind.KILL_WORKER, Kind.PAUSE_WORKER, Kind.STOP_WORKER)
_LASTS_S = {
    Kind.KILL_NODE: (0.0, 3.0),
    Kind.PAUSE_WORKER: (0.5, 2.0),
    Kind.PAUSE_AGENT: (1.0, 6.0),
    Kind.BLACK_HOLE: (1.0, 8.0),
    Kind.ONE_WAY: (1.0, 8.0),
    Kind.SLOW: (2.0, 8.0),
    Kind.RESTART: (0.0, 1.0),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Fault:
    """Drawn before anything runs, so that a seed repeats it; `choice` in [0, 1) chooses among what is there then."""

    kind: Kind
    at_s: float
    lasts_s: float
    choice: float


@dataclass(kw_only=True)
class Strike:
    """A fault that was carried out."""

    fault: Fault
    target: str
    began_s: float
    ended_s: float = math.inf


@dataclass(kw_only=True)
class Answer:
    """One request as its client saw it."""

    prompt: int
    asked_s: float
    ended_s: float = 0.0
    text: str = ""
    error: str | None = None
    cancelled: bool = False
    done: bool = False
    pauses: list[tuple[float, float]] = field(default_factory=list)


@dataclass(frozen=True, slots=True, kw_only=True)
class Sight:
    """What the head said of its cluster at one moment."""

    at_s: float
    state: str
    epoch: int
    nodes: tuple[tuple[str, str, bool], ...]  # name, state, has a part


@dataclass(kw_only=True)
class Report:
    seed: int
    strikes: list[Strike]
    answers: list[Answer]
    sights: list[Sight]
    violations: list[str]
    back_s: float  # from the last healing to every node at work; infinite when it never came
    before: Footprint
    after: Footprint

    @property
    def num_right(self) -> int:
        return sum(answer.done for answer in self.answers)

    @property
    def num_cancelled(self) -> int:
        return sum(answer.cancelled for answer in self.answers)

    @property
    def num_errors(self) -> int:
        return sum(answer.error is not None for answer in self.answers)

    @property
    def num_epochs(self) -> int:
        return self.sights[-1].epoch - self.sights[0].epoch if self.sights else 0

    def pauses(self) -> dict[Kind, list[float]]:
        """The longest pause that each strike made in any stream; 0 where it made none."""
        longest: dict[int, float] = dict.fromkeys(range(len(self.strikes)), 0.0)
        for began_s, ended_s in (pause for answer in self.answers for pause in answer.pauses):
            inside = [index for index, each in enumerate(self.strikes) if began_s <= each.began_s <= ended_s]
            before = [index for index, each in enumerate(self.strikes) if each.began_s < began_s]
            if blamed := (inside[:1] or before[-1:]):
                longest[blamed[0]] = max(longest[blamed[0]], ended_s - began_s)
        found: dict[Kind, list[float]] = {}
        for index, strike in enumerate(self.strikes):
            found.setdefault(strike.fault.kind, []).append(longest[index])
        return found

    def table(self) -> str:
        lines = [f"{'fault':<32}{'times':>6}{'median pause':>14}{'longest pause':>15}"]
        for kind, pauses in sorted(self.pauses().items()):
            lines.append(f"{kind:<32}{len(pauses):>6}{statistics.median(pauses):>12.1f} s{max(pauses):>13.1f} s")
        lines += [
            "",
            f"faults {len(self.strikes)}, requests {len(self.answers)}: right {self.num_right}, "
            f"cancelled {self.num_cancelled}, errors {self.num_errors}; pipelines {self.num_epochs}",
            f"all nodes at work {self.back_s:.1f} s after the last fault; head {self.before.rss_bytes / 2**20:.0f} -> "
            f"{self.after.rss_bytes / 2**20:.0f} MiB, {self.before.num_descriptors} -> "
            f"{self.after.num_descriptors} descriptors",
        ]
        return "\n".join(lines)


def draw(seed: int, *, num_faults: int, duration_s: float, kinds: Sequence[Kind]) -> list[Fault]:
    """Faults of all kinds in turn, shuffled, at random times of the duration."""
    chance = random.Random(seed)
    chosen = [kinds[index % len(kinds)] for index in range(num_faults)]
    chance.shuffle(chosen)
    times = sorted(chance.uniform(0.0, duration_s) for _ in chosen)
    return [
        Fault(kind=kind, at_s=at_s, lasts_s=chance.uniform(*_LASTS_S.get(kind, (0.0, 0.0))), choice=chance.random())
        for kind, at_s in zip(chosen, times, strict=True)
    ]


class Soak:
    """A running cluster, its load and its faults."""

    def __init__(self, head: Server, machines: Sequence[Machine], *, seed: int, tell: Callable[[str], None]) -> None:
        self._head = head
        self._machines = machines
        self._seed = seed
        self._tell = tell
        self._stop = threading.Event()  # no more requests
        self._over = threading.Event()  # nothing more to watch
        self._texts: list[str] = []
        self._answers: list[Answer] = []
        self._strikes: list[Strike] = []
        self._sights: list[Sight] = []
        self._violations: list[str] = []
        self._busy: dict[str, Future[None]] = {}  # what a fault is at work on
        self.pids: set[int] = set()

    def run(self, faults: Sequence[Fault], *, num_clients: int) -> Report:
        for each in self._machines:
            each.start()
        poll(self._all_at_work, deadline_s=START_S, what="every node has a part")
        self._texts = [self._ask(prompt).text for prompt in range(len(_PROMPTS))]
        with ThreadPoolExecutor(max_workers=num_clients) as clients:  # whatever is made on first use
            again = list(clients.map(self._ask, range(len(_PROMPTS))))
        assert [answer.text for answer in again] == self._texts, "texts differ before anything was broken"
        before = Footprint.of(self._head)

        with ThreadPoolExecutor(max_workers=num_clients + 2 + len(self._machines)) as threads:  # nothing waits for one
            watching = threads.submit(self._watch)
            asking = [threads.submit(self._keep_asking, number) for number in range(num_clients)]
            try:
                self._strike_all(faults, threads)
                back_s = self._wait_until_back()
            finally:
                self._stop.set()
                for client in asking:
                    client.result()
                self._over.set()
                watching.result()
        after = self._wait_until_given_back(before)
        self._judge()
        return Report(
            seed=self._seed,
            strikes=self._strikes,
            answers=self._answers,
            sights=self._sights,
            violations=self._violations,
            back_s=back_s,
            before=before,
            after=after,
        )

    # ----------------------------------------------------------------------------------------------- load

    def _keep_asking(self, number: int) -> None:
        chance = random.Random(f"{self._seed} client {number}")
        while not self._stop.is_set():
            cancelled_after = chance.randrange(_NUM_PIECES_CANCELLED) if chance.random() < _CANCELLED else None
            answer = self._ask(chance.randrange(len(_PROMPTS)), cancelled_after=cancelled_after)
            self._answers.append(answer)
            self._stop.wait(1.0 if answer.error else chance.uniform(0.0, 0.3))

    def _ask(self, prompt: int, *, cancelled_after: int | None = None) -> Answer:
        """Never raises: what goes wrong is the answer's error."""
        answer = Answer(prompt=prompt, asked_s=time.monotonic())
        body = {
            "model": "tllm-demo",
            "messages": [{"role": "user", "content": _PROMPTS[prompt]}],
            "temperature": 0,
            "ignore_eos": True,
            "max_tokens": _NUM_TOKENS[prompt % len(_NUM_TOKENS)],
            "stream": True,
        }
        try:
            with (
                httpx.Client(timeout=REQUEST_S) as client,
                client.stream("POST", f"{self._head.url}/v1/chat/completions", json=body) as response,
            ):
                if response.status_code != 200:
                    response.read()
                    answer.error = f"status {response.status_code}: {response.text}"
                    if response.status_code != 503 or "retry-after" not in response.headers:
                        self._violate(f"an answer that is neither right nor a clear refusal: {answer.error}")
                else:
                    self._read(answer, response.iter_lines(), cancelled_after)
        except httpx.HTTPError as error:
            answer.error = f"{type(error).__name__}: {error}"
            self._violate(f"a stream ended without a word: {answer.error}")
        answer.ended_s = time.monotonic()
        return answer

    def _read(self, answer: Answer, lines: Iterator[str], cancelled_after: int | None) -> None:
        last_s, num_pieces = answer.asked_s, 0
        for line in lines:
            now_s = time.monotonic()
            if now_s - answer.asked_s > REQUEST_S:
                answer.error = f"not complete after {REQUEST_S:g} s"
                self._violate(f"a request hangs: {answer.error}")
                return
            if line == "data: [DONE]":
                answer.done = True
            if not line.startswith("data: {"):
                continue
            frame = json.loads(line[6:])
            if "error" in frame:
                answer.error = frame["error"]["message"]
                return
            if not frame["choices"] or not (piece := frame["choices"][0]["delta"].get("content")):
                continue
            if now_s - last_s >= _PAUSE_S:
                answer.pauses.append((last_s, now_s))
            last_s = now_s
            answer.text += piece
            num_pieces += 1
            if cancelled_after is not None and num_pieces > cancelled_after:
                answer.cancelled = True
                return
        if not answer.done:
            answer.error = "the stream ended without [DONE]"
            self._violate(answer.error)

    # --------------------------------------------------------------------------------------------- faults

    def _strike_all(self, faults: Sequence[Fault], threads: ThreadPoolExecutor) -> None:
        began_s = time.monotonic()
        pause = threading.Event()
        for fault in faults:
            pause.wait(max(0.0, began_s + fault.at_s - time.monotonic()))
            while not (free := self._free_targets(fault.kind)):
                pause.wait(0.05)
            target = free[int(fault.choice * len(free))]
            strike = Strike(fault=fault, target=target, began_s=time.monotonic())
            self._strikes.append(strike)
            self._tell(f"{fault.kind} ({fault.lasts_s:.1f} s) on {target}")
            self._busy[target] = threads.submit(self._carry_out, strike)
        for work in list(self._busy.values()):
            work.result()
        self._tell("all healed")

    def _free_targets(self, kind: Kind) -> list[str]:
        names = [each.name for each in self._machines]
        if kind in _OF_WORKERS:
            names.append("head")
        for name in names:
            if name in self._busy and self._busy[name].done():
                self._busy.pop(name).result()
        return [name for name in names if name not in self._busy and (kind not in _OF_WORKERS or self._workers(name))]

    def _workers(self, target: str) -> list[psutil.Process]:
        """Those of one machine, without those that measure or have just been started and hold nothing."""
        family = self._head.family() if target == "head" else self._machine(target).family()
        found = []
        for process in family:
            with suppress(psutil.NoSuchProcess):
                line = process.cmdline()
                if "tllm.cluster.worker" in line and process.status() != psutil.STATUS_STOPPED:
                    found.append(process)
        return found

    def _machine(self, name: str) -> Machine:
        return next(each for each in self._machines if each.name == name)

    def _carry_out(self, strike: Strike) -> None:
        """Break it, and mend it after a while."""
        fault = strike.fault
        try:
            if fault.kind in _OF_WORKERS:
                self._strike_worker(fault, strike.target)
            else:
                self._strike_machine(fault, self._machine(strike.target))
        finally:
            strike.ended_s = time.monotonic()

    def _strike_worker(self, fault: Fault, target: str) -> None:
        workers = self._workers(target)
        if not workers:
            return
        worker = workers[int(fault.choice * 997) % len(workers)]
        with suppress(psutil.NoSuchProcess):  # it may have ended meanwhile
            match fault.kind:
                case Kind.KILL_WORKER:
                    worker.kill()
                case Kind.STOP_WORKER:
                    worker.suspend()
                case Kind.PAUSE_WORKER:
                    worker.suspend()
                    threading.Event().wait(fault.lasts_s)
                    worker.resume()

    def _strike_machine(self, fault: Fault, struck: Machine) -> None:
        pause = threading.Event()
        links = self._some_links(fault, struck)
        match fault.kind:
            case Kind.KILL_NODE:
                struck.kill()
                pause.wait(fault.lasts_s)
                struck.start()
                struck.joined()
            case Kind.RESTART:
                if (status := struck.leave()) != 0:
                    self._violate(f"{struck.name} left with status {status}")
                pause.wait(fault.lasts_s)
                struck.start()
                struck.joined()
            case Kind.PAUSE_AGENT:
                struck.agent.suspend()
                pause.wait(fault.lasts_s)
                struck.agent.resume()
            case Kind.RESET:
                for link in links:
                    link.reset_connections()
            case Kind.BLACK_HOLE:
                for link in links:
                    link.black_hole()
                pause.wait(fault.lasts_s)
                for link in links:
                    link.heal()
            case Kind.ONE_WAY:
                silent = Direction.TO_TARGET if fault.choice < 0.5 else Direction.TO_CLIENT
                for link in links:
                    link.partition(silent)
                pause.wait(fault.lasts_s)
                for link in links:
                    link.heal()
            case Kind.SLOW:
                for link in links:
                    link.shape(delay_s=0.05, rate_bits_per_s=5e6)
                pause.wait(fault.lasts_s)
                for link in links:
                    link.shape(delay_s=0.0, rate_bits_per_s=math.inf)

    def _some_links(self, fault: Fault, struck: Machine) -> Sequence[EmulatedLink]:
        """The whole cable, as often as not; else its way to the head, or the way to it."""
        return (struck.links, struck.links, (struck.to_head,), struck.to_it)[int(fault.choice * 4999) % 4]

    # --------------------------------------------------------------------------------------------- judged

    def _violate(self, what: str) -> None:
        self._tell(f"VIOLATION: {what}")
        self._violations.append(what)

    def _watch(self) -> None:
        """What the head says of itself, and every process that ever is."""
        with httpx.Client(timeout=REQUEST_S) as client:
            while not self._over.wait(_WATCH_S):
                self._look(client)

    def _look(self, client: httpx.Client) -> Sight:
        status = client.get(f"{self._head.url}/tllm/v1/cluster").json()
        sight = Sight(
            at_s=time.monotonic(),
            state=status["state"],
            epoch=status["epoch"],
            nodes=tuple((node["name"], node["state"], bool(node["stages"])) for node in status["nodes"]),
        )
        for name, count in Counter(name for name, _, _ in sight.nodes).items():
            if count > 1:
                self._violate(f"{name} is there {count} times")
        if not self._sights or replace(sight, at_s=0.0) != replace(self._sights[-1], at_s=0.0):
            parts = " ".join(f"{name}:{state}{'*' if part else ''}" for name, state, part in sight.nodes)
            self._tell(f"  epoch {sight.epoch} {sight.state} {parts}")
        self._sights.append(sight)
        for family in (self._head.family(), *(each.family() for each in self._machines)):
            self.pids.update(process.pid for process in family)
        return sight

    def _all_at_work(self) -> bool:
        with httpx.Client() as client:
            sight = self._look(client)
        return (
            sight.state == "serving"
            and len(sight.nodes) == 1 + len(self._machines)
            and all(state == "ready" and part for _, state, part in sight.nodes)
        )

    def _wait_until_back(self) -> float:
        began_s = time.monotonic()
        try:
            poll(self._all_at_work, deadline_s=BACK_S, what="every node is there once and has a part")
        except AssertionError as error:
            self._violate(str(error))
            return math.inf
        back_s = time.monotonic() - began_s
        for prompt in range(len(_PROMPTS)):
            self._answers.append(self._ask(prompt))
        return back_s

    def _wait_until_given_back(self, before: Footprint) -> Footprint:
        def is_back() -> bool:
            after = Footprint.of(self._head)
            return (
                after.used_blocks == 0
                and after.num_running == 0
                and after.num_processes <= before.num_processes
                and after.num_descriptors <= before.num_descriptors + _NUM_DESCRIPTORS
                and after.rss_bytes <= before.rss_bytes + _RSS_BYTES
            )

        try:
            poll(is_back, deadline_s=BACK_S, what="everything given back")
        except AssertionError as error:
            self._violate(f"{error}: before {before}, after {Footprint.of(self._head)}")
        return Footprint.of(self._head)

    def _judge(self) -> None:
        for answer in self._answers:
            right = self._texts[answer.prompt]
            if answer.error is None and not answer.cancelled and answer.text != right:
                self._violate(f"a wrong text: {answer.text!r} instead of {right!r}")
            if not right.startswith(answer.text):
                self._violate(f"a wrong beginning: {answer.text!r} of {right!r}")
            if answer.error is not None and not self._had_nobody(answer):
                self._violate(f"an error while a node was ready: {answer.error}")

    def _had_nobody(self, answer: Answer) -> bool:
        """Whether at some moment of the request no node could compute."""
        during = [s for s in self._sights if answer.asked_s - 1 <= s.at_s <= answer.ended_s + 1]
        return any(all(state != "ready" for _, state, _ in sight.nodes) for sight in during)


def soak(
    *,
    seed: int,
    num_faults: int,
    duration_s: float,
    num_machines: int = 2,
    num_workers: int = 1,
    num_clients: int = 4,
    kinds: Sequence[Kind] = tuple(Kind),
    tell: Callable[[str], None] = lambda line: None,
    logs: Path | None = None,
) -> Report:
    """Everything, from the first process to the last; what is left of it is a violation as well."""
    with ExitStack() as stack:
        state = stack.enter_context(tempfile.TemporaryDirectory(prefix="tllm-head-"))
        remember_speed(Path(state) / "tllm", DEMO)
        head = stack.enter_context(
            serve(
                *("--workers", str(num_workers), "--threads", str(num_workers), "--use-all"),
                *("--dtype", "float32", "--max-batch-tokens", "64", "--log-level", "info"),
                XDG_STATE_HOME=state,
            )
        )
        address = head.wait_for(r"tllm join (\S+)")[1]
        token = rpc.TokenStore(rpc.Authority.open(Path(state) / "tllm" / "cluster")).default()
        machines = [
            stack.enter_context(machine(f"m{number}", number, head=split_address(address, default_port=0), token=token))
            for number in range(1, num_machines + 1)
        ]
        for each in machines:
            remember_speed(Path(each.environment["XDG_STATE_HOME"]) / "tllm", DEMO)
        running = Soak(head, machines, seed=seed, tell=tell)
        if logs is not None:
            stack.callback(_write_logs, logs, head, machines)
        faults = draw(seed, num_faults=num_faults, duration_s=duration_s, kinds=kinds)
        report = running.run(faults, num_clients=num_clients)
    try:
        poll(lambda: not alive(sorted(running.pids)), deadline_s=BACK_S, what="every process gone")
    except AssertionError as error:
        report.violations.append(f"{error}: {alive(sorted(running.pids))}")
    return report


def _write_logs(directory: Path, head: Server, machines: Sequence[Machine]) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "head.log").write_text(head.output + "\n")
    for each in machines:
        lives = [f"--- life {number}\n{life.output}\n" for number, life in enumerate(each.lives)]
        (directory / f"{each.name}.log").write_text("".join(lives))
