"""The model under test, as parameters of an experiment name it, and prompts for it.

This file does not know what is done with the model.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tllm.cluster.machine import num_processors
from tllm.core.config import EMBEDDED_MODEL
from tllm.core.errors import ConfigError
from tllm.core.types import DType, Quantization, TokenId
from tllm.lab.experiment import Parameters
from tllm.lab.models import PRESETS, find_model
from tllm.lab.record import Setting
from tllm.lab.system import ChildSystem
from tllm.models.checkpoint import Checkpoint

_CACHE = Path("/sys/devices/system/cpu/cpu0/cache")
_USUAL_CACHE_BYTES = 64 << 20
_UNITS = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}


@dataclass(frozen=True, slots=True, kw_only=True)
class Subject:
    """A model, the form its weights are held in, and the threads that compute it."""

    name: str  # whatever `tllm serve` takes, or a preset
    dtype: DType | None  # None: the checkpoint's own, of a preset float32
    quantization: Quantization | None
    num_threads: int

    def directory(self) -> Path:
        """Where it lies; a preset is made first if it has to be. Raises ModelError."""
        return find_model(self.name, dtype=self.dtype)

    def directory_for(self, num_positions: int) -> Path:
        """The same. Raises ConfigError as well, where the model's context is shorter than that."""
        directory = self.directory()
        most = Checkpoint.open(directory).spec.max_positions
        if num_positions > most:
            raise ConfigError(
                f"Prompt and answer have {num_positions} tokens together, but the context of {self.name} is {most}. "
                "Set fewer prompt_tokens or tokens."
            )
        return directory

    @property
    def served_dtype(self) -> DType:
        """Of KV, activations and weights that are not quantized."""
        if self.dtype is not None:
            return self.dtype
        return DType.FLOAT32 if self.name in PRESETS else Checkpoint.open(self.directory()).dtype

    @property
    def settings(self) -> dict[str, Setting]:
        """As records keep them."""
        return {
            "model": self.name,
            "dtype": self.served_dtype.value,
            "quantize": str(self.quantization or ""),
            "threads": self.num_threads,
        }

    @property
    def title(self) -> str:
        form = f", weights {self.quantization}" if self.quantization else ""
        random_weights = ", random weights" if self.name in PRESETS else ""
        return f"{self.name} @ {self.served_dtype}{form}{random_weights}"


def take_subject(parameters: Parameters, *, num_threads: int | None = None) -> Subject:
    """`model`, `dtype`, `quantize` and `threads` of an experiment; as many as there are processors by default."""
    name = parameters.text("model", EMBEDDED_MODEL)
    dtype = parameters.optional_text("dtype")
    if dtype is not None and dtype not in tuple(DType):
        raise ConfigError(f"dtype is {dtype!r}; it must be one of {', '.join(DType)}.")
    quantize = parameters.optional_text("quantize")
    return Subject(
        name=name,
        dtype=None if dtype is None else DType(dtype),
        quantization=None if quantize is None else Quantization.parse(quantize),
        num_threads=parameters.count("threads", num_threads or num_processors()),
    )


def random_prompts(seed: int, *, number: int, num_tokens: int, vocab_size: int) -> tuple[tuple[TokenId, ...], ...]:
    """Drawn token by token; the same for the same seed."""
    generator = random.Random(seed)
    return tuple(tuple(TokenId(generator.randrange(vocab_size)) for _ in range(num_tokens)) for _ in range(number))


@contextmanager
def memory_reader(directory: Path, num_threads: int) -> Iterator[ChildSystem]:
    """A process that can say how fast this machine's memory is read."""
    with ChildSystem("memory", directory, DType.FLOAT32, num_threads) as reader:
        yield reader


def exceeds_caches(num_bytes: int) -> bool:
    """Whether something of this size is read from memory every time, so that memory's speed is a limit."""
    return num_bytes > 2 * _cache_bytes()


def _cache_bytes() -> int:
    """The processor's largest cache; a usual size where the system does not tell."""
    sizes = [path.read_text().strip() for path in _CACHE.glob("index*/size")]
    known = [int(size[:-1]) * _UNITS[size[-1]] for size in sizes if size[:-1].isdecimal() and size[-1] in _UNITS]
    return max(known, default=_USUAL_CACHE_BYTES)
