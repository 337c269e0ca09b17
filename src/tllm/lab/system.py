"""A system under test in a process of its own, so that several can be loaded and measured in turns.

    parent ──{"prefill": {...}}──▶ child
           ◀──{"value": ...}──────

`python -m tllm.lab.system NAME MODEL DTYPE QUANTIZATION THREADS` reads one JSON request a line and answers each with
one line. NAME is `tllm`, the torch engine alone, or `transformers`, the peer that everybody has; `memory` has no model
and measures what the machine allows. `scripts/llama_child.py` is another such child. One that is not asked anything
waits for its next line and takes neither processor nor memory bandwidth.

A context is computed when it is first asked for and kept: a turn decodes the same positions anew.

This file does not know HTTP, nor what the figures are compared with.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, Self

from tllm.cluster.process import worker_environment
from tllm.core.errors import EngineError
from tllm.core.types import (
    BlockId,
    Chunk,
    DType,
    Epoch,
    Quantization,
    SamplingParams,
    SamplingState,
    SequenceId,
    Step,
    StepId,
    StepResult,
    TokenId,
)
from tllm.engines.base import EngineConfig
from tllm.models.checkpoint import Checkpoint
from tllm.models.spec import Shard

if TYPE_CHECKING:
    from types import TracebackType

    from tllm.engines.torch.engine import TorchEngine
    from tllm.lab.inside import Part

_BLOCK_SIZE = 64
_CHUNK = 512  # tokens of a prompt that are computed at a time
_BANDWIDTH_BYTES = 1 << 30  # far beyond any cache
_BUFFER_BYTES = 4 << 20
_PLAIN = "plain"  # weights as the checkpoint has them
_GREEDY = SamplingParams(temperature=0.0, max_tokens=1)


@dataclass(frozen=True, slots=True, kw_only=True)
class Decode:
    """`num_steps` decode steps of `batch` sequences that already hold `context` tokens each."""

    batch: int
    context: int
    num_steps: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Prefill:
    """One prompt of `num_tokens` tokens, to its first sampled token."""

    num_tokens: int


class System(Protocol):
    """What all systems can do; seconds of wall time."""

    def prefill(self, request: Prefill) -> float: ...

    def decode(self, request: Decode) -> float: ...


class TllmSystem:
    """The torch engine with the whole model as one shard, fed with steps by hand."""

    def __init__(self, model: Path, dtype: DType, quantization: Quantization | None, num_threads: int) -> None:
        self._checkpoint = Checkpoint.open(model)
        self._vocab_size = self._checkpoint.spec.vocab_size
        shard = Shard(first_layer=0, last_layer=self._checkpoint.spec.num_layers, embed=True, head=True)
        self._config = EngineConfig(shard=shard, dtype=dtype, quantization=quantization, num_threads=num_threads)
        self._engine = self._loaded()
        self._num_steps = 0
        self._held: tuple[int, int, int] | None = None  # sequences, positions of each, positions there is room for

    def prefill(self, request: Prefill) -> float:
        self._held = None
        self._allocate(1, request.num_tokens)
        began_s = time.perf_counter()
        self._prompt(0, request.num_tokens, request.num_tokens)
        return time.perf_counter() - began_s

    def decode(self, request: Decode) -> float:
        total = self._hold(request)
        began_s = time.perf_counter()
        for position in range(request.context, request.context + request.num_steps):
            self._step([self._chunk(seq, position, 1, total) for seq in range(request.batch)])
        return time.perf_counter() - began_s

    def load_again(self) -> float:
        """Seconds that loading takes, into memory of its own."""
        began_s = time.perf_counter()
        engine = self._loaded()
        seconds = time.perf_counter() - began_s
        engine.close()
        return seconds

    def step_bytes(self) -> int:
        """Weights that one step reads, in the form they are held in."""
        from tllm.lab.inside import step_bytes

        return step_bytes(self._engine)

    def profile(self, request: Decode) -> list[Part]:
        """Where the time of a step goes, by the medians of `num_steps` steps."""
        from tllm.lab.inside import profiled

        total = self._hold(request)
        steps = range(request.context, request.context + request.num_steps)
        with profiled(self._engine, request.context + request.num_steps // 2) as profile:
            for position in steps:
                chunks = [self._chunk(seq, position, 1, total) for seq in range(request.batch)]
                with profile.step():
                    self._step(chunks)
        return profile.parts()

    def _loaded(self) -> TorchEngine:
        from tllm.engines.torch.engine import TorchEngine

        engine = TorchEngine(self._config)
        engine.load(self._checkpoint, lambda done, total: None)
        return engine

    def _hold(self, request: Decode) -> int:
        """The context of every sequence is in the KV afterwards; positions there is room for."""
        total = request.context + request.num_steps + 1
        if self._held != (request.batch, request.context, total):
            self._allocate(request.batch, total)
            for seq in range(request.batch):
                self._prompt(seq, request.context, total)
            self._held = (request.batch, request.context, total)
        return total

    def _allocate(self, num_sequences: int, num_positions: int) -> None:
        self._engine.allocate(num_sequences * -(-num_positions // _BLOCK_SIZE), _BLOCK_SIZE)

    def _prompt(self, seq: int, num_tokens: int, num_positions: int) -> None:
        for start in range(0, num_tokens, _CHUNK):
            self._step([self._chunk(seq, start, min(_CHUNK, num_tokens - start), num_positions)])

    def _chunk(self, seq: int, start: int, num_tokens: int, num_positions: int) -> Chunk:
        num_blocks = -(-num_positions // _BLOCK_SIZE)
        return Chunk(
            seq=SequenceId(seq),
            start=start,
            tokens=tuple(
                TokenId((7 * seq + 13 * at + 5) % self._vocab_size) for at in range(start, start + num_tokens)
            ),
            blocks=tuple(BlockId(block) for block in range(seq * num_blocks, (seq + 1) * num_blocks)),
            sampling=SamplingState(params=_GREEDY, position=start + num_tokens),
        )

    def _step(self, chunks: list[Chunk]) -> None:
        self._num_steps += 1
        step = Step(id=StepId(self._num_steps), epoch=Epoch(1), chunks=tuple(chunks))
        result = self._engine.forward(step, None)
        if not isinstance(result, StepResult) or result.failed:
            raise EngineError(f"the engine did not sample: {result}")


class TransformersSystem:
    """`AutoModelForCausalLM` with its own cache, as its documentation uses it."""

    def __init__(self, model: Path, dtype: DType, num_threads: int) -> None:
        import torch
        from transformers import AutoModelForCausalLM

        torch.set_num_threads(num_threads)
        self._torch = torch
        self._model = AutoModelForCausalLM.from_pretrained(str(model), dtype=getattr(torch, dtype))
        self._vocab_size = self._model.config.vocab_size
        self._held: tuple[int, int] | None = None  # sequences and positions of each in the cache

    def prefill(self, request: Prefill) -> float:
        with self._torch.inference_mode():
            ids = self._ids(1, request.num_tokens)
            began_s = time.perf_counter()
            self._model(ids, use_cache=True, logits_to_keep=1).logits.argmax(-1)
            return time.perf_counter() - began_s

    def decode(self, request: Decode) -> float:
        with self._torch.inference_mode():
            if self._held != (request.batch, request.context):
                ids = self._ids(request.batch, request.context)
                self._cache = self._model(ids, use_cache=True, logits_to_keep=1).past_key_values
                self._held = (request.batch, request.context)
            if surplus := self._cache.get_seq_length() - request.context:
                self._cache.crop(-surplus)
            ids = self._ids(request.batch, 1)
            began_s = time.perf_counter()
            for _ in range(request.num_steps):
                output = self._model(ids, past_key_values=self._cache, use_cache=True, logits_to_keep=1)
                ids = output.logits[:, -1:].argmax(-1)
            return time.perf_counter() - began_s

    def _ids(self, batch: int, num_tokens: int):  # type: ignore[no-untyped-def]
        torch = self._torch
        rows = torch.arange(batch).unsqueeze(1) * 7 + torch.arange(num_tokens) * 13 + 5
        return rows % self._vocab_size


def read_bandwidth(num_threads: int) -> float:
    """Bytes per second at which this machine's memory can be read by so many threads: the best of ten passes, since a
    limit is what nothing disturbed. Summing integers costs less than a core's reads; loads alone are no faster."""
    import torch

    torch.set_num_threads(num_threads)
    data = torch.ones(_BANDWIDTH_BYTES // 8, dtype=torch.int64)
    seconds = []
    for _ in range(10):
        began_s = time.perf_counter()
        data.sum()
        seconds.append(time.perf_counter() - began_s)
    return _BANDWIDTH_BYTES / min(seconds)


def read_files(paths: Sequence[str], *, keep: bool) -> float:
    """Seconds that it takes to read the files' bytes one after another: each file into new memory, as whoever wants to
    keep them must, or all into one small buffer."""
    import numpy as np

    began_s = time.perf_counter()
    buffer = memoryview(bytearray(_BUFFER_BYTES))
    for path in paths:
        with open(path, "rb", buffering=0) as file:
            if keep:
                left = memoryview(np.empty(os.path.getsize(path), dtype=np.uint8).data)
                while left:
                    left = left[file.readinto(left) :]
            else:
                while file.readinto(buffer):
                    pass
    return time.perf_counter() - began_s


class Child:
    """The parent's end of a child that runs the command: one method a request."""

    def __init__(
        self, name: str, command: Sequence[str], environment: Mapping[str, str], *, cpus: Sequence[int] = ()
    ) -> None:
        """`cpus`: that it is pinned to, on Linux."""
        self.name = name
        with ExitStack() as stack:
            process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment, text=True
            )
            self._process = stack.enter_context(process)
            stack.callback(self._process.kill)
            if cpus:  # long before it has more than one thread
                os.sched_setaffinity(process.pid, cpus)
            self.ask("load")
            self._stack = stack.pop_all()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()

    def prefill(self, request: Prefill) -> float:
        return float(self.ask("prefill", **asdict(request)))

    def decode(self, request: Decode) -> float:
        return float(self.ask("decode", **asdict(request)))

    def ask(self, what: str, **request: Any) -> Any:
        """What the child answers. Raises EngineError when it ended instead."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            print(json.dumps({what: request}), file=self._process.stdin, flush=True)
            line = self._process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            code = self._process.wait()
            raise EngineError(f"{self.name} ended with {code} while it was asked to {what}; see its messages above.")
        return json.loads(line)["value"]


class ChildSystem(Child):
    """`tllm`, `transformers` or `memory`."""

    def __init__(
        self,
        name: str,
        model: Path,
        dtype: DType,
        num_threads: int,
        quantization: Quantization | None = None,
        *,
        cpus: Sequence[int] = (),
    ) -> None:
        form = str(quantization) if quantization else _PLAIN
        command = [sys.executable, "-m", "tllm.lab.system", name, str(model), dtype, form, str(num_threads)]
        environment = worker_environment(num_threads) if name == "tllm" else dict(os.environ)
        super().__init__(name, command, environment, cpus=cpus)

    def bandwidth(self, num_threads: int) -> float:
        return float(self.ask("bandwidth", num_threads=num_threads))

    def load_again(self) -> float:
        return float(self.ask("load_again"))

    def step_bytes(self) -> int:
        return int(self.ask("step_bytes"))

    def profile(self, request: Decode) -> list[Part]:
        from tllm.lab.inside import Part

        return [Part(**part) for part in self.ask("profile", **asdict(request))]


def main() -> None:
    """The child: load, answer `load`, then one line for one line until stdin ends."""
    name, model, dtype, form, threads = sys.argv[1:]
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w", buffering=1)
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # libraries print; the parent reads only answers
    num_threads = int(threads)
    system: System | None
    match name:
        case "tllm":
            quantization = None if form == _PLAIN else Quantization.parse(form)
            system = TllmSystem(Path(model), DType(dtype), quantization, num_threads)
        case "transformers":
            system = TransformersSystem(Path(model), DType(dtype), num_threads)
        case "memory":
            system = None
        case _:
            raise ValueError(f"there is no system {name!r}")
    for line in sys.stdin:
        ((what, request),) = json.loads(line).items()
        value: object
        match what, system:
            case "load", _:
                value = 0.0
            case "bandwidth", _:
                value = read_bandwidth(**request)
            case "read_files", _:
                value = read_files(**request)
            case "prefill", TllmSystem() | TransformersSystem():
                value = system.prefill(Prefill(**request))
            case "decode", TllmSystem() | TransformersSystem():
                value = system.decode(Decode(**request))
            case "load_again", TllmSystem():
                value = system.load_again()
            case "step_bytes", TllmSystem():
                value = system.step_bytes()
            case "profile", TllmSystem():
                value = [asdict(part) for part in system.profile(Decode(**request))]
            case _:
                raise ValueError(f"{name} has no measurement {what!r}")
        print(json.dumps({"value": value}), file=answers)


if __name__ == "__main__":
    main()
