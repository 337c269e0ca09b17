"""How fast CPUs decode and prefill: each figure beside what the memory bus allows, llama.cpp and transformers.

    make bench-cpu
    .venv/bin/python -m scripts.bench_cpu --model llama-3.2-1b --only decode-bf16,prefill-int8 --turns 7

Checkpoints of published shapes with random weights lie in `.bench`, and beside them the peer's files, made of the same
weights. All systems compute with as many threads as there are processors. What is compared is measured in turns, and
what waits for its turn is asleep:

    turn 1   tllm  llama.cpp  transformers  memory      turn 2   tllm  llama.cpp  transformers  memory      ...

The limit is how often a second the bytes that a step must read (weights in the form they are held in, and KV) can be
read, at the speed at which plain reads went in the same turn. One token of prefill is no such step: it has no limit
here.

The peer runs in a Python that has llama-cpp-python, by default this one. Prints tables for docs/lab/LOG.md.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np

from scripts.make_gguf import write_gguf
from tllm.cluster.machine import num_processors
from tllm.cluster.speeds import processor_name
from tllm.core.config import EMBEDDED_MODEL
from tllm.core.types import DType, Quantization
from tllm.core.units import format_bytes
from tllm.lab import accuracy
from tllm.lab.accuracy import Divergence
from tllm.lab.latency import Series, aggregate_rate, in_turns, prefill_rate, stream_rate
from tllm.lab.server import Server, serving
from tllm.lab.system import Child, ChildSystem, Decode, Prefill
from tllm.lab.table import LIMIT, Asked, Figure, as_json, lines, summary
from tllm.models.checkpoint import Checkpoint
from tllm.models.repository import resolve_model

ROOT = Path(__file__).parent.parent
BENCH = ROOT / ".bench"
CHILD = ROOT / "scripts" / "llama_child.py"
MODELS = ("llama-3.2-1b", "qwen3-0.6b")

CONTEXT = 64  # tokens before the measured steps
STEPS = 16
LONG = 8192
STREAMS = 16
PROMPT = 512
LONG_PROMPT = 1024
SERVER_KV = "3GB"
MAX_INT8_KL = 1e-3

INT8 = Quantization.parse("int8")
INT4 = Quantization.parse("int4")
PEERS = ("llama.cpp BF16", "llama.cpp Q8_0", "llama.cpp Q4_0")
Line = tuple[str, Callable[[], float]]


@dataclass
class Bench:
    """One model and its systems, each started when it is first needed and kept as long as the stack is."""

    model: str
    directory: Path
    peer_python: str
    num_threads: int
    num_turns: int
    stack: ExitStack
    _children: dict[str, Child] = field(default_factory=dict)
    _servers: dict[str, Server] = field(default_factory=dict)
    _num_prompts: int = 0

    def __post_init__(self) -> None:
        spec = Checkpoint.open(self.directory).spec
        self.kv_bytes = spec.kv_bytes_per_position(spec.num_layers, DType.BFLOAT16)

    def tllm(self, quantization: Quantization | None = None) -> ChildSystem:
        return self._system("tllm", quantization)

    def transformers(self) -> ChildSystem:
        return self._system("transformers", None)

    def memory(self) -> ChildSystem:
        return self._system("memory", None)

    def _system(self, name: str, quantization: Quantization | None) -> ChildSystem:
        def start() -> ChildSystem:
            return ChildSystem(name, self.directory, DType.BFLOAT16, self.num_threads, quantization)

        child = self._child(f"{name} {quantization}", start)
        assert isinstance(child, ChildSystem)
        return child

    def llama(self, name: str) -> Child:
        def start() -> Child:
            path = gguf(self.directory, self.model, name.split()[-1], self.peer_python)
            command = [self.peer_python, str(CHILD), "serve", str(path), str(self.num_threads)]
            return Child(name, command, os.environ)

        return self._child(name, start)

    def _child(self, key: str, start: Callable[[], Child]) -> Child:
        if key not in self._children:
            self._children[key] = self.stack.enter_context(start())
        return self._children[key]

    def server(self, num_workers: int, num_streams: int = 1) -> Server:
        """So many workers, each pinned to a processor of its own, planned for so many streams."""
        key, workers = f"{num_workers} for {num_streams}", str(num_workers)
        if key not in self._servers:
            arguments = [str(self.directory), "--workers", workers, "--threads", workers, "--pin", "--use-all"]
            arguments += ["--streams", str(num_streams)]
            self._servers[key] = self.stack.enter_context(serving([*arguments, "--kv-memory", SERVER_KV]))
        return self._servers[key]

    def new_prompt(self, num_tokens: int) -> list[int]:
        """No prefix of it has been seen."""
        self._num_prompts += 1
        return [(7 * at + 31 * self._num_prompts) % 253 for at in range(num_tokens)]

    def limit(self, system: ChildSystem, request: Decode, num_threads: int | None = None) -> Line:
        """Tokens a second of all streams, if steps did nothing but read."""
        kv = self.kv_bytes * request.batch * (request.context + request.num_steps / 2)
        num_bytes = system.step_bytes() + kv
        reader, threads = self.memory(), num_threads or self.num_threads
        return LIMIT, lambda: request.batch * reader.bandwidth(threads) / num_bytes

    def measure(self, measured: Sequence[Line]) -> tuple[Series, ...]:
        return tuple(in_turns(measured, num_turns=self.num_turns))


def decoding(name: str, system: Child, request: Decode) -> Line:
    return name, lambda: request.batch * request.num_steps / system.decode(request)


def prefilling(name: str, system: Child, request: Prefill) -> Line:
    return name, lambda: request.num_tokens / system.prefill(request)


def decode(bench: Bench, quantization: Quantization | None, peers: Sequence[str]) -> tuple[Series, ...]:
    request = Decode(batch=1, context=CONTEXT, num_steps=STEPS)
    system = bench.tllm(quantization)
    others = [
        decoding(peer, bench.transformers() if peer == "transformers" else bench.llama(peer), request) for peer in peers
    ]
    return bench.measure([decoding("tllm", system, request), bench.limit(system, request), *others])


def decode_bf16(bench: Bench) -> Iterator[Figure]:
    yield Figure(
        name="bf16 decode, batch 1",
        unit="tokens/s",
        series=decode(bench, None, ("llama.cpp BF16", "transformers")),
        asked=(
            Asked(of=(LIMIT,), at_least=0.88),
            Asked(of=("llama.cpp BF16",), at_least=1.3),
            Asked(of=("transformers",), at_least=2.0),
        ),
    )


def decode_int8(bench: Bench) -> Iterator[Figure]:
    yield Figure(
        name="int8 decode, batch 1",
        unit="tokens/s",
        series=decode(bench, INT8, ("llama.cpp Q8_0",)),
        asked=(Asked(of=(LIMIT,), at_least=0.8), Asked(of=("llama.cpp Q8_0",), at_least=1.8)),
    )


def decode_int4(bench: Bench) -> Iterator[Figure]:
    yield Figure(
        name="int4 (group 64) decode, batch 1",
        unit="tokens/s",
        series=decode(bench, INT4, ("llama.cpp Q4_0",)),
        asked=(Asked(of=(LIMIT,), at_least=0.7), Asked(of=("llama.cpp Q4_0",), at_least=1.7)),
    )


def prefill(bench: Bench) -> Iterator[Figure]:
    """All formats in the same turns."""
    request = Prefill(num_tokens=PROMPT)
    lines_of_peers = [prefilling(peer, bench.llama(peer), request) for peer in PEERS]
    int8, bf16 = (
        prefilling(f"tllm {name}", bench.tllm(form), request) for name, form in (("int8", INT8), ("bf16", None))
    )
    series = {line.name: line for line in bench.measure([int8, bf16, *lines_of_peers])}
    peers = tuple(series[peer] for peer in PEERS)
    yield Figure(
        name=f"int8 prefill of {PROMPT} tokens",
        unit="tokens/s",
        series=(series["tllm int8"], *peers),
        asked=(Asked(of=("llama.cpp Q8_0",), at_least=4.0), Asked(of=PEERS, at_least=2.5)),
    )
    yield Figure(
        name=f"bf16 prefill of {PROMPT} tokens",
        unit="tokens/s",
        series=(series["tllm bf16"], *peers),
        asked=(Asked(of=("llama.cpp BF16",), at_least=1.2),),
    )


def decode_batch(bench: Bench) -> Iterator[Figure]:
    system = bench.tllm(INT8)
    together = Decode(batch=STREAMS, context=CONTEXT, num_steps=STEPS // 2)
    alone = Decode(batch=1, context=CONTEXT, num_steps=STEPS)
    yield Figure(
        name=f"int8 decode, batch {STREAMS}, aggregate",
        unit="tokens/s",
        series=bench.measure(
            [
                decoding("tllm", system, together),
                decoding("batch 1", bench.tllm(INT8), alone),
                bench.limit(system, together),
            ]
        ),
        asked=(Asked(of=("batch 1",), at_least=6.0),),
    )


def decode_long(bench: Bench) -> Iterator[Figure]:
    system = bench.tllm(INT8)
    request = Decode(batch=1, context=LONG, num_steps=STEPS)
    yield Figure(
        name=f"int8 decode after {LONG} tokens",
        unit="tokens/s",
        series=bench.measure([decoding("tllm", system, request), bench.limit(system, request)]),
        asked=(Asked(of=(LIMIT,), at_least=0.75),),
        note=f"a step reads {format_bytes(bench.kv_bytes * LONG)} of KV beside its weights",
    )


def pipeline(bench: Bench) -> Iterator[Figure]:
    """Through HTTP: two workers with half of the layers each, and one with all, all of them with one core."""
    two, two_for_many, one = bench.server(2), bench.server(2, STREAMS), bench.server(1)
    names = ("two one-core workers", "one one-core worker")
    context = [7 * at % 256 for at in range(CONTEXT)]

    def measured(pair: Server, measure: Callable[[Server], float]) -> tuple[Series, ...]:
        return bench.measure(
            [(names[0], lambda: measure(pair)), (names[1], lambda: measure(one))],
        )

    def one_stream(server: Server) -> float:
        return stream_rate(server.url, server.model, prompt=context, num_tokens=STEPS + 1)

    def many_streams(server: Server) -> float:
        prompt = bench.new_prompt(CONTEXT)
        return aggregate_rate(server.url, server.model, prompt=prompt, num_tokens=2 * STEPS, num_streams=STREAMS)

    def long_prompt(server: Server) -> float:
        return prefill_rate(server.url, server.model, prompt=bench.new_prompt(LONG_PROMPT))

    for name, pair, measure, at_least in (
        ("bf16, two one-core workers, one stream", two, one_stream, 0.95),
        (f"bf16, two one-core workers, {STREAMS} streams", two_for_many, many_streams, 1.7),
        (f"bf16, two one-core workers, prefill of {LONG_PROMPT}", two, long_prompt, 1.7),
    ):
        yield Figure(
            name=name,
            unit="tokens/s",
            series=measured(pair, measure),
            asked=(Asked(of=(names[1],), at_least=at_least),),
        )


def load(bench: Bench) -> Iterator[Figure]:
    """Bytes of the checkpoint a second, from the page cache."""
    files = sorted(bench.directory.glob("*.safetensors"))
    gigabytes = sum(path.stat().st_size for path in files) / 1e9
    forms = {"bf16": bench.tllm(), "int8": bench.tllm(INT8), "int4": bench.tllm(INT4)}
    # Memory that no process has touched for long is slow to get on some hosts: the same process loads and reads.
    reader, paths = forms["bf16"], [str(path) for path in files]

    def loading(system: ChildSystem) -> Callable[[], float]:
        return lambda: gigabytes / system.load_again()

    def reading(keep: bool) -> Callable[[], float]:
        return lambda: gigabytes / float(reader.ask("read_files", paths=paths, keep=keep))

    kept, passing = "a plain read into new memory", "the same into one small buffer"
    series = bench.measure(
        [(form, loading(system)) for form, system in forms.items()] + [(kept, reading(True)), (passing, reading(False))]
    )
    for number, form in enumerate(forms):
        yield Figure(
            name=f"loading the checkpoint as {form}",
            unit="GB/s of file",
            series=(series[number], *series[-2:]),
            asked=(Asked(of=(kept,), at_least=0.5),) if form == "bf16" else (),
        )


ROWS: Mapping[str, Callable[[Bench], Iterator[Figure]]] = {
    "decode-bf16": decode_bf16,
    "decode-int8": decode_int8,
    "decode-int4": decode_int4,
    "prefill": prefill,
    "batch": decode_batch,
    "long": decode_long,
    "pipeline": pipeline,
    "load": load,
}
ACCURACY = "accuracy"


def gguf(directory: Path, model: str, form: str, peer_python: str) -> Path:
    """The peer's file of the same weights, made if it is not there."""
    path = BENCH / f"{model}.{form.lower()}.gguf"
    if path.exists():
        return path
    if form == "BF16":
        write_gguf(directory, path)
    else:
        source = gguf(directory, model, "BF16", peer_python)
        subprocess.run([peer_python, str(CHILD), "quantize", str(source), str(path), form], check=True)
    return path


def diverge(model: str, directory: Path, peer_python: str, num_threads: int) -> list[tuple[str, str, Divergence]]:
    """Every form's logits beside those of the same system's bf16 weights, and both systems' bf16 beside exact ones.

    The peer's are its own, on the same texts.
    """
    texts = accuracy.texts_of(directory)

    def engine(dtype: DType, form: str | None = None) -> list[accuracy.Logits]:
        quantization = Quantization.parse(form) if form else None
        return list(
            accuracy.engine_logits(directory, texts, dtype=dtype, quantization=quantization, num_threads=num_threads)
        )

    def peer(form: str) -> list[accuracy.Logits]:
        path, out = gguf(directory, model, form, peer_python), BENCH / "logits.npy"
        found = []
        with Child(form, [peer_python, str(CHILD), "serve", str(path), str(num_threads)], os.environ) as child:
            for text in texts:
                child.ask("logits", tokens=list(text), out=str(out))
                found.append(np.load(out))
        out.unlink()
        return found

    measured: list[tuple[str, str, Divergence]] = []
    exact, bf16, peer_bf16 = engine(DType.FLOAT32), engine(DType.BFLOAT16), peer("BF16")
    measured.append(("tllm bf16", "fp32", accuracy.divergence(exact, bf16)))
    measured.append(("llama.cpp BF16", "fp32", accuracy.divergence(exact, peer_bf16)))
    for form in ("int8", "int4-g32", "int4", "int4-g128"):
        measured.append((f"tllm {form}", "tllm bf16", accuracy.divergence(bf16, engine(DType.BFLOAT16, form))))
    for form in ("Q8_0", "Q4_0"):
        measured.append((f"llama.cpp {form}", "its own BF16", accuracy.divergence(peer_bf16, peer(form))))
    return measured


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", action="append", choices=MODELS, help="may be given twice; both by default")
    parser.add_argument("--only", default="", help=f"of {', '.join([*ROWS, ACCURACY])}")
    parser.add_argument("--turns", type=int, default=5, help="counted ones, after one to warm up")
    parser.add_argument("--threads", type=int, default=num_processors())
    parser.add_argument("--peer-python", default=sys.executable, help="one that has llama-cpp-python")
    parser.add_argument("--json", type=Path, help="also write all that was measured there")
    arguments = parser.parse_args()
    chosen = arguments.only.split(",") if arguments.only else [*ROWS, ACCURACY]
    if unknown := set(chosen) - {*ROWS, ACCURACY}:
        parser.error(f"there is no {', '.join(sorted(unknown))}; there are {', '.join([*ROWS, ACCURACY])}")

    kernels, features = kernel_status(), peer_features(arguments.peer_python)
    print(f"{processor_name()}, {arguments.threads} threads\ntllm       {kernels}\nllama.cpp  {features}", flush=True)
    told: dict[str, object] = {
        "processor": processor_name(),
        "threads": arguments.threads,
        "kernels": kernels,
        "peer": features,
    }
    for model in arguments.model or MODELS:
        told[model] = measure_model(model, chosen, arguments)
    if ACCURACY in chosen:
        told[EMBEDDED_MODEL] = measure_accuracy(EMBEDDED_MODEL, resolve_model(EMBEDDED_MODEL), arguments)
    if arguments.json:
        arguments.json.write_text(json.dumps(told, indent=1))


def measure_model(model: str, chosen: Sequence[str], arguments: argparse.Namespace) -> object:
    directory = BENCH / model
    figures: list[Figure] = []
    began_s = time.monotonic()
    for row, measure in ROWS.items():
        if row not in chosen:
            continue
        with ExitStack() as stack:  # all systems of all rows do not fit into 24 GB
            bench = Bench(model, directory, arguments.peer_python, arguments.threads, arguments.turns, stack)
            if not figures:
                bandwidths = [bench.memory().bandwidth(threads) / 1e9 for threads in range(1, arguments.threads + 1)]
                told = " / ".join(f"{bandwidth:.1f}" for bandwidth in bandwidths)
                print(f"\n{model}, random weights; plain reads with 1 .. {arguments.threads} threads: {told} GB/s\n")
            for figure in measure(bench):
                figures.append(figure)
                print("\n".join(lines(figure)), flush=True)
    if figures:
        print(f"\n{model}: {summary(figures)}; {time.monotonic() - began_s:.0f} s")
    told_figures = [as_json(figure) for figure in figures]
    judged = measure_accuracy(model, directory, arguments) if ACCURACY in chosen else None
    return {"figures": told_figures, "accuracy": judged}


def measure_accuracy(model: str, directory: Path, arguments: argparse.Namespace) -> object:
    print(f"\n{model}: what the forms of weights change")
    measured = diverge(model, directory, arguments.peer_python, arguments.threads)
    print("\n".join(accuracy.lines(measured)))
    kl = {form: found.mean_kl for form, _, found in measured}
    for form, allowed, whose in (
        ("tllm int8", MAX_INT8_KL, ""),
        ("tllm int4", kl["llama.cpp Q4_0"], ", llama.cpp's with Q4_0"),
    ):
        verdict = "met" if kl[form] <= allowed else "missed"
        print(f"    {form}: mean KL {kl[form]:.2e}, asked at most {allowed:.2e}{whose}   {verdict}", flush=True)
    return [{"form": form, "reference": reference} | asdict(found) for form, reference, found in measured]


def kernel_status() -> str:
    """What tllm's kernels are compiled for, here and now."""
    code = "from tllm.engines.torch.kernels.build import status; print(status())"
    done = subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, check=True)
    return done.stdout.strip()


def peer_features(python: str) -> str:
    """What the peer's build uses of the processor. Ends with what to do when it cannot be run."""
    done = subprocess.run([python, str(CHILD), "info"], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise SystemExit(f"{done.stderr}\n{python} cannot run llama.cpp: `pip install '.[bench]'`, or --peer-python")
    return done.stdout.strip().removeprefix("CPU : ").rstrip(" |").replace(" = 1", "")


if __name__ == "__main__":
    main()
