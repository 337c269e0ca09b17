"""Compiles the C++ beside this file for the processor it runs on, once, and loads it.

One shared library of all `*.cpp`, kept in the user's cache (`$XDG_CACHE_HOME/tllm/kernels`) by what it depends on: the
sources, the compiler, its flags and the processor. Workers that start together wait for the one that compiles. It is
loaded after torch, so that both have one OpenMP runtime with one pool of threads. Without a compiler there is no
library, which is said once in the log; callers ask for `library()` and compute by torch where it is None.

`TLLM_KERNELS=off` does without; `TLLM_KERNELS_FLAGS` replaces the flags that choose the processor.
This file does not know what the library computes.
"""

from __future__ import annotations

import ctypes
import hashlib
import logging
import os
import platform
import re
import shlex
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch

_SOURCES = Path(__file__).parent
_FLAGS = ("-O3", "-std=c++17", "-fPIC", "-fopenmp", "-ffp-contract=off", "-fno-math-errno", "-Wno-psabi")
_COMPILE_DEADLINE_S = 300.0

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Built:
    """A library, how long compiling took, and whether that was now or in an earlier process."""

    library: ctypes.CDLL
    path: Path
    compiler: str
    seconds: float | None  # None: it was there


@dataclass(frozen=True, slots=True)
class Missing:
    """Why there is none, in words that end a sentence."""

    reason: str


class BuildError(Exception):
    """Compiling or loading failed; the message is a reason as `Missing` has it."""


def library() -> ctypes.CDLL | None:
    """The kernels, or None where they cannot be had (`unavailable` says why). Compiles at the first call."""
    built = _built()
    return built.library if isinstance(built, Built) else None


def unavailable() -> str | None:
    """Why there is no library; None when there is one."""
    built = _built()
    return built.reason if isinstance(built, Missing) else None


def status() -> str:
    """One line for a person."""
    built = _built()
    if isinstance(built, Missing):
        return f"kernels: none, because {built.reason}"
    instructions = built.library.tllm_instructions
    instructions.restype = ctypes.c_char_p
    when = "earlier" if built.seconds is None else f"in {built.seconds:.1f} s"
    return f"kernels: compiled for {instructions().decode()} by {built.compiler} {when}, kept at {built.path}"


def load(directory: Path, processor_flags: tuple[str, ...] | None = None) -> Built:
    """The library kept in the directory, compiled there if it is not. Raises BuildError.

    Afterwards the directory holds the whole library or nothing of it.
    """
    compiler = _compiler()
    version = _version(compiler)
    flags = _FLAGS + (_native_flags() if processor_flags is None else processor_flags)
    path = directory / f"kernels-{_key(version, flags)}.so"
    seconds = None
    try:
        directory.mkdir(parents=True, exist_ok=True)
        if not path.exists():
            with _alone(directory / "lock"):
                if not path.exists():
                    started = time.monotonic()
                    _compile(compiler, flags, path)
                    seconds = time.monotonic() - started
        return Built(ctypes.CDLL(str(path)), path, version, seconds)
    except OSError as error:
        raise BuildError(str(error)) from error


@cache
def _built() -> Built | Missing:
    if os.environ.get("TLLM_KERNELS", "").lower() in ("off", "0"):
        return Missing("TLLM_KERNELS is off.")
    chosen = os.environ.get("TLLM_KERNELS_FLAGS")
    try:
        built = load(_cache_directory(), None if chosen is None else tuple(shlex.split(chosen)))
    except BuildError as error:
        log.warning("No kernels for this processor, torch computes everything: %s", error)
        return Missing(str(error))
    if built.seconds is not None:
        log.info("Compiled the kernels in %.1f s", built.seconds)
    return built


def _cache_directory() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "tllm" / "kernels"


def _compiler() -> str:
    for name in (os.environ.get("CXX"), "g++", "c++", "clang++"):
        if name and (path := shutil.which(name)):
            return path
    raise BuildError("there is no C++ compiler; install g++ (Debian, Ubuntu: apt install g++).")


def _version(compiler: str) -> str:
    first, *_ = _run([compiler, "--version"]).splitlines() or [compiler]
    return re.sub(r"\s*\(.*?\)", "", first).strip()


def _native_flags() -> tuple[str, ...]:
    return ("-mcpu=native",) if platform.machine() in ("aarch64", "arm64") else ("-march=native",)


def _key(version: str, flags: tuple[str, ...]) -> str:
    digest = hashlib.sha256()
    sources = sorted(path for path in _SOURCES.iterdir() if path.suffix in (".cpp", ".h"))
    parts = [version, " ".join(flags), platform.machine(), _processor(), torch.__version__]
    for part in (*parts, *(f"{path.name}\n{path.read_text()}" for path in sources)):
        digest.update(part.encode() + b"\0")
    return digest.hexdigest()[:16]


def _processor() -> str:
    """What decides which instructions `native` means."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return "\n".join(sorted({line for line in lines if line.lower().startswith(("flags", "features", "model name"))}))


def _compile(compiler: str, flags: tuple[str, ...], path: Path) -> None:
    """One process per source, then a link, then a name."""
    with tempfile.TemporaryDirectory(dir=path.parent, prefix="compiling-") as scratch:
        sources = sorted(_SOURCES.glob("*.cpp"))
        objects = [Path(scratch) / f"{source.stem}.o" for source in sources]
        # Their output goes to files: a pipe that nobody reads fills up.
        logs = [Path(scratch) / f"{source.stem}.log" for source in sources]
        commands = [
            [compiler, *flags, "-c", str(source), "-o", str(target)]
            for source, target in zip(sources, objects, strict=True)
        ]
        processes: list[subprocess.Popen[bytes]] = []
        try:
            for command, output in zip(commands, logs, strict=True):
                with output.open("wb") as file:
                    processes.append(subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT))
            deadline = time.monotonic() + _COMPILE_DEADLINE_S
            for process, output in zip(processes, logs, strict=True):
                try:
                    code = process.wait(max(0.0, deadline - time.monotonic()))
                except subprocess.TimeoutExpired as error:
                    raise BuildError(f"compiling took longer than {_COMPILE_DEADLINE_S:.0f} s.") from error
                if code:
                    raise BuildError(_complaint(compiler, output.read_text(errors="replace")))
        finally:
            for process in processes:
                if process.poll() is None:
                    process.kill()
                    process.wait()
        linked = Path(scratch) / "linked.so"
        _run([compiler, *flags, "-shared", *map(str, objects), "-o", str(linked)])
        linked.replace(path)


def _run(command: list[str]) -> str:
    try:
        result = subprocess.run(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            timeout=_COMPILE_DEADLINE_S,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise BuildError(f"{command[0]} could not be run: {error}") from error
    if result.returncode:
        raise BuildError(_complaint(command[0], result.stdout))
    return result.stdout


def _complaint(compiler: str, output: str) -> str:
    lines = [line for line in output.splitlines() if "error" in line] or output.splitlines() or ["it said nothing"]
    return f"{compiler} failed: {lines[0].strip()}"


@contextmanager
def _alone(path: Path) -> Iterator[None]:
    """While one process is inside, others wait. A process that dies inside frees it."""
    try:
        import fcntl
    except ImportError:  # not a POSIX machine: the last name wins, and all are the same
        yield
        return
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
