"""Packed and plain linears compute the same."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from tllm.engines.torch.linear import Linear, PackedLinear, PlainLinear, can_pack, pack_rows

CPU = torch.device("cpu")


def linears(weight: torch.Tensor, bias: torch.Tensor | None, runs: list[int]) -> dict[str, Linear]:
    made: dict[str, Linear] = {"plain": PlainLinear(weight, bias)}
    if can_pack(CPU, weight.dtype):
        packs = [pack_rows(rows.contiguous()) for rows in torch.split(weight, runs)]
        num_bytes = weight.nbytes + (0 if bias is None else bias.nbytes)
        made["packed"] = PackedLinear(packs, runs, bias, num_bytes)
    return made


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("num_rows", [1, 2, 5, 33])
@pytest.mark.parametrize("runs", [[24], [10, 10, 4]], ids=["one pack", "three packs"])
@pytest.mark.parametrize("biased", [False, True], ids=["no bias", "bias"])
def test_linears_equal_the_definition(dtype: torch.dtype, num_rows: int, runs: list[int], biased: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(24, 17, generator=generator).to(dtype)
    bias = torch.randn(24, generator=generator).to(dtype) if biased else None
    x = torch.randn(num_rows, 17, generator=generator).to(dtype)
    residual = torch.randn(num_rows, 24, generator=generator).to(dtype)
    expected = functional.linear(x.double(), weight.double(), None if bias is None else bias.double())
    tolerance = {"atol": 1e-5, "rtol": 1e-5} if dtype == torch.float32 else {"atol": 0.06, "rtol": 0.01}
    for name, linear in linears(weight, bias, runs).items():
        before = residual.clone()
        with torch.inference_mode():
            y, added = linear(x), linear.add(x, residual)
        assert y.dtype == added.dtype == dtype, name
        torch.testing.assert_close(y.double(), expected, **tolerance)
        torch.testing.assert_close(added.double(), expected + residual.double(), **tolerance)
        assert torch.equal(residual, before), "the residual stream belongs to the caller"
        assert linear.num_bytes == weight.nbytes + (bias.nbytes if bias is not None else 0)


def test_a_packed_weight_is_a_copy() -> None:
    if not can_pack(CPU, torch.float32):
        pytest.skip("no oneDNN")
    scratch = torch.ones(8, 8)
    linear = PackedLinear([pack_rows(scratch)], [8], None, scratch.nbytes)
    scratch.zero_()
    with torch.inference_mode():
        assert torch.equal(linear(torch.ones(1, 8)), torch.full((1, 8), 8.0))


def test_a_single_row_over_a_plain_bf16_weight_leaves_onednn_as_it_was() -> None:
    weight = torch.ones(4, 4, dtype=torch.bfloat16)
    enabled = torch._C._get_mkldnn_enabled()
    PlainLinear(weight)(weight[:1])
    assert torch._C._get_mkldnn_enabled() == enabled


def test_types_and_devices_without_a_kernel_are_not_packed() -> None:
    assert not can_pack(torch.device("cuda"), torch.bfloat16)
    assert not can_pack(CPU, torch.float64)
