"""Bytes and seconds as people write them. GB is 1e9 bytes, GiB is 2**30, and the two are never mixed.

This file does not know what is measured.
"""

from __future__ import annotations

import re

from tllm.core.errors import ConfigError

_BYTES_PER_UNIT = {
    "B": 1,
    "KB": 10**3,
    "MB": 10**6,
    "GB": 10**9,
    "TB": 10**12,
    "KIB": 2**10,
    "MIB": 2**20,
    "GIB": 2**30,
    "TIB": 2**40,
}
_SIZE = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([a-zA-Z]*)\s*")


def parse_bytes(text: str) -> int:
    """`4GiB`, `500 MB` or `1073741824` as a number of bytes. Raises ConfigError."""
    match = _SIZE.fullmatch(text)
    unit = (match[2].upper() or "B") if match else ""
    if match is None or unit not in _BYTES_PER_UNIT:
        raise ConfigError(f"{text!r} is not a size. Write a number and a unit, such as 4GiB, 500MB or 1073741824.")
    return int(float(match[1]) * _BYTES_PER_UNIT[unit])


def format_bytes(num_bytes: float) -> str:
    """Three significant digits and a decimal unit: `7.36 MB`."""
    for unit in ("B", "KB", "MB", "GB"):
        if abs(num_bytes) < 999.5:
            return f"{num_bytes:.3g} {unit}"
        num_bytes /= 1000
    return f"{num_bytes:.3g} TB"


def format_seconds(seconds: float) -> str:
    """Three significant digits and the unit in which they read best: `1.24 ms`."""
    for unit, factor in (("s", 1.0), ("ms", 1e3)):
        if seconds * factor >= 1:
            return f"{seconds * factor:.3g} {unit}"
    return f"{seconds * 1e6:.3g} µs"
