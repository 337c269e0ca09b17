"""A system under test in a process of its own, so that several can be loaded and measured in turns.

    parent ──{"prefill": {...}}──▶ child
           ◀──{"seconds": ...}────

`python -m tllm.lab.system NAME MODEL DTYPE THREADS` reads one JSON request a line and answers each with one line.
NAME is `tllm`, the torch engine alone, or `transformers`, the peer that everybody has.

This file does not know HTTP, nor what the figures are compared with.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from tllm.cluster.process import worker_environment
from tllm.core.errors import EngineError
from tllm.core.types import (
    BlockId,
    Chunk,
    DType,
    Epoch,
    SamplingParams,
    SamplingState,
    SequenceId,
    Step,
    StepId,
    StepResult,
    TokenId,
)
from tllm.engines.base import Engine, EngineConfig
from tllm.models.checkpoint import Checkpoint
from tllm.models.spec import Shard

if TYPE_CHECKING:
    from types import TracebackType

_BLOCK_SIZE = 64
_BANDWIDTH_BYTES = 1 << 30  # far beyond any cache
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
    """What both systems can do; seconds of wall time."""

    def prefill(self, request: Prefill) -> float: ...

    def decode(self, request: Decode) -> float: ...


class TllmSystem:
    """The torch engine with the whole model as one shard, fed with steps by hand."""

    def __init__(self, model: Path, dtype: DType, num_threads: int) -> None:
        from tllm.engines.torch.engine import TorchEngine

        checkpoint = Checkpoint.open(model)
        self._vocab_size = checkpoint.spec.vocab_size
        shard = Shard(first_layer=0, last_layer=checkpoint.spec.num_layers, embed=True, head=True)
        self._engine: Engine = TorchEngine(EngineConfig(shard=shard, dtype=dtype, num_threads=num_threads))
        self._engine.load(checkpoint, lambda done, total: None)
        self._num_steps = 0

    def prefill(self, request: Prefill) -> float:
        self._allocate(1, request.num_tokens)
        began_s = time.perf_counter()
        self._step([self._chunk(0, 0, request.num_tokens, request.num_tokens)])
        return time.perf_counter() - began_s

    def decode(self, request: Decode) -> float:
        total = request.context + request.num_steps + 1
        self._allocate(request.batch, total)
        for seq in range(request.batch):
            self._step([self._chunk(seq, 0, request.context, total)])
        began_s = time.perf_counter()
        for position in range(request.context, request.context + request.num_steps):
            self._step([self._chunk(seq, position, 1, total) for seq in range(request.batch)])
        return time.perf_counter() - began_s

    def _allocate(self, num_sequences: int, num_positions: int) -> None:
        self._engine.allocate(num_sequences * -(-num_positions // _BLOCK_SIZE), _BLOCK_SIZE)

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

    def prefill(self, request: Prefill) -> float:
        with self._torch.inference_mode():
            ids = self._ids(1, request.num_tokens)
            began_s = time.perf_counter()
            self._model(ids, use_cache=True, logits_to_keep=1).logits.argmax(-1)
            return time.perf_counter() - began_s

    def decode(self, request: Decode) -> float:
        with self._torch.inference_mode():
            output = self._model(self._ids(request.batch, request.context), use_cache=True, logits_to_keep=1)
            began_s = time.perf_counter()
            for _ in range(request.num_steps):
                ids = output.logits[:, -1:].argmax(-1)
                output = self._model(ids, past_key_values=output.past_key_values, use_cache=True, logits_to_keep=1)
            return time.perf_counter() - began_s

    def _ids(self, batch: int, num_tokens: int):  # type: ignore[no-untyped-def]
        torch = self._torch
        rows = torch.arange(batch).unsqueeze(1) * 7 + torch.arange(num_tokens) * 13 + 5
        return rows % self._vocab_size


def read_bandwidth(num_threads: int) -> float:
    """Bytes per second at which this machine's memory can be read by so many threads: the best of ten passes, since a
    limit is what nothing disturbed."""
    import torch

    torch.set_num_threads(num_threads)
    data = torch.ones(_BANDWIDTH_BYTES // 4)
    seconds = []
    for _ in range(10):
        began_s = time.perf_counter()
        data.sum()
        seconds.append(time.perf_counter() - began_s)
    return _BANDWIDTH_BYTES / min(seconds)


_SYSTEMS: dict[str, Callable[[Path, DType, int], System]] = {
    "tllm": TllmSystem,
    "transformers": TransformersSystem,
}


class ChildSystem:
    """The parent's end: the same methods, each carried out by the child."""

    def __init__(self, name: str, model: Path, dtype: DType, num_threads: int) -> None:
        self.name = name
        command = [sys.executable, "-m", "tllm.lab.system", name, str(model), dtype, str(num_threads)]
        environment = worker_environment(num_threads) if name == "tllm" else dict(os.environ)
        with ExitStack() as stack:
            process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment, text=True
            )
            self._process = stack.enter_context(process)
            stack.callback(self._process.kill)
            self._ask("load", {})
            self._stack = stack.pop_all()

    def __enter__(self) -> ChildSystem:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()

    def prefill(self, request: Prefill) -> float:
        return self._ask("prefill", {"num_tokens": request.num_tokens})

    def decode(self, request: Decode) -> float:
        return self._ask("decode", {"batch": request.batch, "context": request.context, "num_steps": request.num_steps})

    def bandwidth(self, num_threads: int) -> float:
        return self._ask("bandwidth", {"num_threads": num_threads})

    def _ask(self, what: str, request: dict[str, int]) -> float:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        print(json.dumps({what: request}), file=self._process.stdin, flush=True)
        line = self._process.stdout.readline()
        if not line:
            raise EngineError(f"{self.name} ended while it was asked to {what}; see its messages above.")
        return float(json.loads(line)["value"])


def main() -> None:
    """The child: load, answer `load`, then one line for one line until stdin ends."""
    name, model, dtype, num_threads = sys.argv[1:]
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w", buffering=1)
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # libraries print; the parent reads only answers
    system = _SYSTEMS[name](Path(model), DType(dtype), int(num_threads))
    for line in sys.stdin:
        ((what, request),) = json.loads(line).items()
        match what:
            case "load":
                value = 0.0
            case "prefill":
                value = system.prefill(Prefill(**request))
            case "decode":
                value = system.decode(Decode(**request))
            case "bandwidth":
                value = read_bandwidth(**request)
            case _:
                raise ValueError(f"there is no measurement {what!r}")
        print(json.dumps({"value": value}), file=answers)


if __name__ == "__main__":
    main()
