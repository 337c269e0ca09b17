"""Linear layers: y = x W^T + b, and which of torch's kernels computes them where.

On a CPU the weight is kept only in oneDNN's own packed layout, which beats `F.linear` at every number of rows. Weights
of 8192 x 2048 streamed from memory (0.4 GB), two Zen 5 cores, torch 2.13, GB/s of weights at M <= 16, GFLOP/s above;
the cores can read 50 GB/s:

    rows M                    1     2     4     8    16 |   64   256   512
    bf16 F.linear          29.8  31.2  30.8  28.2  24.2 |  739   944   824
    bf16 packed            47.7  46.8  47.2  42.1  36.7 |  890   995  1000
    fp32 F.linear          23.3  10.9  11.4  11.3   9.1 |  123   178   206
    fp32 packed            51.8  35.2  35.2  29.3  22.6 |  350   471

The packed layout is opaque: an embedding needs its rows, so a table that is also the head stays plain.

Shapes: M rows, N outputs, K inputs. This file does not know models, files or which linear it is.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Protocol, assert_never

import torch
from torch import Tensor
from torch.nn import functional

from tllm.engines.torch.norm import Norm
from tllm.models.spec import ActivationKind

# One oneDNN weight holds at most that many bytes: packing needs the plain weight beside the packed one, and a larger
# matrix is packed a run of rows at a time.
PACK_BYTES = 48 << 20


class Linear(Protocol):
    """One weight (N, K) and perhaps a bias (N,), with what a decoder does right before and after it."""

    @property
    def num_bytes(self) -> int:
        """Memory of weight and bias."""

    def __call__(self, x_MK: Tensor, norm: Norm | None = None) -> Tensor:
        """(M, N) of the rows, normalised first if a norm is given; a new tensor."""

    def add(self, x_MK: Tensor, residual_MN: Tensor) -> Tensor:
        """residual + y, a new tensor."""

    def activated(self, x_MK: Tensor, norm: Norm, activation: ActivationKind) -> Tensor:
        """(M, N): the activation of y."""

    def gated(self, x_MK: Tensor, norm: Norm, activation: ActivationKind) -> Tensor:
        """(M, N / 2): the activation of the first half of the outputs times the second half."""

    def logits(self, x_MK: Tensor, norm: Norm) -> Tensor:
        """(M, N) in fp32."""


class Table(Protocol):
    """An embedding (V, M)."""

    @property
    def num_bytes(self) -> int: ...

    def rows(self, ids_T: Tensor) -> Tensor:
        """(T, M) in the model's type, a new tensor."""

    def head(self, bias_V: Tensor | None) -> Linear:
        """The output projection that is tied to it, of the same memory."""


def activate(x: Tensor, activation: ActivationKind) -> Tensor:
    """A new tensor."""
    match activation:
        case ActivationKind.SILU:
            return functional.silu(x)
        case ActivationKind.GELU:
            return functional.gelu(x)
        case ActivationKind.GELU_TANH:
            return functional.gelu(x, approximate="tanh")
        case _:
            assert_never(activation)


class TorchLinear(ABC):
    """What torch computes one operation at a time."""

    @property
    @abstractmethod
    def num_bytes(self) -> int: ...

    @abstractmethod
    def _product(self, x_MK: Tensor) -> Tensor:
        """x W^T + b, a new tensor."""

    def __call__(self, x_MK: Tensor, norm: Norm | None = None) -> Tensor:
        return self._product(x_MK if norm is None else norm(x_MK))

    def add(self, x_MK: Tensor, residual_MN: Tensor) -> Tensor:
        return self._product(x_MK).add_(residual_MN)

    def activated(self, x_MK: Tensor, norm: Norm, activation: ActivationKind) -> Tensor:
        return activate(self._product(norm(x_MK)), activation)

    def gated(self, x_MK: Tensor, norm: Norm, activation: ActivationKind) -> Tensor:
        gate_MI, up_MI = self._product(norm(x_MK)).chunk(2, dim=1)
        return activate(gate_MI, activation).mul_(up_MI)

    def logits(self, x_MK: Tensor, norm: Norm) -> Tensor:
        return self._product(norm(x_MK)).float()


class SideBySide(TorchLinear):
    """Linears of the same inputs as one, and a bias for all."""

    def __init__(self, parts: Sequence[TorchLinear], bias_N: Tensor | None) -> None:
        self._parts = tuple(parts)
        self._bias_N = bias_N

    @property
    def num_bytes(self) -> int:
        return sum(part.num_bytes for part in self._parts) + (0 if self._bias_N is None else self._bias_N.nbytes)

    def _product(self, x_MK: Tensor) -> Tensor:
        y_MN = torch.cat([part(x_MK) for part in self._parts], dim=1)
        return y_MN if self._bias_N is None else y_MN.add_(self._bias_N)


class PlainLinear(TorchLinear):
    """Row-major weight whose rows can be read too; any device."""

    def __init__(self, weight_NK: Tensor, bias_N: Tensor | None = None) -> None:
        self._weight_NK = weight_NK
        self._bias_N = bias_N
        # oneDNN lays a plain bf16 weight out anew at every call (32 GB/s); torch's own dot products read it as it is
        # (47 GB/s), but only for a single row.
        self._row_by_dot = weight_NK.device.type == "cpu" and weight_NK.dtype == torch.bfloat16

    @property
    def num_bytes(self) -> int:
        return sum(t.numel() * t.element_size() for t in (self._weight_NK, self._bias_N) if t is not None)

    def rows(self, ids_T: Tensor) -> Tensor:
        return functional.embedding(ids_T, self._weight_NK)

    def head(self, bias_V: Tensor | None) -> Linear:
        return self if bias_V is None else PlainLinear(self._weight_NK, bias_V)

    def _product(self, x_MK: Tensor) -> Tensor:
        if self._row_by_dot and x_MK.shape[0] == 1:
            enabled = torch._C._get_mkldnn_enabled()
            torch._C._set_mkldnn_enabled(False)
            try:
                return functional.linear(x_MK, self._weight_NK, self._bias_N)
            finally:
                torch._C._set_mkldnn_enabled(enabled)
        return functional.linear(x_MK, self._weight_NK, self._bias_N)


class PackedLinear(TorchLinear):
    """Weight in oneDNN's layout, in runs of rows; CPU only. Sums and bias are in fp32, rounded once."""

    def __init__(
        self, packed: Sequence[Tensor], num_rows: Sequence[int], bias_N: Tensor | None, num_bytes: int
    ) -> None:
        self._packed = tuple(packed)
        self._biases = (None,) * len(packed) if bias_N is None else torch.split(bias_N, list(num_rows))
        self._num_rows = list(num_rows)
        self._num_bytes = num_bytes

    @property
    def num_bytes(self) -> int:
        return self._num_bytes

    def _product(self, x_MK: Tensor) -> Tensor:
        parts = [_linear(x_MK, w, b, "none", [], "") for w, b in zip(self._packed, self._biases, strict=True)]
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)

    def add(self, x_MK: Tensor, residual_MN: Tensor) -> Tensor:
        residuals = (residual_MN,) if len(self._packed) == 1 else torch.split(residual_MN, self._num_rows, dim=1)
        parts = [
            _linear_binary(x_MK, r.contiguous(), w, b, "add")
            for w, b, r in zip(self._packed, self._biases, residuals, strict=True)
        ]
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)


def can_pack(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether oneDNN computes in this type on this machine."""
    if device.type != "cpu" or not torch._C._has_mkldnn:
        return False
    match dtype:
        case torch.float32:
            return True
        case torch.bfloat16:
            return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
        case torch.float16:
            return bool(torch.ops.mkldnn._is_mkldnn_fp16_supported())
        case _:
            return False


def pack_rows(weight_NK: Tensor) -> Tensor:
    """A copy of the weight in oneDNN's layout; the plain one may be overwritten afterwards."""
    packed: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight_NK, None)
    return packed


_linear = torch.ops.mkldnn._linear_pointwise.default
_linear_binary = torch.ops.mkldnn._linear_pointwise.binary
