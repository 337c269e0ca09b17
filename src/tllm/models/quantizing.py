"""A checkpoint with plain weights, written anew with quantized ones.

    config.json         the original's, with "quantization"
    model*.safetensors  X.weight, X.scales and X.biases of every quantized matrix X, all else as it was
    the rest            tokenizer, template, generation_config.json, license: copied

Rows go through memory a run at a time, so that neither the model nor its largest tensor need fit. The directory appears
under its name when it is whole and has been opened, or not at all.

This file does not know how numbers are chosen for codes, only what becomes of them.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from io import FileIO
from pathlib import Path
from typing import BinaryIO, Final

import numpy as np
from numpy.typing import NDArray

from tllm.core.errors import ModelError
from tllm.core.types import Quantization
from tllm.core.units import format_bytes
from tllm.models.checkpoint import Checkpoint
from tllm.models.grouped import Floats, Grouped, narrowed, packed, widened
from tllm.models.headers import INDEX_FILE, SINGLE_FILE, TensorInfo, tensor_bytes
from tllm.models.hub import SMALL_FILES
from tllm.models.layouts import Band, read_band
from tllm.models.manifest import MANIFEST_FILE
from tllm.models.slicing import held_format
from tllm.models.spec import GroupedFormat

QuantizeRows = Callable[[Floats, GroupedFormat], Grouped]  # rows (_, K), each of them by itself

_FILE_BYTES: Final = 4 << 30
_RUN_BYTES: Final = 64 << 20  # of fp32 rows
_COPIED: Final = (*SMALL_FILES, "*.jinja", "LICENSE*", "NOTICE*", "USE_POLICY*")
_NOT_COPIED: Final = ("config.json", "*.safetensors.index.json", MANIFEST_FILE)
_TEMPLATES: Final = "additional_chat_templates"


@dataclass(frozen=True, slots=True, kw_only=True)
class _Entry:
    """One tensor to be written."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        return tensor_bytes(self.dtype, self.shape)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Job:
    """One stored tensor, and what is made of it: itself, or codes, scales and maybe offsets."""

    source: str
    entries: tuple[_Entry, ...]
    format: GroupedFormat | None
    transpose: bool  # stored as (inputs, outputs)

    @property
    def num_bytes(self) -> int:
        return sum(entry.num_bytes for entry in self.entries)


def write_quantized(
    checkpoint: Checkpoint,
    target: Path,
    quantization: Quantization,
    quantize_rows: QuantizeRows,
    progress: Callable[[int, int], None] = lambda done, total: None,
    *,
    file_bytes: int = _FILE_BYTES,
) -> None:
    """Write the model to the new directory `target`, which holds the very weights that loading it with this
    quantization would make. `progress` gets the bytes written and those in all.

    Raises ModelError when the target exists, the disk is too small or refuses, or the model is quantized already; then
    nothing is left behind.
    """
    if target.exists():
        raise ModelError(f"{target} exists; give a directory that does not.")
    if checkpoint.quantized_weights or checkpoint.method is not None:
        raise ModelError(f"{checkpoint.directory} is quantized already ({checkpoint.method}).")
    if not checkpoint.directory.is_dir():
        raise ModelError(f"{checkpoint.directory} is a GGUF file; take the model in the Hugging Face layout.")
    jobs = _jobs(checkpoint, quantization)
    total = sum(job.num_bytes for job in jobs)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(target.parent).free
        if free < total:
            raise ModelError(f"{target.parent} has {format_bytes(free)} left; the model takes {format_bytes(total)}.")
        made = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}."))
        try:
            made.chmod(0o777 & ~_umask())
            _copy_files(checkpoint.directory, made)
            (made / "config.json").write_text(json.dumps(_config(checkpoint, jobs), indent=2) + "\n")
            _write_weights(checkpoint, made, jobs, quantize_rows, progress, file_bytes)
            Checkpoint.open(made)
            made.rename(target)
        except BaseException:
            shutil.rmtree(made, ignore_errors=True)
            raise
    except OSError as error:
        raise ModelError(f"{target} cannot be written: {error.strerror}.") from error


def _jobs(checkpoint: Checkpoint, quantization: Quantization) -> list[_Job]:
    """Of every stored tensor, in the order of the checkpoint's files."""
    formats: dict[str, GroupedFormat] = {}
    transposed = set()
    for target, source in checkpoint.sources.items():
        info = checkpoint.tensors.get(source.name)
        if info is None or len(info.shape) != 2:
            continue
        if source.transpose:
            transposed.add(source.name)
        found = held_format(target, info.shape[0 if source.transpose else 1], quantization)
        if found is not None:
            formats[source.name] = found
    ordered = sorted(
        checkpoint.tensors, key=lambda name: (checkpoint.tensors[name].file, checkpoint.tensors[name].offset)
    )
    return [_job(name, checkpoint.tensors[name], formats.get(name), name in transposed) for name in ordered]


def _job(name: str, info: TensorInfo, held: GroupedFormat | None, transpose: bool) -> _Job:
    if held is None:
        entries = [_Entry(name=name, dtype=info.dtype, shape=info.shape)]
    else:
        num_outputs, num_inputs = reversed(info.shape) if transpose else info.shape
        base = name.removesuffix(".weight")
        word_bits = 32 if num_inputs * held.bits % 32 == 0 else 8
        codes = (num_outputs, num_inputs * held.bits // word_bits)
        groups = (num_outputs, num_inputs // held.group)
        entries = [
            _Entry(name=f"{base}.weight", dtype=f"U{word_bits}", shape=codes),
            _Entry(name=f"{base}.scales", dtype=held.scale_dtype, shape=groups),
        ]
        if not held.symmetric:
            entries.append(_Entry(name=f"{base}.biases", dtype=held.scale_dtype, shape=groups))
    return _Job(source=name, entries=tuple(entries), format=held, transpose=transpose)


def _config(checkpoint: Checkpoint, jobs: Sequence[_Job]) -> dict[str, object]:
    """With what most matrices have under "quantization", and the others by their names."""
    sections = {job.source.removesuffix(".weight"): _section(job.format) for job in jobs if job.format is not None}
    usual = Counter(map(json.dumps, sections.values())).most_common(1)[0][0]
    section: dict[str, object] = json.loads(usual)
    section |= {name: own for name, own in sections.items() if json.dumps(own) != usual}
    config = dict(checkpoint.config)
    dtypes = [name for name in ("dtype", "torch_dtype") if name in config] or ["dtype"]
    return config | dict.fromkeys(dtypes, checkpoint.dtype.value) | {"quantization": section}


def _section(held: GroupedFormat) -> dict[str, object]:
    if held.symmetric:
        return {"group_size": None, "bits": held.bits, "mode": "symmetric"}
    return {"group_size": held.group, "bits": held.bits, "mode": "affine"}


def _write_weights(
    checkpoint: Checkpoint,
    directory: Path,
    jobs: Sequence[_Job],
    quantize_rows: QuantizeRows,
    progress: Callable[[int, int], None],
    file_bytes: int,
) -> None:
    files = _divided(jobs, file_bytes)
    names = [f"model-{number:05}-of-{len(files):05}.safetensors" for number in range(1, len(files) + 1)]
    if len(files) == 1:
        names = [SINGLE_FILE]
    total = sum(job.num_bytes for job in jobs)
    written = 0
    with _Reader() as read:
        for name, part in zip(names, files, strict=True):
            with (directory / name).open("wb") as file:
                places = _write_header(file, part)
                for job in part:
                    for entry, at, data in _pieces(checkpoint, job, quantize_rows, read):
                        file.seek(places[entry.name] + at)
                        written += file.write(data)
                        progress(written, total)
    if len(files) > 1:
        weight_map = {
            entry.name: name for name, part in zip(names, files, strict=True) for job in part for entry in job.entries
        }
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (directory / INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n")


def _divided(jobs: Sequence[_Job], file_bytes: int) -> list[list[_Job]]:
    """Consecutive parts of about that size, none empty."""
    parts: list[list[_Job]] = []
    size = 0
    for job in jobs:
        if not parts or size + job.num_bytes > file_bytes:
            parts.append([])
            size = 0
        parts[-1].append(job)
        size += job.num_bytes
    return parts


def _write_header(file: BinaryIO, jobs: Sequence[_Job]) -> dict[str, int]:
    """Where each tensor's bytes belong in the file."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    places: dict[str, int] = {}
    offset = 0
    for job in jobs:
        for entry in job.entries:
            offsets = [offset, offset + entry.num_bytes]
            header[entry.name] = {"dtype": entry.dtype, "shape": list(entry.shape), "data_offsets": offsets}
            places[entry.name] = offset
            offset += entry.num_bytes
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    file.write(len(text).to_bytes(8, "little") + text)
    return {name: 8 + len(text) + place for name, place in places.items()}


def _pieces(
    checkpoint: Checkpoint, job: _Job, quantize_rows: QuantizeRows, read: _Reader
) -> Iterator[tuple[_Entry, int, bytes | memoryview]]:
    """The bytes of the job's tensors, run of rows by run of rows, and where in its tensor each belongs."""
    info = checkpoint.tensors[job.source]
    if job.format is None:
        [entry] = job.entries
        for at in range(0, info.num_bytes, _RUN_BYTES):
            yield entry, at, read.bytes(info.file, info.offset + at, min(_RUN_BYTES, info.num_bytes - at))
        return
    num_outputs, num_inputs = reversed(info.shape) if job.transpose else info.shape
    at_once = max(1, _RUN_BYTES // 4 // num_inputs)
    for first in range(0, num_outputs, at_once):
        rows = range(first, min(first + at_once, num_outputs))
        made = quantize_rows(_rows(job, info, rows, num_inputs, read), job.format)
        assert (made.bits, made.group) == (job.format.bits, job.format.group), job
        assert (made.offset is None, made.input_order) == (job.format.symmetric, None), job
        arrays: list[NDArray[np.generic]] = [
            packed(made.codes, made.bits),
            narrowed(made.scale, job.format.scale_dtype),
        ]
        if made.offset is not None:
            arrays.append(narrowed(made.offset, job.format.scale_dtype))
        for entry, array in zip(job.entries, arrays, strict=True):
            yield entry, first * (entry.num_bytes // num_outputs), np.ascontiguousarray(array).data.cast("B")


def _rows(job: _Job, info: TensorInfo, rows: range, num_inputs: int, read: _Reader) -> Floats:
    """Outputs of the stored matrix in fp32."""
    columns = range(num_inputs)
    band = Band(name=job.source, rows=columns if job.transpose else rows, columns=rows if job.transpose else columns)
    stored = read_band(info, band, read)
    return np.ascontiguousarray(widened(stored.T if job.transpose else stored, info.dtype))


class _Reader(contextlib.ExitStack):
    """Reads parts of tensors; files are open as long as the `with` block."""

    def __init__(self) -> None:
        super().__init__()
        self._files: dict[Path, FileIO] = {}

    def __call__(self, info: TensorInfo) -> bytes:
        return self.bytes(info.file, info.offset, info.num_bytes)

    def bytes(self, path: Path, offset: int, num_bytes: int) -> bytes:
        if path not in self._files:
            self._files[path] = self.enter_context(FileIO(path))
        data = bytearray()
        while len(data) < num_bytes:
            piece = os.pread(self._files[path].fileno(), num_bytes - len(data), offset + len(data))
            if not piece:
                raise ModelError(f"{path} ends before byte {offset + num_bytes}.")
            data += piece
        return bytes(data)


def _copy_files(source: Path, target: Path) -> None:
    """The small ones that are none of weights."""
    for path in sorted(source.iterdir()):
        kept = path.is_file() and any(fnmatch(path.name, pattern) for pattern in _COPIED)
        if kept and not any(fnmatch(path.name, pattern) for pattern in _NOT_COPIED):
            shutil.copyfile(path, target / path.name)
    if (source / _TEMPLATES).is_dir():
        (target / _TEMPLATES).mkdir()
        for path in (source / _TEMPLATES).glob("*.jinja"):
            shutil.copyfile(path, target / _TEMPLATES / path.name)


def _umask() -> int:
    mask = os.umask(0o077)
    os.umask(mask)
    return mask
