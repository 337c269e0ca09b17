"""Numbers with units as people write them, and as they are told.

    4GiB  500 MB            bytes            GB is 1e9 bytes, GiB is 2**30, and the two are never mixed
    50ms  2 s               seconds
    100Mb/s  125MB/s        bytes a second   bits have a small b, bytes a capital B: 8 of the one are 1 of the other
    312T  312e12            FLOP a second

Bytes and seconds inside; bits only where the figure of a network is read or told. A `Quantity` is a number that cannot
be told without its unit, nor added to one of another.

This file does not know what is measured.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import StrEnum
from typing import Final

from tllm.core.errors import ConfigError


class Unit(StrEnum):
    """What a number counts. The value is how programs are told."""

    BYTES = "bytes"
    BYTES_PER_S = "bytes/s"
    BITS_PER_S = "bits/s"
    FLOP = "FLOP"
    FLOP_PER_S = "FLOP/s"
    SECONDS = "s"
    TOKENS = "tokens"
    TOKENS_PER_S = "tokens/s"
    PARAMETERS = "parameters"
    LAYERS = "layers"
    COUNT = "count"
    RATIO = "ratio"
    BITS = "bits"


# How units with decimal prefixes are told; the others stand as they are.
_PREFIXED: Final = {
    Unit.BYTES: "B",
    Unit.BYTES_PER_S: "B/s",
    Unit.BITS_PER_S: "b/s",
    Unit.FLOP: "FLOP",
    Unit.FLOP_PER_S: "FLOP/s",
}
_PLAIN: Final = {
    Unit.TOKENS: " tokens",
    Unit.TOKENS_PER_S: " tokens/s",
    Unit.PARAMETERS: " parameters",
    Unit.LAYERS: " layers",
    Unit.BITS: " bits",
    Unit.COUNT: "",
}
_LARGEST_EXACT: Final = 10**7  # whole numbers below are told to the last digit


@dataclass(frozen=True, slots=True)
class Quantity:
    """A number and its unit. Sums and comparisons of different units raise TypeError: they are bugs."""

    value: float
    unit: Unit

    def __add__(self, other: Quantity) -> Quantity:
        return Quantity(self.value + self._same(other).value, self.unit)

    def __sub__(self, other: Quantity) -> Quantity:
        return Quantity(self.value - self._same(other).value, self.unit)

    def __lt__(self, other: Quantity) -> bool:
        return self.value < self._same(other).value

    def _same(self, other: Quantity) -> Quantity:
        if not isinstance(other, Quantity) or other.unit is not self.unit:
            unit = other.unit.value if isinstance(other, Quantity) else type(other).__name__
            raise TypeError(f"{self.unit.value} and {unit} cannot be added or compared")
        return other

    def as_bits(self) -> Quantity:
        """The same rate in bits a second."""
        if self.unit is not Unit.BYTES_PER_S:
            raise TypeError(f"{self.unit.value} are no bytes/s")
        return Quantity(self.value * 8, Unit.BITS_PER_S)

    def text(self) -> str:
        """A number, a space and the unit, in the size in which it reads best: whole numbers to the last digit where
        they have no more than seven, all else with four digits. Parameters, tokens and counts are always exact."""
        if self.unit is Unit.SECONDS:
            return format_seconds(self.value, num_digits=4)
        if self.unit is Unit.RATIO:
            return f"{self.value * 100:.3g} %"
        if self.unit in _PREFIXED:
            if _is_whole(self.value) and abs(self.value) < _LARGEST_EXACT and self.unit in (Unit.BYTES, Unit.FLOP):
                return self.exact_text()
            return _prefixed(self.value, _PREFIXED[self.unit], num_digits=4)
        return self.exact_text() if _is_whole(self.value) else f"{_digits(self.value, 4)}{_PLAIN[self.unit]}"

    def exact_text(self) -> str:
        """Every digit of a whole number; others as `text` has them."""
        if not _is_whole(self.value) or self.unit in (Unit.SECONDS, Unit.RATIO):
            return self.text()
        unit = f" {_PREFIXED[self.unit]}" if self.unit in _PREFIXED else _PLAIN[self.unit]
        return f"{int(self.value):,}{unit}"

    def binary_text(self) -> str:
        """Bytes in KiB, MiB, GiB; TypeError for all else."""
        if self.unit is not Unit.BYTES:
            raise TypeError(f"{self.unit.value} are no bytes")
        value = self.value
        for unit in ("B", "KiB", "MiB", "GiB"):
            if abs(value) < 1023.95:
                return f"{_digits(value, 4)} {unit}"
            value /= 1024
        return f"{_digits(value, 4)} TiB"


def _is_whole(value: float) -> bool:
    return isinstance(value, int)


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
_NUMBER: Final = r"\s*(\d+(?:\.\d+)?(?:[eE][+-]?\d+)?)\s*"
_SIZE = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([a-zA-Z]*)\s*")
_DURATION: Final = re.compile(_NUMBER + r"(s|ms|us|µs|ns)\s*")
_SECONDS_PER_UNIT: Final = {"s": 1.0, "ms": 1e-3, "us": 1e-6, "µs": 1e-6, "ns": 1e-9}
_RATE: Final = re.compile(_NUMBER + r"([kKMGTP]?|[KMGT]i)(b|bit|B)(?:/s|ps)\s*")
_FLOP_RATE: Final = re.compile(_NUMBER + r"([kKMGTP]?)(?:FLOP/s|FLOPS|FLOPs|)\s*")
_FACTORS: Final = {"": 1, "k": 1e3, "K": 1e3, "M": 1e6, "G": 1e9, "T": 1e12, "P": 1e15} | {
    "Ki": 2.0**10,
    "Mi": 2.0**20,
    "Gi": 2.0**30,
    "Ti": 2.0**40,
}


def parse_bytes(text: str) -> int:
    """`4GiB`, `500 MB` or `1073741824` as a number of bytes. Raises ConfigError."""
    match = _SIZE.fullmatch(text)
    unit = (match[2].upper() or "B") if match else ""
    if match is None or unit not in _BYTES_PER_UNIT:
        raise ConfigError(f"{text!r} is not a size. Write a number and a unit, such as 4GiB, 500MB or 1073741824.")
    return int(float(match[1]) * _BYTES_PER_UNIT[unit])


def parse_seconds(text: str) -> float:
    """`50ms`, `1.5 s`, `8us` or `0s`; a number alone is refused. Raises ConfigError."""
    match = _DURATION.fullmatch(text)
    if match is None:
        raise ConfigError(f"{text!r} is not a time. Write a number and s, ms or us, such as 50ms or 1.5s.")
    return float(match[1]) * _SECONDS_PER_UNIT[match[2]]


def parse_bytes_per_s(text: str) -> float:
    """`100Mb/s`, `100Mbps`, `1Gbit/s` or `125MB/s`, in bytes a second. What does not say bits or bytes is refused, and
    so is nothing a second. Raises ConfigError."""
    match = _RATE.fullmatch(text)
    if match is None or float(match[1]) == 0:
        raise ConfigError(
            f"{text!r} is not a rate. Write a number above 0 and b/s for bits or B/s for bytes, such as 100Mb/s, "
            "1Gb/s or 125MB/s."
        )
    return float(match[1]) * _FACTORS[match[2]] / (1 if match[3] == "B" else 8)


def parse_flop_per_s(text: str) -> float:
    """`312T`, `312TFLOP/s` or `312e12`. Raises ConfigError."""
    match = _FLOP_RATE.fullmatch(text)
    if match is None or float(match[1]) == 0:
        raise ConfigError(f"{text!r} is not a rate of arithmetic. Write FLOP a second, such as 312T or 312e12.")
    return float(match[1]) * _FACTORS[match[2]]


def format_bytes(num_bytes: float) -> str:
    """Three significant digits and a decimal unit: `7.36 MB`."""
    for unit in ("B", "KB", "MB", "GB"):
        if abs(num_bytes) < 999.5:
            return f"{num_bytes:.3g} {unit}"
        num_bytes /= 1000
    return f"{num_bytes:.3g} TB"


def format_seconds(seconds: float, *, num_digits: int = 3) -> str:
    """So many significant digits and the unit in which they read best: `1.24 ms`."""
    for unit, factor in (("s", 1.0), ("ms", 1e3)):
        if abs(seconds) * factor >= 1:
            return f"{_digits(seconds * factor, num_digits)} {unit}"
    return f"{_digits(seconds * 1e6, num_digits)} µs"


def format_bytes_per_s(bytes_per_s: float) -> str:
    """`13.11 MB/s`"""
    return Quantity(bytes_per_s, Unit.BYTES_PER_S).text()


def format_bits_per_s(bytes_per_s: float) -> str:
    """What is counted in bytes, told in bits: `104.9 Mb/s` for 13,107,200."""
    return Quantity(bytes_per_s, Unit.BYTES_PER_S).as_bits().text()


def _prefixed(value: float, unit: str, *, num_digits: int) -> str:
    for prefix in ("", "k", "M", "G", "T"):
        if abs(value) < 1000 - 0.5 * 10.0 ** (3 - num_digits):
            return f"{_digits(value, num_digits)} {prefix}{unit}"
        value /= 1000
    return f"{_digits(value, num_digits)} P{unit}"


def _digits(value: float, num_digits: int) -> str:
    """So many significant digits, and never an exponent where whole numbers have more."""
    return f"{value:,.0f}" if abs(value) >= 10.0 ** (num_digits - 1) else f"{value:.{num_digits}g}"
