"""Quantized weights computed by torch's own operations, for devices and machines without kernels of ours.

A weight is scale * code + offset, with one scale and offset for each *group* of successive inputs of an output. What
multiplies it is quantized too, as the kernels do it: a row's group of inputs becomes whole numbers of -127..127 times
its largest magnitude / 127. So an answer is that of the kernels but for the last bits, and slower: every call spells
the weights out, a panel of outputs at a time.

Shapes: M rows, N outputs, K inputs, G groups of an output.
This file does not know where codes come from.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from tllm.engines.torch.linear import Linear, TorchLinear
from tllm.engines.torch.norm import Norm
from tllm.models.grouped import Grouped, packed

_PANEL = 1 << 22  # weights spelled out at a time
SCALE_DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}


class GroupedWeight:
    """One matrix (N, K), of which each of the arrays has a run of rows."""

    def __init__(self, runs: Sequence[Grouped], device: torch.device) -> None:
        first = runs[0]
        self._bits, self._group = first.bits, first.group
        self.num_inputs = first.codes.shape[1]
        self.num_rows = sum(len(run.codes) for run in runs)
        dtype = max((SCALE_DTYPES[run.scale_dtype] for run in runs), key=lambda dtype: dtype.itemsize)
        self._codes = torch.cat([torch.from_numpy(packed(run.codes, run.bits)) for run in runs]).to(device)
        self._scale_NG = torch.cat([torch.from_numpy(run.scale) for run in runs]).to(device, dtype)
        offsets = [torch.from_numpy(run.offset) for run in runs if run.offset is not None]
        self._offset_NG = torch.cat(offsets).to(device, dtype) if offsets else None
        order = first.input_order
        self._input_order = None if order is None else torch.from_numpy(order).to(device)

    @property
    def num_bytes(self) -> int:
        held = (self._codes, self._scale_NG, self._offset_NG, self._input_order)
        return sum(tensor.nbytes for tensor in held if tensor is not None)

    def rows(self, rows: slice | Tensor) -> Tensor:
        """These rows (_, K) spelled out in fp32, columns in the order of the codes."""
        codes = self._codes[rows]
        if self._bits == 4:
            codes = torch.stack((codes & 15, codes >> 4), dim=2).flatten(1)
        values = codes.float().view(len(codes), -1, self._group)
        scale = self._scale_NG[rows].float().unsqueeze(2)
        if self._offset_NG is None:
            values = (values - (1 << self._bits - 1)) * scale
        else:
            values = values * scale + self._offset_NG[rows].float().unsqueeze(2)
        return values.flatten(1)

    def product(self, x_MK: Tensor) -> Tensor:
        """(M, N) in fp32."""
        if self._input_order is not None:
            x_MK = x_MK.index_select(1, self._input_order)
        x_MK = quantized_rows(x_MK, self._group)
        at_once = max(1, _PANEL // self.num_inputs)
        panels = [functional.linear(x_MK, self.rows(slice(n, n + at_once))) for n in range(0, self.num_rows, at_once)]
        return torch.cat(panels, dim=1)


class GroupedLinear(TorchLinear):
    def __init__(self, weight: GroupedWeight, bias_N: Tensor | None = None) -> None:
        self._weight = weight
        self._bias_N = bias_N

    @property
    def num_bytes(self) -> int:
        return self._weight.num_bytes + (0 if self._bias_N is None else self._bias_N.nbytes)

    def logits(self, x_MK: Tensor, norm: Norm) -> Tensor:
        return self._in_fp32(norm(x_MK))

    def _product(self, x_MK: Tensor) -> Tensor:
        return self._in_fp32(x_MK).to(x_MK.dtype)

    def _in_fp32(self, x_MK: Tensor) -> Tensor:
        y_MN = self._weight.product(x_MK)
        return y_MN if self._bias_N is None else y_MN.add_(self._bias_N)


class GroupedTable:
    """An embedding of quantized rows."""

    def __init__(self, weight: GroupedWeight, dtype: torch.dtype) -> None:
        self._weight = weight
        self._dtype = dtype

    @property
    def num_bytes(self) -> int:
        return self._weight.num_bytes

    def rows(self, ids_T: Tensor) -> Tensor:
        return self._weight.rows(ids_T).to(self._dtype)

    def head(self, bias_V: Tensor | None) -> Linear:
        return GroupedLinear(self._weight, bias_V)


def quantized_rows(x_MK: Tensor, group: int) -> Tensor:
    """What is left in fp32 of the rows as signed bytes, one scale for each run of `group` elements."""
    x_MGg = x_MK.float().reshape(len(x_MK), -1, group)
    scale = x_MGg.abs().amax(dim=2, keepdim=True) / 127
    codes = torch.where(scale > 0, x_MGg / scale, 0).round_()
    return (codes * scale).flatten(1)
