"""The safetensors files of a directory, by their headers: which tensor lies where, and a digest that tells them from
others.

A file is: 8 bytes, little-endian, the length N of the header; N bytes of JSON; the tensors' bytes, back to back. The
JSON maps a name to dtype, shape and data_offsets [begin, end) counted from the end of the header
(https://huggingface.co/docs/safetensors, "Format").

Two finetunes of one model have equal headers. So the digest holds a few bytes of every tensor too: three reads of 64
bytes each, where a hash of everything would read the whole checkpoint before anything starts.

This file does not know configs, families, or how a tensor is used.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Final

from tllm.core.errors import ModelError

MAX_HEADER_BYTES: Final = 100_000_000  # the format's own limit
SINGLE_FILE: Final = "model.safetensors"
INDEX_FILE: Final = "model.safetensors.index.json"
SAMPLE_BYTES: Final = 64

# Bytes per element of every dtype that fills whole bytes.
ELEMENT_BYTES: Final[Mapping[str, int]] = {
    "F64": 8, "F32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1, "C64": 8,
    "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U64": 8, "U32": 4, "U16": 2, "U8": 1, "BOOL": 1,
}  # fmt: skip

# Weights and bytes of one block, of the types whose elements come in blocks along a row (ggml's, see `layouts.py`).
BLOCKS: Final[Mapping[str, tuple[int, int]]] = {
    "Q4_0": (32, 18), "Q4_1": (32, 20), "Q5_0": (32, 22), "Q5_1": (32, 24), "Q8_0": (32, 34),
    "Q4_K": (256, 144), "Q5_K": (256, 176), "Q6_K": (256, 210),
}  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorInfo:
    """Where a tensor's bytes are: `num_bytes` from the absolute `offset` of `file`, row-major, little-endian."""

    file: Path
    dtype: str  # as in the header: F32, BF16, ...
    shape: tuple[int, ...]
    offset: int
    num_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredTensors:
    """All tensors of a directory by name, and a hash of all headers, their files' names and sizes, and of a sample of
    every tensor's bytes."""

    tensors: Mapping[str, TensorInfo]
    digest: bytes


def read_directory(directory: Path) -> StoredTensors:
    """Read the headers of model.safetensors, else of all files that the index names.

    Raises ModelError when there are no such files, when one is missing, truncated or contradicts itself, and when a
    tensor is not in the file that the index gives for it.
    """
    placed = _places(directory)
    names = sorted(set(placed.values())) or [SINGLE_FILE]
    return store_tensors(directory, placed, [_read_file(directory / name) for name in names], read_samples)


@dataclass(frozen=True, slots=True, kw_only=True)
class HeaderFile:
    """One safetensors file, of which only the header was read."""

    path: Path
    num_bytes: int
    header: bytes
    tensors: Mapping[str, TensorInfo]


SampleReader = Callable[[Path, "list[range]"], bytes]  # the bytes of these ranges of a file, one after the other


def store_tensors(
    directory: Path, placed: Mapping[str, str], files: Iterable[HeaderFile], sample: SampleReader
) -> StoredTensors:
    """The tensors of all files, of those where the index puts them (empty: there is none), and their digest.

    Raises ModelError when a tensor is not where the index says.
    """
    hash_ = hashlib.sha256()
    tensors: dict[str, TensorInfo] = {}
    for file in files:
        name = file.path.name
        found = {tensor: info for tensor, info in file.tensors.items() if not placed or placed.get(tensor) == name}
        hash_.update(f"{name}\0{file.num_bytes}\0".encode() + hashlib.sha256(file.header).digest())
        hash_.update(hashlib.sha256(sample(file.path, sample_ranges(found.values()))).digest())
        tensors |= found
    for tensor, name in placed.items():
        if tensor not in tensors:
            raise ModelError(f"{directory / INDEX_FILE} says that {tensor} is in {name}, but it is not there.")
    return StoredTensors(tensors=tensors, digest=hash_.digest())


def sample_ranges(tensors: Iterable[TensorInfo]) -> list[range]:
    """What the digest holds of the tensors of one file: the first, middle and last bytes of each, in their order."""
    ranges = []
    for info in sorted(tensors, key=lambda info: (info.offset, info.num_bytes)):
        size = min(SAMPLE_BYTES, info.num_bytes)
        spare = info.num_bytes - size
        starts = sorted({0, spare // 2, spare}) if size else ()
        ranges += [range(info.offset + start, info.offset + start + size) for start in starts]
    return ranges


def read_samples(path: Path, ranges: list[range]) -> bytes:
    try:
        with path.open("rb") as file:
            return b"".join(os.pread(file.fileno(), len(part), part.start) for part in ranges)
    except OSError as error:
        raise ModelError(f"{path} cannot be read: {error.strerror}.") from error


def _read_file(path: Path) -> HeaderFile:
    header, tensors = read_header(path)
    return HeaderFile(path=path, num_bytes=path.stat().st_size, header=header, tensors=tensors)


def read_header(path: Path) -> tuple[bytes, dict[str, TensorInfo]]:
    """The raw header of one file and its tensors. Raises ModelError naming the file and what is wrong with it."""
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            header = file.read(header_length(path, file.read(8), size))
    except OSError as error:
        raise ModelError(f"{path} cannot be read: {error.strerror}.") from error
    return header, parse_header(path, header, size)


def header_length(path: Path, start: bytes, file_size: int) -> int:
    """The length of the header of a file that begins with these 8 bytes. Raises ModelError."""
    length = int.from_bytes(start, "little")
    if len(start) < 8 or length > file_size - 8:
        raise ModelError(f"{path} is truncated: it has {file_size} bytes and its header alone would take {length}.")
    if length > MAX_HEADER_BYTES:
        raise ModelError(f"{path}: a header of {length} bytes is too large, {MAX_HEADER_BYTES} are allowed.")
    return length


def parse_header(path: Path, header: bytes, file_size: int) -> dict[str, TensorInfo]:
    """The tensors of a header; the file itself is not touched. Raises ModelError."""
    try:
        entries = json.loads(header)
    except (ValueError, RecursionError) as error:
        raise ModelError(f"{path} is not a safetensors file: its header is not JSON ({error}).") from error
    if not isinstance(entries, dict):
        raise ModelError(f"{path} is not a safetensors file: its header is not a JSON object.")
    entries.pop("__metadata__", None)
    data_start = 8 + len(header)
    tensors = {name: _tensor(path, name, entry, data_start=data_start) for name, entry in entries.items()}
    _check_layout(path, tensors, data_start=data_start, file_size=file_size)
    return tensors


def _tensor(path: Path, name: str, entry: object, *, data_start: int) -> TensorInfo:
    match entry:
        case {"dtype": str(dtype), "shape": [*shape], "data_offsets": [int(begin), int(end)]}:
            pass
        case _:
            raise ModelError(f"{path}: the header's entry of {name} lacks dtype, shape or data_offsets.")
    if dtype not in ELEMENT_BYTES:
        raise ModelError(f"{path}: {name} has the unknown dtype {dtype}; known are {', '.join(ELEMENT_BYTES)}.")
    if not all(isinstance(size, int) and 0 <= size < 2**63 for size in shape):
        raise ModelError(f"{path}: {name} has the shape {shape}, which is not a list of sizes.")
    num_bytes = tensor_bytes(dtype, shape)
    if begin < 0 or end - begin != num_bytes:
        raise ModelError(
            f"{path}: {name}, {dtype} of shape {shape}, takes {num_bytes} bytes, but its offsets are [{begin}, {end})."
        )
    return TensorInfo(file=path, dtype=dtype, shape=tuple(shape), offset=data_start + begin, num_bytes=num_bytes)


def tensor_bytes(dtype: str, shape: Iterable[int]) -> int:
    """Of a tensor of a known dtype; one of blocks has whole blocks in every row."""
    if dtype in BLOCKS:
        size, num_bytes = BLOCKS[dtype]
        return math.prod(shape) // size * num_bytes
    return math.prod(shape) * ELEMENT_BYTES[dtype]


def _check_layout(path: Path, tensors: Mapping[str, TensorInfo], *, data_start: int, file_size: int) -> None:
    """The tensors must fill the rest of the file without gap or overlap, as the format demands."""
    position, previous = data_start, "the header"
    for name, info in sorted(tensors.items(), key=lambda item: (item[1].offset, item[1].num_bytes)):
        if info.offset != position:
            problem = "overlaps" if info.offset < position else "leaves a gap after"
            raise ModelError(f"{path}: {name} {problem} {previous}.")
        position, previous = info.offset + info.num_bytes, name
    if position > file_size:
        raise ModelError(f"{path} is truncated: its tensors end at byte {position}, the file at {file_size}.")
    if position < file_size:
        raise ModelError(f"{path} has {file_size - position} bytes after its last tensor, {previous}.")


def _places(directory: Path) -> dict[str, str]:
    """Tensor name -> file name from the index; empty when a single file holds everything."""
    if (directory / SINGLE_FILE).is_file():
        return {}
    index = directory / INDEX_FILE
    if not index.is_file():
        raise ModelError(_no_weights(directory))
    weight_map = parse_index(index, index.read_bytes())
    for tensor, name in weight_map.items():
        if not (directory / name).is_file():
            raise ModelError(f"{index} places {tensor} in {name}, which is missing; download the model again.")
    return weight_map


def parse_index(index: Path, data: bytes) -> dict[str, str]:
    """Tensor name -> name of a neighbouring file, from the bytes of an index. Raises ModelError."""
    try:
        content = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise ModelError(f"{index} is not JSON: {error}.") from error
    weight_map = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise ModelError(f"{index} has no weight_map from tensors to files.")
    for tensor, name in weight_map.items():
        # An index is a stranger's file: it may name its neighbours and nothing else on this machine.
        if not isinstance(name, str) or PurePosixPath(name).name != name or not name.endswith(".safetensors"):
            raise ModelError(f"{index} places {tensor} in {name!r}, which is not the name of a safetensors file.")
    return weight_map


def _no_weights(directory: Path) -> str:
    def names(pattern: str) -> list[str]:
        return sorted(path.name for path in directory.glob(pattern))

    if found := names("*.safetensors"):
        return (
            f"{directory} has {found[0]}{' and others' if len(found) > 1 else ''}, but neither {SINGLE_FILE} nor "
            f"{INDEX_FILE}; download the model again, or rename its only file to {SINGLE_FILE}."
        )
    if found := names("*.bin") + names("*.pt") + names("*.pth"):
        return (
            f"{directory} has its weights as {found[0]}, a pickle, which tllm never opens because it can run code. "
            "Convert them to safetensors, or take a revision of the model that has them."
        )
    return f"{directory} has no weights: neither {SINGLE_FILE} nor {INDEX_FILE}."
