"""The kernels' linears against products in f64, and against themselves with other rows and threads."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional

from tllm.engines.torch.kernels import build
from tllm.engines.torch.kernels.linear import KernelLinear, Part, quantize_rows, scale_dtype_of
from tllm.engines.torch.norm import LayerNorm, Norm, RMSNorm
from tllm.models.spec import ActivationKind

pytestmark = pytest.mark.skipif(build.library() is None, reason=str(build.unavailable()))

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
FORMS = ("plain", "int8", "int8-g32", "int4", "int4-g16", "int4-g64")
ROUNDING = {torch.float32: 1e-5, torch.bfloat16: 2**-8, torch.float16: 2**-11}

dtypes = st.sampled_from(DTYPES)
seeds = st.integers(0, 2**16)
examples = settings(max_examples=60, deadline=None)


@st.composite
def quantized_parts(draw: st.DrawFn, num_inputs: int) -> Part:
    bits = draw(st.sampled_from((4, 8)))
    groups = [g for g in (16, 32, 48, 64, 128) if num_inputs % g == 0]
    group = draw(st.sampled_from([num_inputs, *groups]))
    num_rows = draw(st.integers(1, 140))
    generator = torch.Generator().manual_seed(draw(seeds))
    codes = torch.randint(0, 2**bits, (num_rows, num_inputs), dtype=torch.uint8, generator=generator)
    scale_dtype = draw(dtypes)
    shape = (num_rows, num_inputs // group)
    scale = (torch.rand(shape, generator=generator) * 0.1).to(scale_dtype).float()
    offset = torch.randn(shape, generator=generator).to(scale_dtype).float() if draw(st.booleans()) else None
    part = Part.quantized(codes, scale, offset, bits, scale_dtype)
    zero = 2 ** (bits - 1)
    offset = -zero * scale if offset is None else offset
    expected = scale.repeat_interleave(group, 1) * codes + offset.repeat_interleave(group, 1)
    torch.testing.assert_close(part.dequantize(), expected, rtol=1e-6, atol=1e-5)
    return part


def part_of(form: str, weight_NK: Tensor) -> Part:
    if form == "plain":
        return Part.plain(weight_NK)
    bits, _, group = form.removeprefix("int").partition("-g")
    return Part.quantize(weight_NK, int(bits), int(group) if group else None)


def rounded_x(x_MK: Tensor, part: Part) -> Tensor:
    """What the part multiplies, in f64: the very same codes."""
    if not part.group:
        return x_MK.double()
    x_MGI = x_MK.float().reshape(x_MK.shape[0], -1, part.group)
    largest = x_MGI.abs().amax(2, keepdim=True)
    codes = torch.round(x_MGI * torch.where(largest > 0, torch.tensor(127.0).div(largest), 0))
    return (codes.double() * (largest / 127).double()).reshape(x_MK.shape)


def product(x_MK: Tensor, parts: list[Part], bias_N: Tensor | None = None) -> Tensor:
    """In f64."""
    columns = [rounded_x(x_MK, part) @ part.dequantize().double().T for part in parts]
    y_MN = torch.cat(columns, 1)
    return y_MN if bias_N is None else y_MN + bias_N.double()


def assert_near(actual: Tensor, expected: Tensor) -> None:
    """Within one rounding to the result's type, and f32's summation error against the largest result."""
    largest = expected.abs().max().item()
    torch.testing.assert_close(
        actual.double(), expected, rtol=ROUNDING[actual.dtype], atol=2e-5 * largest + 1e-6, equal_nan=False
    )


def with_threads(num_threads: int, run: Callable[[], Tensor]) -> Tensor:
    torch.set_num_threads(num_threads)
    try:
        return run()
    finally:
        torch.set_num_threads(1)


@given(st.integers(1, 140), st.integers(1, 150), st.integers(1, 20), dtypes, seeds, st.booleans())
@examples
def test_plain_product_is_that_in_f64(
    num_rows: int, num_inputs: int, m: int, dtype: torch.dtype, seed: int, bias: bool
) -> None:
    torch.manual_seed(seed)
    weight, x = torch.randn(num_rows, num_inputs).to(dtype), torch.randn(m, num_inputs).to(dtype)
    bias_N = torch.randn(num_rows) if bias else None
    part = Part.plain(weight)
    assert torch.equal(part.dequantize(), weight.float())
    linear = KernelLinear([part], bias_N)
    expected = product(x, [part], bias_N)
    assert_near(linear(x), expected)
    assert_near(linear(x, out_dtype=torch.float32), expected)


@given(st.data(), st.sampled_from((1, 7, 16, 33, 64, 96, 256, 272)), st.integers(1, 14), dtypes, seeds)
@examples
def test_quantized_parts_side_by_side_multiply_the_codes_exactly(
    data: st.DataObject, num_inputs: int, m: int, dtype: torch.dtype, seed: int
) -> None:
    torch.manual_seed(seed)
    parts = data.draw(st.lists(quantized_parts(num_inputs), min_size=1, max_size=3))
    x = (torch.randn(m, num_inputs) * torch.rand(m, 1) * 10).to(dtype)
    x[m // 2] = 0
    bias = torch.randn(sum(part.num_rows for part in parts))
    y = KernelLinear(parts, bias)(x, out_dtype=torch.float32)
    assert_near(y, product(x, parts, bias))
    assert torch.equal(y[m // 2], bias)


@pytest.mark.parametrize(
    ("form", "dtype"), [*(("plain", dtype) for dtype in DTYPES), *((form, torch.bfloat16) for form in FORMS[1:])]
)
def test_result_of_a_row_does_not_depend_on_other_rows_or_threads(form: str, dtype: torch.dtype) -> None:
    torch.manual_seed(3)
    parts = [part_of(form, torch.randn(n, 1088).to(dtype)) for n in (200, 200)]  # more than one block of K
    linear, norm = KernelLinear(parts, torch.randn(400)), RMSNorm(weight=torch.randn(1088).to(dtype), eps=1e-5)
    x, residual = torch.randn(601, 1088).to(dtype), torch.randn(601, 400).to(dtype)
    x[100] *= 50
    calls: list[Callable[[slice], Tensor]] = [
        lambda rows: linear(x[rows]),
        lambda rows: linear(x[rows], norm, torch.float32),
        lambda rows: linear.add(x[rows], residual[rows]),
        lambda rows: linear.gated(x[rows], norm, ActivationKind.SILU),
    ]
    for call in calls:
        whole = with_threads(2, lambda call=call: call(slice(None)))  # type: ignore[misc]
        assert whole.isfinite().all()
        for first, stop in ((0, 1), (100, 101), (99, 101), (3, 10), (64, 77), (90, 130), (511, 600), (600, 601)):
            rows = slice(first, stop)
            for num_threads in (1, 2):
                part = with_threads(num_threads, lambda call=call, rows=rows: call(rows))  # type: ignore[misc]
                assert torch.equal(part, whole[rows]), (first, stop, num_threads)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("form", ["plain", "int8", "int4-g16"])
@pytest.mark.parametrize("layer_norm", [False, True])
def test_norm_before_it_is_that_of_torch(dtype: torch.dtype, form: str, layer_norm: bool) -> None:
    torch.manual_seed(4)
    for num_inputs, m in ((48, 1), (80, 5), (1040, 3)) + (((37, 2), (5, 9)) if form != "int4-g16" else ()):
        weight = torch.randn(num_inputs).to(dtype)
        norm: Norm = RMSNorm(weight=weight, eps=1e-5)
        if layer_norm:
            norm = LayerNorm(weight=weight, bias=torch.randn(num_inputs).to(dtype), eps=1e-5)
        part = part_of(form, torch.randn(70, num_inputs).to(dtype))
        x = (torch.randn(m, num_inputs) * 3 + 1).to(dtype)
        y = KernelLinear([part])(x, norm, torch.float32)
        expected = product(norm(x), [part])
        # An input that torch rounds the other way is a step of the type away, or one code.
        step = {torch.float32: 1e-5, torch.bfloat16: 2**-7, torch.float16: 2**-10}[dtype] + (0.01 if part.group else 0)
        assert (y - expected).abs().max() <= step * expected.abs().max()
        assert (y - expected).abs().mean() <= step / 4 * expected.abs().mean()


@given(dtypes, st.sampled_from(FORMS), st.integers(1, 100), st.integers(1, 9), st.sampled_from(ActivationKind), seeds)
@examples
def test_what_comes_after_the_product_is_rounded_once(
    dtype: torch.dtype, form: str, size: int, m: int, activation: ActivationKind, seed: int
) -> None:
    torch.manual_seed(seed)
    parts = [part_of(form, torch.randn(size, 64).to(dtype)) for _ in range(2)]
    bias, residual = torch.randn(2 * size), torch.randn(m, 2 * size).to(dtype)
    x = torch.randn(m, 64).to(dtype)
    linear, y = KernelLinear(parts, bias), product(x, parts, bias)
    activate = {
        ActivationKind.SILU: functional.silu,
        ActivationKind.GELU: functional.gelu,
        ActivationKind.GELU_TANH: lambda t: functional.gelu(t, approximate="tanh"),
    }[activation]
    assert_near(linear.add(x, residual), residual.double() + y)
    assert_near(linear.activated(x, None, activation), activate(y))
    assert_near(linear.gated(x, None, activation), activate(y[:, :size]) * y[:, size:])


@pytest.mark.parametrize("activation", ActivationKind)
def test_activations_are_exact_over_their_whole_range(activation: ActivationKind) -> None:
    linear = KernelLinear([Part.plain(torch.ones(1, 1))])
    x = torch.cat((torch.linspace(-100, 100, 8001), torch.linspace(-6, 6, 8001), torch.tensor([0.0, -1e30, 1e30])))
    y = linear.activated(x[:, None], None, activation)[:, 0]
    expected = {
        ActivationKind.SILU: functional.silu,
        ActivationKind.GELU: functional.gelu,
        ActivationKind.GELU_TANH: lambda t: functional.gelu(t, approximate="tanh"),
    }[activation](x.double()).float()
    torch.testing.assert_close(y[:-2], expected[:-2], rtol=2e-6, atol=4e-7)
    assert y[-2:].tolist() == [0.0, pytest.approx(1e30)]


@given(st.data(), st.integers(1, 150), st.sampled_from((1, 30, 64, 144)), st.sampled_from(FORMS), dtypes, dtypes, seeds)
@examples
def test_part_filled_in_runs_is_the_part_filled_at_once(
    data: st.DataObject, n: int, k: int, form: str, dtype: torch.dtype, held: torch.dtype, seed: int
) -> None:
    torch.manual_seed(seed)
    weight = torch.randn(n, k).to(dtype)
    bits, _, group = form.removeprefix("int").partition("-g")
    size = int(group) if group and k % int(group) == 0 else None
    cuts = sorted({0, n, *data.draw(st.lists(st.integers(0, n), max_size=4))})
    if form == "plain":
        part, whole = Part.empty(n, k, held), weight.to(held).float()
    else:
        part = Part.empty_quantized(n, k, int(bits), size, scale_dtype_of(int(bits), size), offsets=bits == "4")
        whole = Part.quantize(weight, int(bits), size).dequantize()
    for first, stop in pairwise(cuts):
        part.fill(first, weight[first:stop])
    assert torch.equal(part.dequantize(), whole)
    if form != "plain":
        codes, scale, offset = quantize_rows(weight, int(bits), size)
        again = Part.empty_quantized(n, k, int(bits), size, scale_dtype_of(int(bits), size), offsets=bits == "4")
        for first, stop in pairwise(cuts):
            again.fill_codes(
                first, codes[first:stop], scale[first:stop], None if offset is None else offset[first:stop]
            )
        assert torch.equal(again.dequantize(), whole)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_are_the_table_rows(form: str, dtype: torch.dtype) -> None:
    torch.manual_seed(5)
    part = part_of(form, torch.randn(300, 192).to(dtype))
    ids = torch.tensor([299, 0, 5, 5, 64, 63])
    assert torch.equal(part.rows(ids, dtype), part.dequantize()[ids].to(dtype))


def test_every_half_and_every_rounding_to_it_is_that_of_torch() -> None:
    every = torch.arange(2**16, dtype=torch.int32).to(torch.int16).reshape(256, 256)
    for dtype in (torch.float16, torch.bfloat16):
        values = every.view(dtype)
        assert torch.equal(Part.plain(values).dequantize().nan_to_num(7), values.float().nan_to_num(7))
        ties = torch.cat((values.float(), values.float() * 1.00390625, values.float() * 1.00048828125, values / 3))
        part = Part.empty(*ties.shape, dtype)
        part.fill(0, ties.float())
        assert torch.equal(part.dequantize().nan_to_num(7), ties.float().to(dtype).float().nan_to_num(7))


def test_four_bits_lose_less_than_groups_of_32_around_zero_do() -> None:
    """Gaussian weights; the other is the classic of 4.5 bits: one f16 scale, largest magnitude to -8."""
    weight = torch.randn(512, 1024, generator=torch.Generator().manual_seed(6))
    blocks = weight.view(-1, 32)
    scale = blocks.gather(1, blocks.abs().argmax(1, keepdim=True)) / -8
    classic = ((blocks / scale + 8.5).floor().clamp(0, 15) - 8) * scale.half().float()
    error = (Part.quantize(weight, 4, 64).dequantize() - weight).square().mean()
    assert error < (classic - blocks).square().mean()
    assert error < 0.0072


def test_extreme_rows_quantize_to_what_they_can() -> None:
    weight = torch.randn(6, 64, generator=torch.Generator().manual_seed(7))
    weight[0] = 0
    weight[1] = 3
    weight[2, 5] = 1e30
    weight[3] *= 1e-30
    weight[4, ::2] = 0.5
    weight[4, 1::2] = -0.25
    for bits, group in ((8, None), (8, 32), (4, None), (4, 32)):
        values = Part.quantize(weight, bits, group).dequantize()
        assert values.isfinite().all()
        assert torch.equal(values[0], weight[0])
        torch.testing.assert_close(values[[1, 4]], weight[[1, 4]], rtol=2**-7, atol=0.01)
        step = weight.abs().amax(1) / (127 if bits == 8 else 7)
        assert ((values - weight).abs().amax(1) <= step).all()


def test_columns_in_another_order_multiply_their_own_inputs() -> None:
    torch.manual_seed(8)
    codes = torch.randint(0, 16, (70, 64), dtype=torch.uint8)
    scale, offset, x = torch.rand(70, 2), torch.randn(70, 2), torch.randn(5, 64)
    order = torch.randperm(64)
    ordered = Part.quantized(codes, scale, offset, 4, torch.float32, input_order=order)
    plain = Part.plain(torch.randn(10, 64))
    y = KernelLinear([ordered, plain])(x)
    as_it_is = Part.quantized(codes, scale, offset, 4, torch.float32)
    assert torch.equal(y[:, :70], KernelLinear([as_it_is])(x[:, order]))
    assert torch.equal(y[:, 70:], KernelLinear([plain])(x))


def test_rows_may_be_strided() -> None:
    torch.manual_seed(9)
    linear = KernelLinear([Part.plain(torch.randn(40, 33))])
    wide, residual = torch.randn(7, 100), torch.randn(7, 90)
    x, r = wide[:, 20:53], residual[:, 11:51]
    assert torch.equal(linear.add(x, r), linear.add(x.contiguous(), r.contiguous()))
    assert torch.equal(linear(wide[:, ::3][:, :33]), linear(wide[:, ::3][:, :33].contiguous()))


def test_python_threads_may_call_at_once() -> None:
    torch.manual_seed(10)
    linears = [KernelLinear([part_of(form, torch.randn(300, 256))]) for form in FORMS]
    x = torch.randn(20, 256)
    expected = [linear(x) for linear in linears]
    with ThreadPoolExecutor(4) as pool:
        for _ in range(10):
            for y, wanted in zip(pool.map(lambda linear: linear(x), linears), expected, strict=True):
                assert torch.equal(y, wanted)


def test_no_rows_give_no_rows() -> None:
    assert KernelLinear([Part.plain(torch.randn(4, 4))])(torch.empty(0, 4)).shape == (0, 4)


def test_group_that_does_not_divide_the_inputs_is_refused() -> None:
    with pytest.raises(ValueError, match="multiple of 16 that divides"):
        Part.empty_quantized(4, 100, 4, 64, torch.float32, offsets=True)
    with pytest.raises(ValueError, match="4 and 8"):
        Part.empty_quantized(4, 64, 3, 32, torch.float32, offsets=True)
