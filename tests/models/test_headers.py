"""Safetensors headers: what is read from good files, and what is said about bad ones."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

from tllm.core.errors import ModelError
from tllm.models.headers import INDEX_FILE, read_directory, read_header

GOOD = {"a": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}}


def write(path: Path, header: object, data: bytes = b"", *, length: int | None = None) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes((len(text) if length is None else length).to_bytes(8, "little") + text + data)
    return path


def test_tensors_of_a_file_written_by_safetensors_lie_where_the_header_says(tmp_path: Path) -> None:
    arrays = {
        "x": np.arange(6, dtype=np.float32).reshape(2, 3),
        "half": np.ones((4,), dtype=np.float16),
        "empty": np.zeros((0, 3), dtype=np.float32),
        "scalar": np.array(7, dtype=np.int64),
        "byte": np.array([1, 2, 3], dtype=np.uint8),
    }
    save_file(arrays, tmp_path / "model.safetensors", metadata={"format": "pt"})
    _, tensors = read_header(tmp_path / "model.safetensors")
    data = (tmp_path / "model.safetensors").read_bytes()
    assert tensors.keys() == arrays.keys()
    for name, info in tensors.items():
        assert info.shape == arrays[name].shape
        assert data[info.offset : info.offset + info.num_bytes] == arrays[name].tobytes()


@pytest.mark.parametrize(
    ("header", "data", "message"),
    [
        (GOOD, b"x" * 23, "is truncated: its tensors end at byte"),
        (GOOD, b"x" * 25, "has 1 bytes after its last tensor, a"),
        (b"{", b"", "is not a safetensors file: its header is not JSON"),
        (b"[" * 100_000, b"", "is not a safetensors file: its header is not JSON"),
        (b"\xff\xfe", b"", "is not a safetensors file: its header is not JSON"),
        ([], b"", "is not a safetensors file: its header is not a JSON object"),
        ({"a": 3}, b"", "the header's entry of a lacks dtype, shape or data_offsets"),
        ({"a": {"dtype": "F32", "shape": [1]}}, b"", "entry of a lacks dtype, shape or data_offsets"),
        ({"a": {"dtype": "F32", "shape": [1], "data_offsets": [0]}}, b"", "entry of a lacks"),
        ({"a": {"dtype": "Q4", "shape": [1], "data_offsets": [0, 1]}}, b"x", "a has the unknown dtype Q4; known are"),
        ({"a": {"dtype": "F32", "shape": [-1], "data_offsets": [0, -4]}}, b"", "a has the shape [-1]"),
        ({"a": {"dtype": "F32", "shape": [1.5], "data_offsets": [0, 6]}}, b"", "a has the shape [1.5]"),
        ({"a": {"dtype": "F32", "shape": [10**300], "data_offsets": [0, 4]}}, b"", "which is not a list of sizes"),
        ({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}}, b"xxxx", "8 bytes, but its offsets are [0, 4)"),
        ({"a": {"dtype": "F32", "shape": [1], "data_offsets": [-4, 0]}}, b"", "its offsets are [-4, 0)"),
        (
            {
                "a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]},
                "b": {"dtype": "F32", "shape": [2], "data_offsets": [4, 12]},
            },
            b"x" * 12,
            "b overlaps a",
        ),
        (
            {
                "a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]},
                "b": {"dtype": "F32", "shape": [1], "data_offsets": [8, 12]},
            },
            b"x" * 12,
            "b leaves a gap after a",
        ),
        ({"a": {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]}}, b"x" * 8, "a leaves a gap after the header"),
    ],
)  # fmt: skip
def test_a_bad_header_is_refused_by_file_and_tensor(tmp_path: Path, header: object, data: bytes, message: str) -> None:
    path = write(tmp_path / "model.safetensors", header, data)
    with pytest.raises(ModelError) as caught:
        read_header(path)
    assert str(path) in str(caught.value)
    assert message in str(caught.value)


def test_a_header_longer_than_its_file_is_a_truncated_file(tmp_path: Path) -> None:
    path = write(tmp_path / "model.safetensors", GOOD, length=10**15)
    with pytest.raises(ModelError, match=r"truncated: it has \d+ bytes and its header alone would take 10{15}"):
        read_header(path)
    path.write_bytes(b"\0" * 5)
    with pytest.raises(ModelError, match="truncated: it has 5 bytes"):
        read_header(path)


def test_a_header_above_the_formats_limit_is_refused_unread(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    with path.open("wb") as file:
        file.write((100_000_001).to_bytes(8, "little"))
        file.truncate(200_000_000)  # sparse
    with pytest.raises(ModelError, match="a header of 100000001 bytes is too large"):
        read_header(path)


@given(data=st.binary(max_size=200), junk=st.sampled_from([b"", b"{}", b'{"a":', b'{"a":{"dtype":"F32","shape":[']))
def test_no_bytes_make_the_reader_fail_otherwise(
    tmp_path_factory: pytest.TempPathFactory, data: bytes, junk: bytes
) -> None:
    path = tmp_path_factory.getbasetemp() / "any.safetensors"
    write(path, junk + data)
    try:
        read_header(path)
    except ModelError:
        pass


def save_two(directory: Path) -> dict[str, str]:
    save_file({"a": np.ones(2, np.float32), "b": np.ones(3, np.float32)}, directory / "one.safetensors")
    save_file({"c": np.ones(4, np.float32)}, directory / "two.safetensors")
    return {"a": "one.safetensors", "b": "one.safetensors", "c": "two.safetensors"}


def write_index(directory: Path, index: object) -> None:
    (directory / INDEX_FILE).write_text(json.dumps(index))


def test_an_index_leads_to_all_its_files(tmp_path: Path) -> None:
    write_index(tmp_path, {"metadata": {}, "weight_map": save_two(tmp_path)})
    found = read_directory(tmp_path)
    assert {name: info.file.name for name, info in found.tensors.items()} == save_two(tmp_path)


def test_the_digest_changes_with_names_shapes_and_sizes_but_not_with_the_place(tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    for directory in (first, second):
        directory.mkdir()
        write_index(directory, {"weight_map": save_two(directory)})
    assert read_directory(first).digest == read_directory(second).digest
    save_file({"c": np.ones(5, np.float32)}, second / "two.safetensors")
    assert read_directory(first).digest != read_directory(second).digest


def test_of_two_tensors_of_one_name_the_index_chooses(tmp_path: Path) -> None:
    save_file({"a": np.ones(2, np.float32)}, tmp_path / "one.safetensors")
    save_file({"a": np.ones(3, np.float32), "b": np.ones(1, np.float32)}, tmp_path / "two.safetensors")
    for chosen, shape in (("one", (2,)), ("two", (3,))):
        write_index(tmp_path, {"weight_map": {"b": "two.safetensors", "a": f"{chosen}.safetensors"}})
        assert read_directory(tmp_path).tensors["a"].shape == shape


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ({"weight_map": {"a": "gone.safetensors"}}, "places a in gone.safetensors, which is missing"),
        ({"weight_map": {"c": "one.safetensors"}}, "says that c is in one.safetensors, but it is not there"),
        ({"weight_map": {"a": "../one.safetensors"}}, "places a in '../one.safetensors', which is not the name"),
        ({"weight_map": {"a": "/etc/passwd"}}, "places a in '/etc/passwd', which is not the name"),
        ({"weight_map": {"a": "one.bin"}}, "which is not the name of a safetensors file"),
        ({"weight_map": {"a": 3}}, "places a in 3, which is not the name of a safetensors file"),
        ({"weight_map": {}}, "has no weight_map from tensors to files"),
        ([], "has no weight_map from tensors to files"),
    ],
)
def test_a_bad_index_is_refused_by_tensor_and_file(tmp_path: Path, index: object, message: str) -> None:
    save_two(tmp_path)
    write_index(tmp_path, index)
    with pytest.raises(ModelError) as caught:
        read_directory(tmp_path)
    assert message in str(caught.value)


def test_an_index_that_is_not_json_is_refused(tmp_path: Path) -> None:
    (tmp_path / INDEX_FILE).write_text("{")
    with pytest.raises(ModelError, match=r"model\.safetensors\.index\.json is not JSON"):
        read_directory(tmp_path)


@pytest.mark.parametrize(
    ("file", "message"),
    [
        ("pytorch_model.bin", "pytorch_model.bin, a pickle, which tllm never opens .* Convert them to safetensors"),
        ("consolidated.00.pth", "consolidated.00.pth, a pickle"),
        ("model-00001-of-00002.safetensors", "neither model.safetensors nor model.safetensors.index.json; download"),
        ("README.md", "has no weights: neither model.safetensors nor model.safetensors.index.json"),
    ],
)
def test_a_directory_without_safetensors_says_what_to_do(tmp_path: Path, file: str, message: str) -> None:
    (tmp_path / file).write_bytes(b"x")
    with pytest.raises(ModelError, match=message):
        read_directory(tmp_path)


def test_a_single_file_goes_before_an_index(tmp_path: Path) -> None:
    write_index(tmp_path, {"weight_map": save_two(tmp_path)})
    save_file({"z": np.ones(2, np.float32)}, tmp_path / "model.safetensors")
    assert list(read_directory(tmp_path).tensors) == list(load_file(tmp_path / "model.safetensors"))
