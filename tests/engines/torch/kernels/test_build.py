"""The library: one OpenMP runtime, one compilation, and a reason where there is none."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from tllm.engines.torch.kernels import build


@pytest.fixture
def fresh() -> Iterator[None]:
    """Forgets what was built before and after the test."""
    build._built.cache_clear()
    yield
    build._built.cache_clear()


def script(path: Path, text: str) -> str:
    path.write_text("#!/bin/sh\n" + text)
    path.chmod(0o755)
    return str(path)


def needs_library() -> Path:
    built = build._built()
    if isinstance(built, build.Missing):
        pytest.skip(built.reason)
    return built.path


def copying_compiler(directory: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A compiler that copies the library there is; returns where it writes a line per link."""
    library, links = needs_library(), directory / "links"
    text = f"""
case "$*" in
  *--version*) echo "copier 1.0"; exit;;
  *-shared*) echo linked >> {links};;
esac
while [ "$1" != "-o" ]; do shift; done
cp {library} "$2"
"""
    monkeypatch.setenv("CXX", script(directory / "copier", text))
    return links


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="no /proc")
def test_library_shares_the_openmp_runtime_of_torch() -> None:
    needs_library()
    names = {line.split()[-1] for line in Path("/proc/self/maps").read_text().splitlines() if "/" in line}
    runtimes = {name for name in names if Path(name).name.startswith(("libgomp", "libomp", "libiomp"))}
    assert len(runtimes) == 1


def test_regions_have_the_threads_that_torch_was_given() -> None:
    needs_library()
    library = build.library()
    assert library is not None
    before = torch.get_num_threads()
    try:
        for num_threads in (1, 2, 3):
            torch.set_num_threads(num_threads)
            assert library.tllm_num_threads() == num_threads
    finally:
        torch.set_num_threads(before)


def test_status_names_the_instructions_and_the_file() -> None:
    path = needs_library()
    assert build.status().startswith("kernels: compiled for ")
    assert build.status().endswith(str(path))
    assert build.unavailable() is None


def test_those_that_start_together_compile_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    links = copying_compiler(tmp_path, monkeypatch)
    with ThreadPoolExecutor(4) as pool:
        built = list(pool.map(lambda _: build.load(tmp_path / "cache"), range(4)))
    assert links.read_text() == "linked\n"
    assert len({b.path for b in built}) == 1
    assert [b.seconds is None for b in built].count(False) == 1
    assert sorted(p.name for p in (tmp_path / "cache").iterdir()) == sorted([built[0].path.name, "lock"])


def test_other_flags_are_another_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    copying_compiler(tmp_path, monkeypatch)
    one, other = build.load(tmp_path, ("-march=x86-64-v3",)), build.load(tmp_path, ("-march=x86-64",))
    assert one.path != other.path


def test_failed_compilation_says_why_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compiler = script(tmp_path / "broken", '[ "$1" = --version ] && exit\necho "vec.h:1: error: no luck"\nexit 1\n')
    monkeypatch.setenv("CXX", compiler)
    with pytest.raises(build.BuildError, match="no luck"):
        build.load(tmp_path / "cache")
    assert [p.name for p in (tmp_path / "cache").iterdir()] == ["lock"]


@pytest.mark.usefixtures("fresh")
def test_without_a_compiler_one_warning_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.delenv("TLLM_KERNELS", raising=False)
    with caplog.at_level(logging.WARNING):
        assert build.library() is None
        assert build.library() is None
    assert len(caplog.records) == 1
    assert "install g++" in caplog.text
    assert "install g++" in str(build.unavailable())
    assert build.status().startswith("kernels: none, because there is no C++ compiler")


@pytest.mark.usefixtures("fresh")
def test_unwritable_cache_is_a_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    needs_library()
    build._built.cache_clear()
    file = tmp_path / "file"
    file.touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(file))
    assert build.library() is None
    assert os.strerror(20) in str(build.unavailable())


@pytest.mark.usefixtures("fresh")
def test_kernels_can_be_turned_off(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setenv("TLLM_KERNELS", "off")
    assert build.library() is None
    assert build.unavailable() == "TLLM_KERNELS is off."
    assert not caplog.records
