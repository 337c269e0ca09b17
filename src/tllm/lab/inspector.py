"""Looks into an answer: the model in this process, its steps made by hand and timed, their logits kept.

One or several stages run in a row, so a stage's seconds are its own and no link is between them. Times are those of a
run that nobody looks into; logits are kept in a second one, which must choose the same tokens.

`python -m tllm.lab.inspector MODEL DTYPE QUANTIZATION THREADS STAGES` is a child of the lab, as `system.py` has them.

This file does not know experiments, records, or other machines.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tllm.cluster.measure import measure_speed
from tllm.cluster.process import worker_environment
from tllm.core.errors import ConfigError, EngineError
from tllm.core.types import (
    Activation,
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
from tllm.lab.inspection import Answered, Candidate, Phases, StagePart, StepView
from tllm.lab.system import Child
from tllm.models.checkpoint import Checkpoint
from tllm.models.spec import Shard
from tllm.planner.profile import Speed
from tllm.text.tokenizer import Tokenizer
from tllm.transport import wire_pb2 as pb

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from tllm.engines.torch.engine import TorchEngine

_BLOCK_SIZE = 64
_PLAIN = "plain"  # weights as the checkpoint has them
_GREEDY = SamplingParams(temperature=0.0, max_tokens=1)
_SEQUENCE = SequenceId(0)


class Inspector:
    """A model in this process, cut evenly by layers into `num_stages` stages.

    Raises ConfigError for more stages than layers, and what loading raises.
    """

    def __init__(
        self,
        model: Path,
        *,
        dtype: DType,
        quantization: Quantization | None = None,
        num_threads: int,
        num_stages: int = 1,
    ) -> None:
        self._model = model
        self._checkpoint = Checkpoint.open(model)
        self._tokenizer = Tokenizer.load(model)
        self._shards = even_stages(self._checkpoint.spec.num_layers, num_stages)
        self._dtype, self._quantization, self._num_threads = dtype, quantization, num_threads
        self._engines = self._loaded()
        self._num_steps = 0

    def prompt_ids(self, prompt: str) -> tuple[TokenId, ...]:
        return self._tokenizer.encode(prompt, add_special_tokens=True)

    def phases(self, prompt: str, num_tokens: int) -> Phases:
        """One answer of exactly `num_tokens` tokens, for which model and tokenizer are read anew, the model into memory
        of its own."""
        began_s = time.perf_counter()
        engines = self._loaded()
        load_model_s = time.perf_counter() - began_s
        for engine in engines:
            engine.close()
        began_s = time.perf_counter()
        Tokenizer.load(self._model)
        load_tokenizer_s = time.perf_counter() - began_s
        began_s = time.perf_counter()
        ids = self.prompt_ids(prompt)
        tokenize_s = time.perf_counter() - began_s
        answered = self.answer(ids, num_tokens)
        return Phases(
            load_model_s=load_model_s,
            load_tokenizer_s=load_tokenizer_s,
            tokenize_s=tokenize_s,
            num_prompt_tokens=len(ids),
            answered=answered,
            text=self._text(answered.tokens),
        )

    def answer(self, ids: Sequence[int], num_tokens: int) -> Answered:
        """One answer of exactly `num_tokens` tokens."""
        tokens, steps_s, _ = self._run(ids, num_tokens)
        return Answered(tokens=tokens, steps_s=steps_s)

    def inspect(self, ids: Sequence[int], num_tokens: int, *, num_candidates: int = 5) -> tuple[StepView, ...]:
        """Every step of the greedy answer of `num_tokens` tokens to `ids`; as many steps as tokens."""
        from tllm.lab.inside import kept_logits

        tokens, steps_s, sent_bytes = self._run(ids, num_tokens)
        with kept_logits(self._engines[-1]) as kept:
            again, _, _ = self._run(ids, num_tokens)
        if again != tokens:
            raise EngineError(f"The engine answered one prompt in two ways: {tokens}, then {again}.")
        spec = self._checkpoint.spec
        views = []
        for number, (logits, token) in enumerate(zip(kept, tokens, strict=True)):
            num_positions = len(ids) + number
            held = [self._kv_bytes(stage, num_positions) for stage in range(len(self._shards))]
            num_rows, vocab_size = logits.shape
            probabilities = _softmax(logits[-1].cpu().numpy())
            views.append(
                StepView(
                    num_rows=1 if number else len(ids),
                    num_positions=num_positions,
                    kv_shape=(2, spec.num_kv_heads, num_positions, spec.head_dim),
                    kv_bytes=sum(held),
                    logits_shape=(num_rows, vocab_size),
                    candidates=tuple(
                        self._candidate(best, probabilities) for best in _largest(probabilities, num_candidates)
                    ),
                    chosen=self._candidate(token, probabilities),
                    stages=tuple(
                        StagePart(
                            first_layer=shard.first_layer,
                            last_layer=shard.last_layer,
                            seconds=seconds,
                            kv_bytes=kv_bytes,
                            sent_bytes=sent,
                        )
                        for shard, seconds, kv_bytes, sent in zip(
                            self._shards, steps_s[number], held, sent_bytes[number], strict=True
                        )
                    ),
                )
            )
        return tuple(views)

    def step_bytes(self) -> int:
        """Weights that a step reads on all stages, in the form they are held in."""
        from tllm.lab.inside import step_bytes

        return sum(step_bytes(engine) for engine in self._engines)

    def kv_bytes_per_position(self) -> int:
        """On all layers."""
        spec = self._checkpoint.spec
        return spec.kv_bytes_per_position(spec.num_layers, self._dtype)

    def speed(self) -> Speed:
        """Seconds of the model's parts in this process, as a planner wants them; takes some eight seconds."""
        from tllm.engines.torch.engine import TorchEngine

        order = pb.Measure(
            config=json.dumps(self._checkpoint.config),
            dtype=self._dtype,
            quantization=str(self._quantization or ""),
            device="cpu",
            num_threads=self._num_threads,
        )
        with tempfile.TemporaryDirectory(prefix="tllm-inspector-") as directory:
            return measure_speed(order, lambda _, config: TorchEngine(config), Path(directory))

    def close(self) -> None:
        for engine in self._engines:
            engine.close()

    def _loaded(self) -> tuple[TorchEngine, ...]:
        from tllm.engines.torch.engine import TorchEngine

        engines = []
        for shard in self._shards:
            config = EngineConfig(
                shard=shard, dtype=self._dtype, quantization=self._quantization, num_threads=self._num_threads
            )
            engine = TorchEngine(config)
            engine.load(self._checkpoint, lambda done, total: None)
            engines.append(engine)
        return tuple(engines)

    def _run(
        self, ids: Sequence[int], num_tokens: int
    ) -> tuple[tuple[int, ...], tuple[tuple[float, ...], ...], tuple[tuple[int, ...], ...]]:
        """Tokens; of every step and stage, seconds and bytes of hidden states for the next one."""
        num_blocks = -(-(len(ids) + num_tokens) // _BLOCK_SIZE)
        for engine in self._engines:
            engine.allocate(num_blocks, _BLOCK_SIZE)
        blocks = tuple(BlockId(block) for block in range(num_blocks))
        tokens: list[int] = []
        steps_s: list[tuple[float, ...]] = []
        sent_bytes: list[tuple[int, ...]] = []
        rows, start = [TokenId(token) for token in ids], 0
        while len(tokens) < num_tokens:
            stop = start + len(rows)
            chunk = Chunk(
                seq=_SEQUENCE,
                start=start,
                tokens=tuple(rows),
                blocks=blocks,
                sampling=SamplingState(params=_GREEDY, position=stop),
            )
            self._num_steps += 1
            step = Step(id=StepId(self._num_steps), epoch=Epoch(1), chunks=(chunk,))
            token, seconds, sent = self._step(step)
            tokens.append(token)
            steps_s.append(seconds)
            sent_bytes.append(sent)
            rows, start = [TokenId(token)], stop
        return tuple(tokens), tuple(steps_s), tuple(sent_bytes)

    def _step(self, step: Step) -> tuple[int, tuple[float, ...], tuple[int, ...]]:
        hidden: Activation | None = None
        seconds: list[float] = []
        sent: list[int] = []
        for engine in self._engines:
            began_s = time.perf_counter()
            answer = engine.forward(step, hidden)
            seconds.append(time.perf_counter() - began_s)
            if isinstance(answer, StepResult):
                if answer.failed or len(answer.sampled) != 1:
                    raise EngineError(f"the engine did not sample: {answer}")
                return answer.sampled[0].token, tuple(seconds), (*sent, 0)
            hidden = answer
            sent.append(len(hidden.data))
        raise AssertionError("the last stage has no head")

    def _kv_bytes(self, stage: int, num_positions: int) -> int:
        """Of the memory that the engine took, the part that so many positions fill."""
        held = self._engines[stage].statistics()
        return held.kv_bytes * num_positions // (held.num_blocks * _BLOCK_SIZE)

    def _text(self, tokens: Sequence[int]) -> str:
        return self._tokenizer.decode([TokenId(token) for token in tokens], skip_special_tokens=False)

    def _candidate(self, token: int, probabilities: NDArray[np.float64]) -> Candidate:
        text = self._text([token])
        return Candidate(token=token, text=text, probability=float(probabilities[token]))


class ChildInspector(Child):
    """An inspector in a process of its own, with the threads and the environment of a worker."""

    def __init__(
        self,
        model: Path,
        *,
        dtype: DType,
        quantization: Quantization | None = None,
        num_threads: int,
        num_stages: int = 1,
    ) -> None:
        form = str(quantization) if quantization else _PLAIN
        arguments = [str(model), dtype.value, form, str(num_threads), str(num_stages)]
        command = [sys.executable, "-m", "tllm.lab.inspector", *arguments]
        super().__init__("inspector", command, worker_environment(num_threads))

    def phases(self, prompt: str, num_tokens: int) -> Phases:
        found = self.ask("phases", prompt=prompt, num_tokens=num_tokens)
        return Phases(**found | {"answered": _answered(found["answered"])})

    def answer(self, ids: Sequence[int], num_tokens: int) -> Answered:
        return _answered(self.ask("answer", ids=list(ids), num_tokens=num_tokens))

    def inspect(self, ids: Sequence[int], num_tokens: int, *, num_candidates: int = 5) -> tuple[StepView, ...]:
        views = self.ask("inspect", ids=list(ids), num_tokens=num_tokens, num_candidates=num_candidates)
        return tuple(_view(view) for view in views)

    def prompt_ids(self, prompt: str) -> tuple[TokenId, ...]:
        return tuple(TokenId(token) for token in self.ask("prompt_ids", prompt=prompt))

    def step_bytes(self) -> int:
        return int(self.ask("step_bytes"))

    def speed(self) -> Speed:
        answer = self.ask("speed")
        return Speed(**answer | {name: tuple(answer[name]) for name in ("rows", "layer_s", "head_s")})

    def kv_bytes_per_position(self) -> int:
        return int(self.ask("kv_bytes_per_position"))

    def bandwidth(self, num_threads: int) -> float:
        """Bytes per second at which memory can be read."""
        return float(self.ask("bandwidth", num_threads=num_threads))


def _answered(fields: Mapping[str, Any]) -> Answered:
    return Answered(tokens=tuple(fields["tokens"]), steps_s=tuple(tuple(stages) for stages in fields["steps_s"]))


def _view(fields: Mapping[str, Any]) -> StepView:
    return StepView(
        num_rows=fields["num_rows"],
        num_positions=fields["num_positions"],
        kv_shape=_four(fields["kv_shape"]),
        kv_bytes=fields["kv_bytes"],
        logits_shape=(fields["logits_shape"][0], fields["logits_shape"][1]),
        candidates=tuple(Candidate(**each) for each in fields["candidates"]),
        chosen=Candidate(**fields["chosen"]),
        stages=tuple(StagePart(**each) for each in fields["stages"]),
    )


def _four(sizes: Iterable[int]) -> tuple[int, int, int, int]:
    two, heads, positions, size = sizes
    return two, heads, positions, size


def even_stages(num_layers: int, num_stages: int) -> tuple[Shard, ...]:
    """Runs of as many layers each, give or take one. Raises ConfigError for more stages than layers."""
    if not 1 <= num_stages <= num_layers:
        raise ConfigError(
            f"{num_layers} layers cannot be cut into {num_stages} stages; 1 to {num_layers} are possible."
        )
    stops = [num_layers * stage // num_stages for stage in range(num_stages + 1)]
    return tuple(
        Shard(first_layer=first, last_layer=last, embed=first == 0, head=last == num_layers)
        for first, last in pairwise(stops)
    )


def _softmax(logits: NDArray[np.float32]) -> NDArray[np.float64]:
    import numpy as np

    wide = np.exp(logits.astype(np.float64) - logits.max())
    probabilities: NDArray[np.float64] = wide / wide.sum()
    return probabilities


def _largest(probabilities: NDArray[np.float64], number: int) -> list[int]:
    """The first of equals goes before the others, as it does when a token is chosen."""
    import numpy as np

    return [int(token) for token in np.argsort(-probabilities, kind="stable")[:number]]


def main() -> None:
    """The child: load, then one line for one line until stdin ends."""
    model, dtype, form, threads, stages = sys.argv[1:]
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w", buffering=1)
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # libraries print; the parent reads only answers
    with ExitStack() as stack:
        inspector = Inspector(
            Path(model),
            dtype=DType(dtype),
            quantization=None if form == _PLAIN else Quantization.parse(form),
            num_threads=int(threads),
            num_stages=int(stages),
        )
        stack.callback(inspector.close)
        for line in sys.stdin:
            ((what, request),) = json.loads(line).items()
            print(json.dumps({"value": _answer(inspector, what, request)}), file=answers)


def _answer(inspector: Inspector, what: str, request: dict[str, Any]) -> object:
    match what:
        case "load":
            return 0.0
        case "bandwidth":
            from tllm.lab.system import read_bandwidth

            return read_bandwidth(**request)
        case "phases":
            return asdict(inspector.phases(**request))
        case "inspect":
            return [asdict(view) for view in inspector.inspect(**request)]
        case "answer":
            return asdict(inspector.answer(**request))
        case "prompt_ids":
            return list(inspector.prompt_ids(**request))
        case "step_bytes":
            return inspector.step_bytes()
        case "speed":
            return asdict(inspector.speed())
        case "kv_bytes_per_position":
            return inspector.kv_bytes_per_position()
        case _:
            raise ValueError(f"an inspector has no measurement {what!r}")


if __name__ == "__main__":
    main()
