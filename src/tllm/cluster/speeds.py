"""Measured speeds kept: what one is found again by, a small file each, and how one crosses the control plane.

This file does not know how a speed is measured, nor what is planned by it.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import logging
import math
import os
import platform
import re
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import asdict
from itertools import pairwise
from pathlib import Path
from typing import Final

import tllm
from tllm.core.errors import FrameError
from tllm.core.types import DType, Quantization
from tllm.models.config import Config
from tllm.models.families import find_family, read_spec
from tllm.planner.profile import Speed
from tllm.transport import wire_pb2 as pb

log = logging.getLogger(__name__)

_KEPT_S: Final = 24 * 3600.0
_KEY_VERSION: Final = 2  # of what is measured: another one asks again


def speed_key(
    config: Mapping[str, object],
    dtype: DType,
    quantization: Quantization | None,
    device: str,
    num_threads: int,
    engine: str,
) -> str:
    """What a speed depends on, save the machine: equal for models of one shape, whatever their weights are.

    `config` is what a config.json says. Raises ModelError.
    """
    parsed = Config(path="the config to be measured", fields=config)
    spec = read_spec(parsed, find_family(parsed))
    shape = asdict(spec)
    for name in ("family", "max_positions", "norm_eps", "attention_scale", "tied"):
        del shape[name]
    shape["positions"] = type(spec.positions).__name__
    depends_on = [_KEY_VERSION, shape, dtype.value, str(quantization), device, num_threads, engine, tllm.__version__]
    return hashlib.sha256(json.dumps(depends_on, sort_keys=True).encode()).hexdigest()


def processor_name() -> str:
    """As its maker calls it; where that cannot be found out, its architecture."""
    try:
        if sys.platform == "linux":
            found = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
            if found is not None:
                return found[1].strip()
        if sys.platform == "darwin":
            asked = ["/usr/sbin/sysctl", "-n", "machdep.cpu.brand_string"]
            return subprocess.run(asked, capture_output=True, text=True, check=True, timeout=5).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        pass
    return platform.processor() or platform.machine()


class SpeedCache:
    """Speeds measured on this machine, a small file each. What cannot be read is not there.

    A speed is found again by its key while processor and framework are the same: a home directory may be several
    machines', and an upgrade may make all the difference.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._machine = [processor_name(), os.cpu_count(), _framework_version()]

    def get(self, key: str) -> pb.Speed | None:
        """None also for one that is old: what else the machine did when it was measured should not count for ever."""
        try:
            if time.time() - self._path(key).stat().st_mtime > _KEPT_S:
                return None
            return to_message(_read_speed(json.loads(self._path(key).read_bytes())))
        except (OSError, ValueError, RecursionError):
            return None

    def put(self, key: str, speed: pb.Speed) -> None:
        """The file is complete before it has its name. A disk that is full costs a line in the log and no more.

        Raises FrameError for a speed that contradicts itself.
        """
        text = json.dumps(asdict(from_message(speed)))
        path = self._path(key)
        temporary = path.with_name(f".{path.name}.{os.getpid()}")
        try:
            self._directory.mkdir(parents=True, exist_ok=True, mode=0o700)
            try:
                with open(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as file:
                    file.write(text)
                temporary.replace(path)
            finally:
                temporary.unlink(missing_ok=True)
        except OSError as error:
            log.warning("%s: a measured speed could not be kept: %s", path, error.strerror)

    def _path(self, key: str) -> Path:
        """A key may come from another machine: it never becomes a name as it is."""
        name = hashlib.sha256(json.dumps([key, *self._machine]).encode()).hexdigest()
        return self._directory / f"{name}.json"


def _framework_version() -> str:
    try:
        return importlib.metadata.version("torch")
    except importlib.metadata.PackageNotFoundError:
        return ""


def _read_speed(content: object) -> Speed:
    """Raises ValueError for anything that is no speed."""
    match content:
        case {
            "rows": [*rows],
            "layer_s": [*layer_s],
            "head_s": [*head_s],
            "step_s": step_s,
            "read_s": read_s,
            "pair_s": pair_s,
        }:
            pass
        case _:
            raise ValueError("a field is missing")
    if not all(type(number) is int for number in rows) or rows[:1] != [1]:
        raise ValueError(f"rows are {rows[:8]} and must be whole numbers from 1 on")
    if any(left >= right for left, right in pairwise(rows)) or not len(rows) == len(layer_s) == len(head_s):
        raise ValueError(f"rows are {rows[:8]} and must ascend, with a layer's and a head's seconds for each")
    for seconds in (*layer_s, *head_s, step_s, read_s, pair_s):
        if type(seconds) not in (int, float) or not 0 <= seconds < math.inf:
            raise ValueError(f"{seconds!r} are no seconds")
    return Speed(
        rows=tuple(rows),
        layer_s=tuple(layer_s),
        head_s=tuple(head_s),
        step_s=step_s,
        read_s=read_s,
        pair_s=pair_s,
    )


def to_message(speed: Speed) -> pb.Speed:
    return pb.Speed(
        rows=speed.rows,
        layer_s=speed.layer_s,
        head_s=speed.head_s,
        step_s=speed.step_s,
        read_s=speed.read_s,
        pair_s=speed.pair_s,
    )


def from_message(message: pb.Speed) -> Speed:
    """Raises FrameError for a speed that contradicts itself."""
    content: Mapping[str, object] = {
        "rows": list(message.rows),
        "layer_s": list(message.layer_s),
        "head_s": list(message.head_s),
        "step_s": message.step_s,
        "read_s": message.read_s,
        "pair_s": message.pair_s,
    }
    try:
        return _read_speed(content)
    except ValueError as error:
        raise FrameError(f"a measured speed that is none: {error}") from error
