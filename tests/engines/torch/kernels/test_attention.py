"""The kernels' attention against the textbook in f64, and against itself cut, placed and accompanied otherwise."""

from __future__ import annotations

import ctypes
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tllm.core.types import Epoch, Step, StepId
from tllm.engines.packing import PackedStep, pack
from tllm.engines.torch.kernels import build
from tllm.engines.torch.kernels.attention import KernelSelfAttention
from tllm.engines.torch.kv import KVCache
from tllm.engines.torch.norm import RMSNorm
from tllm.engines.torch.rotary import Rotary
from tllm.engines.torch.self_attention import HeadNorms
from tllm.models.spec import LearnedPositions, ModelSpec, Rope, RopeKind
from tllm.testing.fake_engine import FAKE_SPEC
from tllm.testing.stages import chunk

pytestmark = pytest.mark.skipif(build.library() is None, reason=str(build.unavailable()))

CPU = torch.device("cpu")
MAX_POSITIONS = 4096
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
TOLERANCE = {torch.float32: 3e-5, torch.bfloat16: 2.5e-2, torch.float16: 3e-3}


def library() -> ctypes.CDLL:
    found = build.library()
    assert found is not None
    return found


@pytest.fixture(autouse=True)
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def spec_of(
    num_kv_heads: int, group: int, head_dim: int, rotated: int = 0, window: int | None = None, scale: float = 0.3
) -> ModelSpec:
    """One layer; the first `rotated` elements of a head are."""
    positions = (
        Rope(kind=RopeKind.DEFAULT, theta=100.0, dim=rotated) if rotated else LearnedPositions(num_positions=4096)
    )
    return replace(
        FAKE_SPEC,
        num_layers=1,
        num_heads=num_kv_heads * group,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        positions=positions,
        attention_scale=scale,
        windows=(window,),
    )


@dataclass
class Served:
    """The cache of some sequences, and the steps over it."""

    spec: ModelSpec
    dtype: torch.dtype
    block_size: int
    num_blocks: int
    seed: int

    def __post_init__(self) -> None:
        self.cache = KVCache(
            [0],
            num_kv_heads=self.spec.num_kv_heads,
            head_dim=self.spec.head_dim,
            num_blocks=self.num_blocks,
            block_size=self.block_size,
            dtype=self.dtype,
            device=CPU,
        )
        self.kv = self.cache.layer(0)
        self.kv.fill_(float("nan"))  # whatever is read without having been written shows
        free = list(range(self.num_blocks))
        random.Random(self.seed).shuffle(free)
        self._free = free
        self._attention = KernelSelfAttention(self.spec, [0], library(), MAX_POSITIONS)

    def blocks(self, num_positions: int) -> list[int]:
        return [self._free.pop() for _ in range(-(-num_positions // self.block_size))]

    def slots(self, blocks: Sequence[int], num_positions: int) -> list[int]:
        return [blocks[p // self.block_size] * self.block_size + p % self.block_size for p in range(num_positions)]

    def pack(self, *chunks: tuple[int, int, Sequence[int]]) -> PackedStep:
        """(start, rows, blocks) each."""
        made = tuple(chunk(seq, start, [0] * num_rows, blocks) for seq, (start, num_rows, blocks) in enumerate(chunks))
        step = Step(id=StepId(0), epoch=Epoch(1), chunks=made)
        return pack(step, num_blocks=self.num_blocks, block_size=self.block_size)

    def attend(self, packed: PackedStep, qkv_TE: Tensor, norms: HeadNorms | None = None) -> Tensor:
        return self._attention.step(packed, self.cache)(qkv_TE.clone(), 0, norms)


def heads(spec: ModelSpec, qkv_TE: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Queries (T, H, D), keys and values (T, K, D)."""
    x = qkv_TE.view(len(qkv_TE), -1, spec.head_dim)
    first_value = spec.num_heads + spec.num_kv_heads
    return x[:, : spec.num_heads], x[:, spec.num_heads : first_value], x[:, first_value:]


def prepared(spec: ModelSpec, x_THD: Tensor, positions_T: Tensor, norm: RMSNorm | None) -> Tensor:
    """What torch's operations make of queries or keys before attention."""
    x = x_THD.clone() if norm is None else norm(x_THD)
    if isinstance(spec.positions, Rope):
        rotary = Rotary(spec.positions, MAX_POSITIONS, CPU)
        rotary.turn_(x, rotary.angles(positions_T))
    return x


def textbook(spec: ModelSpec, q_NHD: Tensor, k_SKD: Tensor, v_SKD: Tensor, start: int) -> Tensor:
    group = spec.num_heads // spec.num_kv_heads
    k, v = (x.repeat_interleave(group, dim=1).double() for x in (k_SKD, v_SKD))
    scores = torch.einsum("nhd,shd->hns", q_NHD.double(), k) * spec.attention_scale
    query = torch.arange(start, start + len(q_NHD)).unsqueeze(1)
    key = torch.arange(len(k)).unsqueeze(0)
    hidden = key > query
    if spec.windows[0] is not None:
        hidden |= key <= query - spec.windows[0]
    probabilities = scores.masked_fill(hidden, float("-inf")).softmax(-1)
    return torch.einsum("hns,shd->nhd", probabilities, v).flatten(1)


@settings(max_examples=120, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    shape=st.tuples(
        st.sampled_from([1, 2, 3]),
        st.sampled_from([1, 2, 3, 4, 5, 7, 8]),
        st.sampled_from([5, 12, 16, 24, 64, 80, 96, 128]),
    ),
    sizes=st.lists(
        st.tuples(
            st.one_of(st.integers(0, 40), st.sampled_from([496, 511, 512, 1023, 1030])),
            st.one_of(st.just(1), st.integers(1, 40)),
        ),
        min_size=1,
        max_size=4,
    ),
    block_size=st.sampled_from([1, 7, 16, 64]),
    window=st.sampled_from([None, None, 1, 3, 17, 40, 600]),
    rotated=st.sampled_from(["none", "some", "all"]),
    normed=st.booleans(),
    dtype=st.sampled_from(DTYPES),
    num_threads=st.sampled_from([1, 2, 5]),
)
def test_attention_equals_the_textbook(
    seed: int,
    shape: tuple[int, int, int],
    sizes: list[tuple[int, int]],
    block_size: int,
    window: int | None,
    rotated: str,
    normed: bool,
    dtype: torch.dtype,
    num_threads: int,
) -> None:
    torch.set_num_threads(num_threads)
    num_kv_heads, group, head_dim = shape
    even = head_dim // 2 * 2
    spec = spec_of(
        num_kv_heads, group, head_dim, {"none": 0, "some": max(2, even // 4 * 2), "all": even}[rotated], window
    )
    generator = torch.Generator().manual_seed(seed)
    norms = None
    if normed:
        weights = (torch.randn(2, head_dim, generator=generator) * 0.3 + 0.5).to(dtype)
        norms = (RMSNorm(weight=weights[0], eps=1e-5), RMSNorm(weight=weights[1], eps=1e-3))
    num_blocks = sum(-(-(start + length) // block_size) for start, length in sizes) + 2
    served = Served(spec, dtype, block_size, num_blocks, seed)
    before, chunks = [], []
    for start, length in sizes:
        blocks = served.blocks(start + length)
        kv_2KSD = torch.randn(2, num_kv_heads, start, head_dim, generator=generator).to(dtype)
        served.kv[:, :, served.slots(blocks, start)] = kv_2KSD
        before.append(kv_2KSD)
        chunks.append((start, length, blocks))
    expected_kv = served.kv.clone()
    packed = served.pack(*chunks)
    num_heads = spec.num_heads + 2 * num_kv_heads
    qkv_TE = torch.randn(packed.num_rows, num_heads * head_dim, generator=generator).to(dtype)

    got = served.attend(packed, qkv_TE, norms)

    q, k, v = heads(spec, qkv_TE)
    positions_T = torch.from_numpy(packed.positions)
    q = prepared(spec, q, positions_T, norms and norms[0])
    k = prepared(spec, k, positions_T, norms and norms[1])
    for part, (start, length, blocks), old in zip(packed.chunks, chunks, before, strict=True):
        rows = slice(part.first_row, part.first_row + length)
        new = torch.stack([k[rows], v[rows]]).transpose(1, 2)
        expected_kv[:, :, served.slots(blocks, start + length)[start:]] = new
        k_SKD, v_SKD = torch.cat([old, new], dim=2).transpose(1, 2)
        expected = textbook(spec, q[rows], k_SKD, v_SKD, start)
        torch.testing.assert_close(
            got[rows].double(), expected, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype], equal_nan=False
        )
    tolerance = TOLERANCE[dtype]
    torch.testing.assert_close(served.kv, expected_kv, atol=tolerance, rtol=tolerance, equal_nan=True)
    assert torch.equal(served.kv.isnan(), expected_kv.isnan())  # nothing is written elsewhere


def test_rows_are_equal_bit_for_bit_however_a_text_is_cut_and_placed() -> None:
    @settings(max_examples=30, deadline=None)
    @given(
        seed=st.integers(0, 2**32),
        shape=st.sampled_from([(2, 4, 64), (1, 3, 24), (2, 1, 128), (1, 7, 20)]),
        length=st.sampled_from([30, 520, 1100]),
        cuts=st.lists(st.integers(1, 1099), max_size=6),
        block_sizes=st.tuples(st.sampled_from([1, 7, 16, 64]), st.sampled_from([5, 32, 512])),
        window=st.sampled_from([None, 50, 700]),
        dtype=st.sampled_from(DTYPES),
        num_threads=st.sampled_from([1, 2, 5]),
    )
    def check(
        seed: int,
        shape: tuple[int, int, int],
        length: int,
        cuts: list[int],
        block_sizes: tuple[int, int],
        window: int | None,
        dtype: torch.dtype,
        num_threads: int,
    ) -> None:
        spec = spec_of(*shape, rotated=shape[2] // 2, window=window)
        generator = torch.Generator().manual_seed(seed)
        row_size = (spec.num_heads + 2 * spec.num_kv_heads) * spec.head_dim
        qkv_TE = torch.randn(length, row_size, generator=generator).to(dtype)

        torch.set_num_threads(1)
        whole = Served(spec, dtype, block_sizes[0], -(-length // block_sizes[0]) + 1, seed)
        expected = whole.attend(whole.pack((0, length, whole.blocks(length))), qkv_TE)
        assert expected.isfinite().all()

        torch.set_num_threads(num_threads)
        other = Served(spec, dtype, block_sizes[1], 2 * (-(-length // block_sizes[1])) + 40, seed + 1)
        blocks = other.blocks(length)
        ends = sorted({*(cut for cut in cuts if cut < length), length - 1, length})
        company = torch.randn(33, row_size, generator=generator).to(dtype)
        for start, stop in pairwise([0, *ends]):
            chunks = [(0, 33, other.blocks(33)), (start, stop - start, blocks)][:: 1 if start % 2 else -1]
            packed = other.pack(*chunks)
            parts = [
                company if size == 33 and begin == 0 and ids is not blocks else qkv_TE[start:stop]
                for begin, size, ids in chunks
            ]
            got = other.attend(packed, torch.cat(parts))
            mine = packed.chunks[0 if parts[0] is not company else 1]
            assert torch.equal(got[mine.first_row : mine.first_row + mine.num_rows], expected[start:stop])
            other._free.extend(next(ids for _, _, ids in chunks if ids is not blocks))

    check()


def test_many_short_sequences_are_each_what_they_are_alone() -> None:
    spec = spec_of(2, 4, 64, rotated=64)
    served = Served(spec, torch.bfloat16, 16, 700, 3)
    generator = torch.Generator().manual_seed(0)
    row_size = (spec.num_heads + 2 * spec.num_kv_heads) * spec.head_dim
    lengths = [1 + 37 * i % 150 for i in range(60)]
    tables = [served.blocks(length + 1) for length in lengths]
    for length, blocks in zip(lengths, tables, strict=True):
        served.attend(served.pack((0, length, blocks)), torch.randn(length, row_size, generator=generator).bfloat16())
    qkv_TE = torch.randn(len(lengths), row_size, generator=generator).bfloat16()
    together = served.attend(
        served.pack(*((length, 1, blocks) for length, blocks in zip(lengths, tables, strict=True))), qkv_TE
    )
    for row, (length, blocks) in enumerate(zip(lengths, tables, strict=True)):
        alone = served.attend(served.pack((length, 1, blocks)), qkv_TE[row : row + 1])
        assert torch.equal(alone[0], together[row])


def test_a_row_that_is_not_finite_shows_and_harms_no_other_sequence() -> None:
    spec = spec_of(2, 2, 16, rotated=16)
    served = Served(spec, torch.float32, 8, 20, 0)
    qkv_TE = torch.randn(12, 8 * 16, generator=torch.Generator().manual_seed(0))
    qkv_TE[2] = float("nan")
    got = served.attend(served.pack((0, 6, served.blocks(6)), (0, 6, served.blocks(6))), qkv_TE)
    assert got[2:6].isnan().all()
    assert got[6:].isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_huge_scores_do_not_overflow(dtype: torch.dtype) -> None:
    spec = spec_of(1, 2, 32, scale=1.0)
    served = Served(spec, dtype, 16, 50, 0)
    qkv_TE = torch.randn(600, 4 * 32, generator=torch.Generator().manual_seed(0)).to(dtype) * 30
    got = served.attend(served.pack((0, 600, served.blocks(600))), qkv_TE)
    q, k, v = heads(spec, qkv_TE)
    expected = textbook(spec, q, k, v, 0)
    torch.testing.assert_close(got.double(), expected, atol=0.3 if dtype != torch.float32 else 0.03, rtol=0.02)
