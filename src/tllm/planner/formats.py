"""What a weight takes in the formats that are in use, scales and offsets included.

    bits per weight = bits of a code + (bits of a scale + bits of an offset) / numbers that share them

Embedding and head often have more bits than the matrices between them; norms and biases are never made smaller.

This file does not know tensors, nor who can compute with which format.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final

from tllm.core.errors import ConfigError
from tllm.core.types import Quantization


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightFormat:
    """Bits that a weight takes, scales and offsets included: of the layers' matrices, of embedding and head, and of
    all else, which no format makes smaller."""

    name: str
    matrix_bits: float
    end_bits: float
    plain_bits: float = 16

    def num_bytes(self, *, matrices: int = 0, ends: int = 0, plain: int = 0) -> int:
        bits = matrices * self.matrix_bits + ends * self.end_bits + plain * self.plain_bits
        return math.ceil(bits / 8)

    @property
    def bytes_per_weight(self) -> float:
        """Of the layers' matrices."""
        return self.matrix_bits / 8

    @classmethod
    def of(cls, quantization: Quantization) -> WeightFormat:
        """How tllm itself holds weights that it quantizes: see `models.slicing.held_format`."""
        return cls(name=str(quantization), matrix_bits=_own_bits(quantization), end_bits=_own_bits(_INT8))


def grouped_bits(bits: float, group: int, *, scale_bits: int, offset_bits: int = 0) -> float:
    """Bits of one number where every `group` of them share a scale, and perhaps an offset."""
    return bits + (scale_bits + offset_bits) / group


def _own_bits(quantization: Quantization) -> float:
    offset_bits = 16 if quantization.bits == 4 else 0
    return grouped_bits(quantization.bits, quantization.group, scale_bits=16, offset_bits=offset_bits)


_INT8: Final = Quantization.parse("int8")


def _alike(name: str, bits: float) -> WeightFormat:
    return WeightFormat(name=name, matrix_bits=bits, end_bits=bits, plain_bits=max(bits, 16))


FORMATS: Final = {
    each.name: each
    for each in (
        _alike("fp32", 32),
        _alike("bf16", 16),
        _alike("fp16", 16),
        *(WeightFormat.of(Quantization.parse(text)) for text in ("int8", "int4", "int4-g32", "int4-g64", "int4-g128")),
        WeightFormat(name="fp8", matrix_bits=8, end_bits=16),  # one scale for a matrix; ends are left as they are
        _alike("q8_0", grouped_bits(8, 32, scale_bits=16)),  # GGUF
        _alike("q4_0", grouped_bits(4, 32, scale_bits=16)),
        _alike("mlx-4bit", grouped_bits(4, 64, scale_bits=16, offset_bits=16)),
        WeightFormat(name="mxfp4", matrix_bits=grouped_bits(4, 32, scale_bits=8), end_bits=16),  # OCP microscaling
    )
}


def parse_format(text: str) -> WeightFormat:
    """Raises ConfigError."""
    if text not in FORMATS:
        raise ConfigError(f"{text!r} is no format of weights; there are {', '.join(FORMATS)}.")
    return FORMATS[text]
