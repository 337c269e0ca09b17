"""The torch engine: one shard on a CPU, a CUDA device or MPS.

It validates a step as a whole before it computes any of it, so a malformed chunk harms nobody's KV; reads rows of
hidden states or embeds tokens; runs the decoder; and, with the head, samples and scores just the rows that ask for it.

T rows, M hidden size, R rows projected, V vocabulary. This file does not know processes, links or sequences' lives.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor

from tllm.core.errors import ConfigError, EngineError
from tllm.core.types import Activation, Codec, Sampled, Score, Scored, SequenceFailed, Step, StepResult
from tllm.engines.base import EngineConfig, EngineStatistics
from tllm.engines.packing import BlockLedger, PackedChunk, PackedStep, pack
from tllm.engines.torch import sampler
from tllm.engines.torch.attention import kernel_for
from tllm.engines.torch.decoder import Decoder, DecoderWeights
from tllm.engines.torch.kernels import build as kernels
from tllm.engines.torch.kernels.attention import KernelSelfAttention
from tllm.engines.torch.kernels.rows import KernelRows
from tllm.engines.torch.kv import KVCache
from tllm.engines.torch.loader import keep, load_weights, missing, no_weights
from tllm.engines.torch.memory import free_bytes, give_back
from tllm.engines.torch.reading import TORCH_DTYPES
from tllm.engines.torch.self_attention import SelfAttention, TorchSelfAttention
from tllm.models.checkpoint import Checkpoint
from tllm.models.slicing import weight_bytes
from tllm.models.spec import LearnedPositions, ModelSpec, Shard

_ROWS_SCORED_AT_ONCE = 64  # 64 rows x 128k vocabulary x 4 bytes = 33 MB of logits


class TorchEngine:
    """Implements `tllm.engines.base.Engine`. Raises ConfigError when made for a device that is not there."""

    def __init__(self, config: EngineConfig) -> None:
        _check_ranks(config.shard)
        self._config = config
        self._shard = config.shard
        self._device = _device(config.device)
        self._dtype = TORCH_DTYPES[config.dtype]
        self._library = kernels.library() if self._device.type == "cpu" else None
        self._kernel_rows = None if self._library is None else KernelRows(self._library)
        self._spec: ModelSpec | None = None
        self._fingerprint = ""
        self._weights: DecoderWeights | None = None
        self._decoder: Decoder | None = None
        self._kv: KVCache | None = None
        self._ledger: BlockLedger | None = None
        self._max_positions = 0
        self._read_bytes = 0
        self._num_steps = 0
        self._num_tokens = 0

    def load(self, checkpoint: Checkpoint, progress: Callable[[int, int], None]) -> None:
        if self._config.num_threads is not None:
            torch.set_num_threads(self._config.num_threads)
        spec = checkpoint.spec
        self._max_positions = self._config.max_positions or spec.max_positions
        if isinstance(spec.positions, LearnedPositions) and self._max_positions > spec.positions.num_positions:
            raise EngineError(
                f"{self._max_positions} positions were asked for, but the model learned {spec.positions.num_positions}"
            )
        if self._config.quantization is not None:
            checkpoint.check_quantization(self._config.quantization)
        self._fingerprint = checkpoint.fingerprint
        self._become(checkpoint, self._shard, no_weights(spec), progress)

    def reload(self, checkpoint: Checkpoint, shard: Shard, progress: Callable[[int, int], None]) -> None:
        if self._weights is None:
            raise EngineError("the engine has no weights: load comes before reload")
        if checkpoint.fingerprint != self._fingerprint:
            raise EngineError(
                f"the engine holds another checkpoint than the one in {checkpoint.directory}; "
                "close it and make a new one"
            )
        _check_ranks(shard)
        kept = keep(self._weights, shard)
        self._drop()
        self._become(checkpoint, shard, kept, progress)

    def _become(
        self, checkpoint: Checkpoint, shard: Shard, kept: DecoderWeights, progress: Callable[[int, int], None]
    ) -> None:
        wanted = missing(checkpoint, shard, kept)
        needed = weight_bytes(wanted, self._config.dtype, self._config.quantization)
        free = self.free_bytes()
        if needed > free:
            raise EngineError(f"the shard's weights take {needed} bytes, but {self._device} has {free} left")
        with torch.inference_mode(), _as_engine_errors():
            weights = load_weights(
                checkpoint,
                shard,
                self._config.dtype,
                self._device,
                progress,
                quantization=self._config.quantization,
                kept=kept,
                library=self._library,
            )
            decoder = Decoder(checkpoint.spec, weights, self._attention(checkpoint.spec, shard), self._device)
        self._spec, self._shard, self._weights, self._decoder = checkpoint.spec, shard, weights, decoder
        self._read_bytes += sum(piece.num_bytes for piece in wanted)

    def _attention(self, spec: ModelSpec, shard: Shard) -> SelfAttention:
        if self._library is not None:
            return KernelSelfAttention(spec, shard.layers, self._library, self._max_positions)
        return TorchSelfAttention(spec, shard.layers, self._device, kernel_for(self._device), self._max_positions)

    def free_bytes(self) -> int:
        return free_bytes(self._device)

    def allocate(self, num_blocks: int, block_size: int) -> None:
        if self._spec is None:
            raise EngineError("the engine has no weights: load comes before allocate")
        if num_blocks < 1 or block_size < 1:
            raise EngineError(f"{num_blocks} blocks of {block_size} positions were asked for; both must be at least 1")
        self._kv, self._ledger = None, None  # first give back, then take
        per_position = self._spec.kv_bytes_per_position(len(self._shard.layers), self._config.dtype)
        needed, free = num_blocks * block_size * per_position, self.free_bytes()
        if needed > free:
            raise EngineError(
                f"{num_blocks} blocks of {block_size} positions take {needed} bytes, but {self._device} has {free} left"
            )
        with torch.inference_mode(), _as_engine_errors():
            self._kv = KVCache(
                self._shard.layers,
                num_kv_heads=self._spec.num_kv_heads,
                head_dim=self._spec.head_dim,
                num_blocks=num_blocks,
                block_size=block_size,
                dtype=self._dtype,
                device=self._device,
            )
        self._ledger = BlockLedger(num_blocks, block_size)

    def forward(self, step: Step, hidden: Activation | None) -> Activation | StepResult:
        if self._spec is None or self._decoder is None or self._kv is None or self._ledger is None:
            raise EngineError("the engine is not ready: load and allocate come before forward")
        packed = pack(
            step,
            num_blocks=self._kv.num_blocks,
            block_size=self._kv.block_size,
            vocab_size=self._spec.vocab_size,
            max_positions=self._max_positions,
        )
        shape = (packed.num_rows, self._spec.hidden_size)
        self._check_hidden(hidden, shape)
        with self._ledger.writing(packed), torch.inference_mode(), _as_engine_errors():
            self._kv.copy(packed.copies)
            if packed.num_rows == 0:
                x_TM = torch.empty(shape, dtype=self._dtype, device=self._device)
            else:
                x_TM = self._decoder.embed(packed) if hidden is None else self._from_wire(hidden)
                x_TM = self._decoder.layers(x_TM, packed, self._kv)
            answer = self._results(step, packed, x_TM) if self._shard.head else self._to_wire(x_TM)
        self._num_steps += 1
        self._num_tokens += packed.num_rows
        return answer

    def statistics(self) -> EngineStatistics:
        return EngineStatistics(
            weight_bytes=0 if self._weights is None else self._weights.num_bytes,
            read_bytes=self._read_bytes,
            kv_bytes=0 if self._kv is None else self._kv.num_bytes,
            num_blocks=0 if self._kv is None else self._kv.num_blocks,
            num_steps=self._num_steps,
            num_tokens=self._num_tokens,
        )

    def close(self) -> None:
        self._drop()

    def _drop(self) -> None:
        """All memory that nobody else holds goes back to the machine."""
        self._spec = self._weights = self._decoder = self._kv = self._ledger = None
        give_back(self._device)

    def _results(self, step: Step, packed: PackedStep, x_TM: Tensor) -> StepResult:
        assert self._decoder is not None
        scored, failed = [], []
        for chunk in packed.scored:
            if torch.isfinite(x_TM[chunk.first_row : chunk.first_row + chunk.num_rows]).all():
                scored.append(self._score(chunk, x_TM))
            else:
                failed.append(SequenceFailed(seq=chunk.chunk.seq, reason="its hidden states are not finite"))
        lost = {failure.seq for failure in failed}
        sampling = [chunk for chunk in packed.sampled if chunk.chunk.seq not in lost]
        sampled: list[Sampled] = []
        if sampling:
            rows = torch.tensor([chunk.rows[-1] for chunk in sampling], device=self._device)
            states = [chunk.chunk.sampling for chunk in sampling if chunk.chunk.sampling is not None]
            logits_RV = self._decoder.logits(x_TM.index_select(0, rows))
            seqs = [chunk.chunk.seq for chunk in sampling]
            sampled, not_sampled = sampler.sample(logits_RV, states, seqs, self._kernel_rows)
            failed += not_sampled
        return StepResult(
            step=step.id, epoch=step.epoch, sampled=tuple(sampled), scored=tuple(scored), failed=tuple(failed)
        )

    def _score(self, chunk: PackedChunk, x_TM: Tensor) -> Scored:
        assert self._decoder is not None
        assert chunk.chunk.scoring is not None
        targets, top = chunk.chunk.scoring.targets, chunk.chunk.scoring.top
        scores: list[Score] = []
        for first in range(0, len(targets), _ROWS_SCORED_AT_ONCE):
            some = targets[first : first + _ROWS_SCORED_AT_ONCE]
            rows = x_TM.narrow(0, chunk.first_row + first, len(some))
            scores.extend(sampler.score(self._decoder.logits(rows), some, top, self._kernel_rows))
        return Scored(seq=chunk.chunk.seq, start=chunk.start, scores=tuple(scores))

    def _check_hidden(self, hidden: Activation | None, shape: tuple[int, int]) -> None:
        if self._shard.embed:
            if hidden is not None:
                raise EngineError("the shard embeds tokens itself, but was given hidden states")
            return
        if hidden is None:
            raise EngineError("the shard does not embed tokens and was given no hidden states")
        if hidden.shape != shape or hidden.dtype is not self._config.dtype or hidden.codec is not Codec.RAW:
            raise EngineError(
                f"hidden states are {hidden.codec} {hidden.dtype} {hidden.shape}; "
                f"this step needs raw {self._config.dtype} {shape}"
            )
        num_bytes = shape[0] * shape[1] * hidden.dtype.num_bytes
        if memoryview(hidden.data).nbytes != num_bytes:
            raise EngineError(f"hidden states have {memoryview(hidden.data).nbytes} bytes instead of {num_bytes}")

    def _from_wire(self, hidden: Activation) -> Tensor:
        """A copy of our own: the sender's bytes may be read-only, and aligned anyhow."""
        x_TM = torch.empty(hidden.shape, dtype=self._dtype)
        x_TM.view(-1).view(torch.uint8).numpy()[:] = np.frombuffer(hidden.data, dtype=np.uint8)
        return x_TM.to(self._device)

    def _to_wire(self, x_TM: Tensor) -> Activation:
        """No copy on a CPU: the bytes belong to the tensor, which nobody else holds."""
        array = x_TM.contiguous().cpu().view(-1).view(torch.uint8).numpy()
        return Activation(data=array.data, dtype=self._config.dtype, shape=(x_TM.shape[0], x_TM.shape[1]))


def _check_ranks(shard: Shard) -> None:
    if shard.ranks != 1:
        raise EngineError(
            f"the shard is rank {shard.rank} of {shard.ranks}, "
            "but the torch engine computes whole layers only; plan one rank per stage"
        )


def _device(name: str) -> torch.device:
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ConfigError(f"torch does not know the device {name!r}; use cpu, cuda, cuda:1 or mps") from error
    match device.type:
        case "cpu":
            return device
        case "cuda" if torch.cuda.is_available() and (device.index or 0) < torch.cuda.device_count():
            return device
        case "mps" if torch.backends.mps.is_available():
            return device
        case _:
            raise ConfigError(f"this machine's torch {torch.__version__} cannot use the device {name!r}; cpu always is")


@contextmanager
def _as_engine_errors() -> Iterator[None]:
    """torch speaks of lack of memory and of failing kernels by RuntimeError alone."""
    try:
        yield
    except RuntimeError as error:
        raise EngineError(f"torch failed: {error}") from error
