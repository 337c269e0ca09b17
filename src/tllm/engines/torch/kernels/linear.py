"""Linears whose weights are laid out for this processor's vectors: plain, 8 bit and 4 bit.

A `Part` is one matrix; a `KernelLinear` is parts side by side, with the norm before and the activation or residual
after them in one call. A row's result is the same bits however many rows are computed with it and by however many
threads.

Quantized weights are multiplied in integers: a row of x is rounded to s8 with one scale per row, or per group of inputs
where the weight has groups. `linear.h` draws the layouts.

Shapes: M rows, N outputs, K inputs, G = K / group groups. This file does not know models, files or which linear it is.
"""

from __future__ import annotations

import ctypes
import mmap
from collections.abc import Sequence
from typing import Final, Protocol

import torch
from torch import Tensor

from tllm.engines.torch.kernels import build
from tllm.models.spec import ActivationKind

_TYPES: Final = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
_KINDS: Final = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
_U8, _U4, _GROUPED_U8, _GROUPED_U4 = 3, 4, 5, 6
_FORMATS: Final = {0: 0, 1: 0, 2: 1, _U8: 2, _U4: 2, _GROUPED_U8: 3, _GROUPED_U4: 3}  # of x, by the weight's kind
_STEP_INPUTS: Final = {0: 1, 1: 2, 2: 2, _U8: 4, _U4: 8, _GROUPED_U8: 4, _GROUPED_U4: 8}
_STEP_BYTES, _PANEL = 256, 64
_BITS: Final = {0: 32, 1: 16, 2: 16, _U8: 8, _U4: 4, _GROUPED_U8: 8, _GROUPED_U4: 4}
_ACTIVATIONS: Final = {ActivationKind.SILU: 1, ActivationKind.GELU: 2, ActivationKind.GELU_TANH: 3}
_HUGE_PAGE = 2 << 20
_MAX_PREPARATIONS = 8


class Norm(Protocol):
    """RMS norm, or a layer norm where there is a `bias`."""

    @property
    def weight(self) -> Tensor: ...
    @property
    def eps(self) -> float: ...


class _PartStruct(ctypes.Structure):
    _fields_ = (
        ("weight", ctypes.c_void_p),
        ("scale", ctypes.c_void_p),
        ("offset", ctypes.c_void_p),
        ("num_rows", ctypes.c_int64),
        ("num_inputs", ctypes.c_int64),
        ("kind", ctypes.c_int32),
        ("scale_type", ctypes.c_int32),
        ("group", ctypes.c_int32),
        ("preparation", ctypes.c_int32),
    )


class _PreparationStruct(ctypes.Structure):
    _fields_ = (("order", ctypes.c_void_p), ("format", ctypes.c_int32), ("group", ctypes.c_int32))


class _LinearStruct(ctypes.Structure):
    _fields_ = (
        ("parts", ctypes.c_void_p),
        ("preparations", ctypes.c_void_p),
        ("bias", ctypes.c_void_p),
        ("num_inputs", ctypes.c_int64),
        ("num_bytes", ctypes.c_int64),
        ("num_parts", ctypes.c_int32),
        ("num_preparations", ctypes.c_int32),
    )


class _NormStruct(ctypes.Structure):
    _fields_ = (("weight", ctypes.c_void_p), ("bias", ctypes.c_void_p), ("eps", ctypes.c_float))


class Part:
    """One matrix (N, K) in the kernels' layout, to be filled a run of rows at a time; rows never filled are zero."""

    def __init__(
        self,
        num_rows: int,
        num_inputs: int,
        kind: int,
        *,
        group: int = 0,
        scale_dtype: torch.dtype = torch.float32,
        offsets: bool = False,
        input_order: Tensor | None = None,
    ) -> None:
        self._library = _library()
        self.num_rows = num_rows
        self.num_inputs = num_inputs
        self.kind = kind
        self.group = group
        self.scale_dtype = scale_dtype
        self.input_order = None if input_order is None else input_order.to(torch.int32).contiguous()
        panels = -(-num_rows // _PANEL)
        steps = -(-num_inputs // _STEP_INPUTS[kind])
        self._weight = _zeros(panels * steps * _STEP_BYTES)
        self._scale: Tensor | None = None
        self._offset: Tensor | None = None
        if group:
            shape = (panels, num_inputs // group, _PANEL)
            self._scale = torch.zeros(shape, dtype=scale_dtype)
            self._offset = torch.zeros(shape, dtype=scale_dtype) if offsets else None
        self.struct = _PartStruct(
            weight=self._weight.data_ptr(),
            scale=None if self._scale is None else self._scale.data_ptr(),
            offset=None if self._offset is None else self._offset.data_ptr(),
            num_rows=num_rows,
            num_inputs=num_inputs,
            kind=kind,
            scale_type=_TYPES[scale_dtype],
            group=group,
            preparation=0,
        )

    # ---- empty, to be filled

    @staticmethod
    def empty(num_rows: int, num_inputs: int, dtype: torch.dtype) -> Part:
        """A plain part in f32, bf16 or f16; `fill` rounds rows to it."""
        return Part(num_rows, num_inputs, _KINDS[dtype])

    @staticmethod
    def empty_quantized(
        num_rows: int,
        num_inputs: int,
        bits: int,
        group: int | None,
        scale_dtype: torch.dtype,
        *,
        offsets: bool,
        input_order: Tensor | None = None,
    ) -> Part:
        """A quantized part; a `group` of None is all K. Raises ValueError for a group that is not one.

        `input_order` (K,) says which input each column of the codes multiplies.
        """
        whole = group is None or group == num_inputs
        group = group or num_inputs
        if bits not in (4, 8):
            raise ValueError(f"{bits} bits; there are kernels for 4 and 8.")
        if not whole and (group % 16 or num_inputs % group):
            raise ValueError(
                f"Groups of {group} in {num_inputs} inputs: a group is a multiple of 16 that divides them."
            )
        kind = {(8, True): _U8, (4, True): _U4, (8, False): _GROUPED_U8, (4, False): _GROUPED_U4}[bits, whole]
        return Part(
            num_rows, num_inputs, kind, group=group, scale_dtype=scale_dtype, offsets=offsets, input_order=input_order
        )

    # ---- whole

    @staticmethod
    def plain(weight_NK: Tensor) -> Part:
        """In the weight's own type."""
        part = Part.empty(weight_NK.shape[0], weight_NK.shape[1], weight_NK.dtype)
        part.fill(0, weight_NK)
        return part

    @staticmethod
    def quantized(
        codes_NK: Tensor,
        scale_NG: Tensor,
        offset_NG: Tensor | None,
        bits: int,
        scale_dtype: torch.dtype,
        *,
        input_order: Tensor | None = None,
    ) -> Part:
        """value = scale * code + offset; without offsets scale * (code - 128), or (code - 8) for 4 bits."""
        num_rows, num_inputs = codes_NK.shape
        part = Part.empty_quantized(
            num_rows,
            num_inputs,
            bits,
            num_inputs // scale_NG.shape[1],
            scale_dtype,
            offsets=offset_NG is not None,
            input_order=input_order,
        )
        part.fill_codes(0, codes_NK, scale_NG, offset_NG)
        return part

    @staticmethod
    def quantize(weight_NK: Tensor, bits: int, group: int | None = None) -> Part:
        """By our own choice of scales; see `quantize_rows`."""
        part = Part.empty_quantized(
            weight_NK.shape[0], weight_NK.shape[1], bits, group, scale_dtype_of(bits, group), offsets=bits == 4
        )
        part.fill(0, weight_NK)
        return part

    # ---- filling

    def fill(self, first_row: int, rows_NK: Tensor) -> None:
        """Rows from `first_row` on from f32, bf16 or f16 rows, rounded or quantized to what the part holds."""
        rows_NK = _rows(rows_NK)
        assert rows_NK.shape[1] == self.num_inputs
        assert 0 <= first_row <= first_row + rows_NK.shape[0] <= self.num_rows
        assert self._offset is not None or self.kind not in (_U4, _GROUPED_U4)
        stride = rows_NK.stride(0) * rows_NK.element_size()
        self._library.tllm_fill(
            ctypes.byref(self.struct), first_row, rows_NK.shape[0], rows_NK.data_ptr(), stride, _TYPES[rows_NK.dtype]
        )

    def fill_codes(self, first_row: int, codes_NK: Tensor, scale_NG: Tensor, offset_NG: Tensor | None) -> None:
        """Rows from `first_row` on from u8 codes, which must fit the part's bits, and f32 scales and offsets."""
        assert self.group
        assert codes_NK.dtype == torch.uint8
        assert codes_NK.shape[1] == self.num_inputs
        assert scale_NG.shape == (codes_NK.shape[0], self.num_inputs // self.group)
        assert (offset_NG is None) == (self._offset is None)
        assert 0 <= first_row <= first_row + codes_NK.shape[0] <= self.num_rows
        codes_NK, scale_NG = codes_NK.contiguous(), scale_NG.float().contiguous()
        offset_NG = None if offset_NG is None else offset_NG.float().contiguous()
        self._library.tllm_fill_codes(
            ctypes.byref(self.struct),
            first_row,
            codes_NK.shape[0],
            codes_NK.data_ptr(),
            scale_NG.data_ptr(),
            None if offset_NG is None else offset_NG.data_ptr(),
        )

    # ---- reading

    @property
    def num_bytes(self) -> int:
        """Memory of codes or values, scales and offsets, without what fills up the last panel."""
        scales = sum(t.element_size() for t in (self._scale, self._offset) if t is not None)
        num_groups = self.num_inputs // self.group if self.group else 0
        return self.num_rows * (self.num_inputs * _BITS[self.kind] // 8 + num_groups * scales)

    def rows(self, ids_T: Tensor, dtype: torch.dtype) -> Tensor:
        """(T, K) in the given type, a new tensor."""
        assert self.input_order is None
        ids_T = ids_T.to(torch.int64).contiguous()
        out_TK = torch.empty(ids_T.shape[0], self.num_inputs, dtype=dtype)
        self._library.tllm_rows(
            ctypes.byref(self.struct),
            ids_T.data_ptr(),
            ids_T.shape[0],
            out_TK.data_ptr(),
            self.num_inputs * dtype.itemsize,
            _TYPES[dtype],
        )
        return out_TK

    def dequantize(self) -> Tensor:
        """(N, K) in f32, columns as the codes have them."""
        order, self.input_order = self.input_order, None
        try:
            return self.rows(torch.arange(self.num_rows), torch.float32)
        finally:
            self.input_order = order


class KernelLinear:
    """Parts side by side: x (M, K) times each, one output (M, N) with N the sum of theirs."""

    def __init__(self, parts: Sequence[Part], bias_N: Tensor | None = None) -> None:
        self._parts = tuple(parts)
        self._bias_N = None if bias_N is None else bias_N.float().contiguous()
        self._bias_bytes = 0 if bias_N is None else bias_N.nbytes
        self.num_inputs = parts[0].num_inputs
        self.num_outputs = sum(part.num_rows for part in parts)
        assert all(part.num_inputs == self.num_inputs for part in parts)
        self._gated_outputs = parts[0].num_rows
        self._can_gate = len(parts) == 2 and parts[0].num_rows == parts[1].num_rows
        self._run = _library().tllm_linear
        # The formats in which x is needed, each prepared once; a part knows its own by number.
        formats: list[tuple[int, int, int | None]] = []
        structs = (_PartStruct * len(parts))()
        for struct, part in zip(structs, parts, strict=True):
            ctypes.pointer(struct)[0] = part.struct
            order = None if part.input_order is None else part.input_order.data_ptr()
            wanted = (_FORMATS[part.kind], part.group if _FORMATS[part.kind] == 3 else 0, order)
            if wanted not in formats:
                formats.append(wanted)
            struct.preparation = formats.index(wanted)
        assert len(formats) <= _MAX_PREPARATIONS
        preparations = (_PreparationStruct * len(formats))(
            *(_PreparationStruct(order=order, format=form, group=group) for form, group, order in formats)
        )
        struct = _LinearStruct(
            parts=ctypes.addressof(structs),
            preparations=ctypes.addressof(preparations),
            bias=None if self._bias_N is None else self._bias_N.data_ptr(),
            num_inputs=self.num_inputs,
            num_bytes=self.num_bytes,
            num_parts=len(parts),
            num_preparations=len(formats),
        )
        self._kept = (structs, preparations, struct)
        self._address = ctypes.addressof(struct)
        self._norm: Norm | None = None
        self._norm_kept: tuple[object, ...] = ()
        self._norm_address: int | None = None

    @property
    def num_bytes(self) -> int:
        """Memory of the parts and the bias, as it was given."""
        return sum(part.num_bytes for part in self._parts) + self._bias_bytes

    def __call__(self, x_MK: Tensor, norm: Norm | None = None, out_dtype: torch.dtype | None = None) -> Tensor:
        """(M, N) in `out_dtype`, or x's type; a new tensor."""
        out = torch.empty(x_MK.shape[0], self.num_outputs, dtype=out_dtype or x_MK.dtype)
        return self._compute(x_MK, norm, out, None, 0, 0)

    def add(self, x_MK: Tensor, residual_MN: Tensor) -> Tensor:
        """residual + y, rounded once to the residual's type; a new tensor."""
        out = torch.empty(x_MK.shape[0], self.num_outputs, dtype=residual_MN.dtype)
        return self._compute(x_MK, None, out, residual_MN, 0, 0)

    def activated(self, x_MK: Tensor, norm: Norm | None, activation: ActivationKind) -> Tensor:
        """(M, N): the activation of y; a new tensor."""
        out = torch.empty(x_MK.shape[0], self.num_outputs, dtype=x_MK.dtype)
        return self._compute(x_MK, norm, out, None, _ACTIVATIONS[activation], 0)

    def gated(self, x_MK: Tensor, norm: Norm | None, activation: ActivationKind) -> Tensor:
        """(M, N / 2): the activation of the first part's outputs times the second part's; a new tensor."""
        assert self._can_gate
        out = torch.empty(x_MK.shape[0], self._gated_outputs, dtype=x_MK.dtype)
        return self._compute(x_MK, norm, out, None, _ACTIVATIONS[activation], 1)

    def logits(self, x_MK: Tensor, norm: Norm | None) -> Tensor:
        """(M, N) in f32."""
        return self(x_MK, norm, torch.float32)

    def _compute(
        self, x_MK: Tensor, norm: Norm | None, out: Tensor, residual: Tensor | None, activation: int, gated: int
    ) -> Tensor:
        num_rows, num_inputs = x_MK.shape
        assert num_inputs == self.num_inputs
        size = x_MK.element_size()
        if x_MK.stride(1) != 1:
            x_MK = x_MK.contiguous()
        residual_at, residual_stride = None, 0
        if residual is not None:
            if residual.stride(1) != 1:
                residual = residual.contiguous()
            residual_at, residual_stride = residual.data_ptr(), residual.stride(0) * residual.element_size()
        if norm is not self._norm and norm is not None:
            self._remember(norm)
        self._run(
            self._address,
            None if norm is None else self._norm_address,
            x_MK.data_ptr(),
            x_MK.stride(0) * size,
            _TYPES[x_MK.dtype],
            num_rows,
            out.data_ptr(),
            out.stride(0) * out.element_size(),
            _TYPES[out.dtype],
            residual_at,
            residual_stride,
            activation,
            gated,
        )
        return out

    def _remember(self, norm: Norm) -> None:
        """A linear has one norm before it as a rule: its weights are widened once."""
        width = -(-self.num_inputs // 16) * 16
        bias: Tensor | None = getattr(norm, "bias", None)
        weights = [torch.zeros(width) for t in (norm.weight, bias) if t is not None]
        for target, source in zip(weights, (norm.weight, bias), strict=False):
            assert source is not None
            target[: self.num_inputs] = source
        struct = _NormStruct(
            weight=weights[0].data_ptr(), bias=weights[1].data_ptr() if bias is not None else None, eps=norm.eps
        )
        self._norm = norm
        self._norm_kept = (weights, struct)
        self._norm_address = ctypes.addressof(struct)


def scale_dtype_of(bits: int, group: int | None) -> torch.dtype:
    """The type of the scales that our own quantization makes."""
    return torch.float32 if bits == 8 and group is None else torch.bfloat16


def quantize_rows(weight_NK: Tensor, bits: int, group: int | None = None) -> tuple[Tensor, Tensor, Tensor | None]:
    """Codes (N, K), scales (N, G) and, for 4 bits, offsets (N, G): what `Part.quantize` holds, to be stored.

    8 bits: scale = largest magnitude / 127, code = round(value / scale) + 128. 4 bits: scale and offset by least
    squares over several ranges. Scales and offsets are in f32, rounded to `scale_dtype_of`; codes are of those.
    """
    weight_NK = _rows(weight_NK)
    num_rows, num_inputs = weight_NK.shape
    group = group or num_inputs
    scale_dtype = scale_dtype_of(bits, None if group == num_inputs else group)
    codes_NK = torch.empty(num_rows, num_inputs, dtype=torch.uint8)
    scale_NG = torch.empty(num_rows, num_inputs // group)
    offset_NG = torch.empty_like(scale_NG) if bits == 4 else None
    _library().tllm_quantize(
        weight_NK.data_ptr(),
        weight_NK.stride(0) * weight_NK.element_size(),
        _TYPES[weight_NK.dtype],
        num_rows,
        num_inputs,
        bits,
        group,
        _TYPES[scale_dtype],
        codes_NK.data_ptr(),
        scale_NG.data_ptr(),
        None if offset_NG is None else offset_NG.data_ptr(),
    )
    return codes_NK, scale_NG, offset_NG


def _rows(rows_NK: Tensor) -> Tensor:
    rows_NK = rows_NK.detach()
    return rows_NK if rows_NK.stride(1) == 1 or rows_NK.shape[1] == 1 else rows_NK.contiguous()


def _zeros(num_bytes: int) -> Tensor:
    """Bytes on huge pages where the system has them: a product walks through all of them."""
    if num_bytes < _HUGE_PAGE:
        return torch.zeros(num_bytes, dtype=torch.uint8)
    memory = mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=torch.uint8)


def _library() -> ctypes.CDLL:
    library = build.library()
    if library is None:
        raise RuntimeError(f"There are no kernels: {build.unavailable()}")
    if library.tllm_linear.argtypes is None:
        address, i64, i32 = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int32
        signatures = {
            "tllm_linear": (address, address, address, i64, i32, i64, address, i64, i32, address, i64, i32, i32),
            "tllm_fill": (address, i64, i64, address, i64, i32),
            "tllm_fill_codes": (address, i64, i64, address, address, address),
            "tllm_quantize": (address, i64, i32, i64, i64, i32, i64, i32, address, address, address),
            "tllm_rows": (address, address, i64, address, i64, i32),
        }
        for name, arguments in signatures.items():
            function = getattr(library, name)
            function.argtypes = arguments
            function.restype = None
    return library
