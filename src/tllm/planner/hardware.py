"""Machines as numbers: arithmetic, memory and link, from data sheets or as given.

    name                                      a preset: a100-40gb, m4, ...
    flops=312T,bandwidth=1.5TB/s,memory=40GB,link=300GB/s

A figure that nobody published is None. What needs it says so; nothing is guessed. Links count one direction: a data
sheet's 600 GB/s that adds both is 300 here. Data sheets give peaks; efficiencies say what part of them is reached.

This file does not know models, nor what is measured.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Final

from tllm.core.errors import ConfigError
from tllm.core.units import parse_bytes, parse_bytes_per_s, parse_flop_per_s


@dataclass(frozen=True, slots=True, kw_only=True)
class Hardware:
    """One accelerator, or one machine. Rates are peaks; see `reached_flop_per_s` and `reached_bytes_per_s`."""

    name: str
    bytes_per_s: float  # of its memory
    flop_per_s: float | None = None  # dense, at 16 bit
    memory_bytes: int | None = None
    link_bytes_per_s: float | None = None  # one direction
    flop_efficiency: float = 1.0
    bandwidth_efficiency: float = 1.0

    def __post_init__(self) -> None:
        for name in ("flop_efficiency", "bandwidth_efficiency"):
            if not 0 < getattr(self, name) <= 1:
                raise ConfigError(f"{name} is {getattr(self, name)}; it must be above 0 and at most 1.")

    @property
    def reached_bytes_per_s(self) -> float:
        return self.bandwidth_efficiency * self.bytes_per_s

    @property
    def reached_flop_per_s(self) -> float:
        """Raises ConfigError where it is not known."""
        return self.flop_efficiency * self._known(self.flop_per_s, "arithmetic", "flops=4T")

    @property
    def memory(self) -> int:
        """Raises ConfigError where it is not known."""
        return int(self._known(self.memory_bytes, "memory", "memory=16GB"))

    @property
    def link(self) -> float:
        """Bytes a second in one direction. Raises ConfigError where it is not known."""
        return self._known(self.link_bytes_per_s, "link", "link=10Gb/s")

    def _known(self, value: float | None, what: str, example: str) -> float:
        if value is None:
            raise ConfigError(
                f"The {what} of {self.name} is not known. Give it beside the name, such as {self.name},{example}."
            )
        return value


PRESETS: Final = {
    each.name: each
    for each in (
        # The article's round figures; the data sheet (2021) has 1,555 GB/s, and 600 GB/s of NVLink in both directions.
        Hardware(
            name="a100-40gb", flop_per_s=312e12, bytes_per_s=1.5e12, memory_bytes=40 * 10**9, link_bytes_per_s=300e9
        ),
        # NVIDIA A100 data sheet, SXM: 312 TFLOPS bf16 dense, 2,039 GB/s, NVLink 600 GB/s.
        Hardware(
            name="a100-80gb", flop_per_s=312e12, bytes_per_s=2.039e12, memory_bytes=80 * 10**9, link_bytes_per_s=300e9
        ),
        # NVIDIA H100 data sheet, SXM: 1,979 TFLOPS bf16 with sparsity, half of it dense; 3.35 TB/s, NVLink 900 GB/s.
        Hardware(
            name="h100", flop_per_s=989.5e12, bytes_per_s=3.35e12, memory_bytes=80 * 10**9, link_bytes_per_s=450e9
        ),
        # NVIDIA H200 data sheet, SXM: arithmetic and NVLink of the H100, 4.8 TB/s.
        Hardware(
            name="h200", flop_per_s=989.5e12, bytes_per_s=4.8e12, memory_bytes=141 * 10**9, link_bytes_per_s=450e9
        ),
        # Apple's technical specifications: 120 GB/s; 16 GB in the smallest Mac mini. No figure of arithmetic.
        Hardware(name="m4", bytes_per_s=120e9, memory_bytes=16 * 10**9),
        # Apple's technical specifications, MacBook Pro: 150 GB/s; 18 GB in the smallest. No figure of arithmetic.
        Hardware(name="m3-pro", bytes_per_s=150e9, memory_bytes=18 * 10**9),
    )
}


def _share(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise ConfigError(f"{text!r} is no share; write a number above 0 and at most 1, such as 0.9.") from None


_FIGURES: Final[Mapping[str, Callable[[str], float]]] = {
    "flops": parse_flop_per_s,
    "bandwidth": parse_bytes_per_s,
    "memory": parse_bytes,
    "link": parse_bytes_per_s,
    "flop-efficiency": _share,
    "bandwidth-efficiency": _share,
}


def parse_hardware(text: str) -> Hardware:
    """A preset, a preset with some figures replaced (`m4,flops=4T`), or figures alone, of which bandwidth is needed.
    Raises ConfigError."""
    first, *rest = [part.strip() for part in text.split(",")]
    known = PRESETS.get(first.lower())
    if known is None and "=" not in first:
        raise ConfigError(
            f"{first!r} is no known hardware; there are {', '.join(PRESETS)}, or give figures such as "
            "flops=312T,bandwidth=1.5TB/s,memory=40GB,link=300GB/s."
        )
    given = dict(map(_figure, rest if known else [first, *rest]))
    if known is None:
        if "bandwidth" not in given:
            raise ConfigError(f"{text!r} lacks bandwidth=, that of the memory, such as bandwidth=120GB/s.")
        known = Hardware(name="given", bytes_per_s=given["bandwidth"])
    memory = given.get("memory")
    return Hardware(
        name=known.name,
        bytes_per_s=given.get("bandwidth", known.bytes_per_s),
        flop_per_s=given.get("flops", known.flop_per_s),
        memory_bytes=known.memory_bytes if memory is None else int(memory),
        link_bytes_per_s=given.get("link", known.link_bytes_per_s),
        flop_efficiency=given.get("flop-efficiency", known.flop_efficiency),
        bandwidth_efficiency=given.get("bandwidth-efficiency", known.bandwidth_efficiency),
    )


def _figure(text: str) -> tuple[str, float]:
    name, _, value = text.partition("=")
    if name.strip() not in _FIGURES:
        raise ConfigError(f"{text!r} is no figure of hardware; there are {', '.join(f'{each}=' for each in _FIGURES)}.")
    return name.strip(), _FIGURES[name.strip()](value.strip())
