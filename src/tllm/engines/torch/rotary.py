"""Rotary positions applied: the angles of a step's rows, and the turning of heads by them.

Angles, cosines, sines and products are in fp32 whatever the model's type. The rotated pairs are (x[i], x[i + dim/2]).

T rows, H heads, D head_dim. This file does not know which scaling a checkpoint has; `tllm.models.rope` does.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tllm.models.rope import inverse_frequencies
from tllm.models.spec import Rope


class Rotary:
    """The frequencies of one model, resolved for texts of at most `sequence_length` positions."""

    def __init__(self, rope: Rope, sequence_length: int, device: torch.device) -> None:
        frequencies, self._attention_factor = inverse_frequencies(rope, sequence_length)
        self._frequencies = torch.tensor(frequencies, dtype=torch.float32, device=device)
        self._half = rope.dim // 2

    def angles(self, positions_T: Tensor) -> tuple[Tensor, Tensor]:
        """Cosines and sines (T, 1, dim / 2) of these positions, once per step."""
        angles = torch.outer(positions_T.float(), self._frequencies).unsqueeze(1)
        return angles.cos() * self._attention_factor, angles.sin() * self._attention_factor

    def turn_(self, x_THD: Tensor, angles: tuple[Tensor, Tensor]) -> None:
        """Rotate the first `dim` elements of each head, in place."""
        cos, sin = angles
        rotated = x_THD.narrow(2, 0, 2 * self._half)
        first, second = rotated.float().chunk(2, dim=-1)
        # In fp32 the halves are views of `x`: both results before either is written.
        new_first = (first * cos).addcmul_(second, sin, value=-1)
        new_second = (second * cos).addcmul_(first, sin)
        rotated[..., : self._half] = new_first
        rotated[..., self._half :] = new_second
