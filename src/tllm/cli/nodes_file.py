"""A file that describes machines and links for `tllm plan`, in TOML or JSON.

    head = "desk"                       # where the head runs; the first node's machine by default

    [[nodes]]
    name = "desk"
    memory = "24GiB"                    # for weights, KV and activations
    bandwidth_gb_per_s = 60             # of its memory; or speed = { rows, layer_ms, head_ms, step_ms }

    [[links]]
    between = ["desk", "laptop"]        # both directions
    rtt_ms = 0.5
    mbit_per_s = 1000

This file does not know how a plan is found from it.
"""

from __future__ import annotations

import json
import math
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TypeGuard

from tllm.core.errors import ConfigError
from tllm.core.types import HEAD
from tllm.core.units import parse_bytes
from tllm.planner.cost import estimated_speed
from tllm.planner.profile import LinkProfile, ModelProfile, NodeProfile, Speed

_FLOP_PER_BYTE = 20  # arithmetic for bandwidth, where a file gives the bandwidth alone

_NODE_FIELDS = frozenset(
    {"name", "memory", "threads", "workers", "machine", "bandwidth_gb_per_s", "gflop_per_s", "speed"}
)
_SPEED_FIELDS = frozenset({"rows", "layer_ms", "head_ms", "step_ms"})
_LINK_FIELDS = frozenset({"between", "rtt_ms", "mbit_per_s"})


@dataclass(frozen=True, slots=True, kw_only=True)
class Cluster:
    """What a plan can be made for. `notes` tell what was not measured."""

    nodes: tuple[NodeProfile, ...]
    links: tuple[LinkProfile, ...] = ()
    head_machine: str = ""
    notes: tuple[str, ...] = ()


def read_nodes(path: Path, model: ModelProfile) -> Cluster:
    """The machines that a file describes. Raises ConfigError naming the file, the entry and the field."""
    try:
        text = path.read_text(encoding="utf-8")
        parsed = json.loads(text) if path.suffix == ".json" else tomllib.loads(text)
    except OSError as error:
        raise ConfigError(f"--nodes: {path} cannot be read: {error.strerror}.") from error
    except ValueError as error:  # of either format, or of an encoding
        kind = "JSON" if path.suffix == ".json" else "TOML"
        raise ConfigError(f"--nodes: {path} is not {kind}: {error}") from error
    top = _Entry(f"{path}", parsed, frozenset({"head", "nodes", "links"}))
    nodes, notes = [], []
    for number, each in enumerate(top.entries("nodes"), start=1):
        entry = _Entry(f"{path}: node {number}", each, _NODE_FIELDS)
        node, note = _node(entry, model)
        nodes.append(node)
        notes += [note] * bool(note)
    names = [node.name for node in nodes]
    if not nodes or len(set(names)) < len(names):
        given = f"two of the name {max(names, key=names.count)}" if nodes else "none"
        raise ConfigError(f"{path} has {given}; it needs at least one [[nodes]] entry, each with a name of its own.")
    machines = {node.name: node.machine for node in nodes}
    links: list[LinkProfile] = []
    for number, each in enumerate(top.entries("links"), start=1):
        links += _links(_Entry(f"{path}: link {number}", each, _LINK_FIELDS), names)
    head = top.text("head", default=names[0])
    if head not in machines:
        raise ConfigError(f"{path}: head is {head!r}, which is no node's name: {', '.join(names)}.")
    return Cluster(nodes=tuple(nodes), links=tuple(links), head_machine=machines[head], notes=tuple(notes))


def _node(entry: _Entry, model: ModelProfile) -> tuple[NodeProfile, str]:
    name = entry.text("name")
    speed, note = None, ""
    if "speed" in entry.values:
        if unused := {"bandwidth_gb_per_s", "gflop_per_s"} & entry.values.keys():
            raise ConfigError(f"{entry.where}: {', '.join(sorted(unused))} would have no effect beside speed.")
        speed = _speed(_Entry(f"{entry.where}, speed", entry.values["speed"], _SPEED_FIELDS))
    elif "bandwidth_gb_per_s" in entry.values:
        bytes_per_s = entry.number("bandwidth_gb_per_s") * 1e9
        flop_per_s = entry.number("gflop_per_s", default=bytes_per_s * _FLOP_PER_BYTE / 1e9) * 1e9
        speed = estimated_speed(model, bytes_per_s=bytes_per_s, flop_per_s=flop_per_s)
        note = f"{name}: rough, what its bandwidth and arithmetic allow at best"
    elif "gflop_per_s" in entry.values:
        raise ConfigError(f"{entry.where}: gflop_per_s needs bandwidth_gb_per_s beside it.")
    node = NodeProfile(
        id=name,
        name=name,
        machine=entry.text("machine", default=name),
        host=name,
        memory_bytes=parse_bytes(entry.text("memory")),
        num_threads=entry.count("threads", default=1),
        num_workers=entry.count("workers", default=1),
        speed=speed,
    )
    return node, note


def _speed(entry: _Entry) -> Speed:
    rows = entry.numbers("rows")
    layer_ms, head_ms = entry.numbers("layer_ms"), entry.numbers("head_ms")
    ascending = all(left < right for left, right in pairwise(rows))
    whole = all(row == int(row) for row in rows)
    if (
        not rows
        or rows[0] != 1
        or not ascending
        or not whole
        or len(layer_ms) != len(rows)
        or len(head_ms) != len(rows)
    ):
        raise ConfigError(
            f"{entry.where}: rows must be whole numbers that ascend from 1, and layer_ms and head_ms must have as many "
            "numbers as rows."
        )
    return Speed(
        rows=tuple(map(int, rows)),
        layer_s=tuple(value / 1e3 for value in layer_ms),
        head_s=tuple(value / 1e3 for value in head_ms),
        step_s=entry.number("step_ms", default=0.0, least=0.0) / 1e3,
    )


def _links(entry: _Entry, names: Sequence[str]) -> list[LinkProfile]:
    """Both directions. "head" names the head itself."""
    ends = entry.values.get("between")
    if not isinstance(ends, list) or len(ends) != 2 or not all(end in (*names, HEAD) for end in ends):
        raise ConfigError(f"{entry.where}: between must be two of {', '.join((*names, HEAD))}, such as {names[:2]}.")
    rtt_s, bytes_per_s = entry.number("rtt_ms", least=0.0) / 1e3, entry.number("mbit_per_s") * 1e6 / 8
    return [
        LinkProfile(source=source, target=target, rtt_s=rtt_s, bytes_per_s=bytes_per_s)
        for source, target in (ends, ends[::-1])
    ]


class _Entry:
    """A table of the file, whose fields are checked as they are taken."""

    def __init__(self, where: str, values: object, allowed: frozenset[str]) -> None:
        self.where = where
        if not isinstance(values, Mapping):
            raise ConfigError(f"{where} is {values!r}; it must be a table with {', '.join(sorted(allowed))}.")
        if unknown := values.keys() - allowed:
            raise ConfigError(f"{where} has {', '.join(sorted(unknown))}; allowed are {', '.join(sorted(allowed))}.")
        self.values: Mapping[str, object] = values

    def entries(self, field: str) -> list[object]:
        value = self.values.get(field, [])
        if not isinstance(value, list):
            raise ConfigError(f"{self.where}: {field} is {value!r}; it must be a list of tables.")
        return value

    def text(self, field: str, *, default: str | None = None) -> str:
        value = self.values.get(field, default)
        if not isinstance(value, str) or not value:
            raise ConfigError(f"{self.where}: {field} must be a text{'' if value is None else f', not {value!r}'}.")
        return value

    def number(self, field: str, *, default: float | None = None, least: float | None = None) -> float:
        """Above 0, or at least `least`."""
        value = self.values.get(field, default)
        if not _is_number(value) or value < (least or 0.0) or (least is None and value == 0):
            given = "is missing" if value is None else f"is {value!r}"
            bound = "above 0" if least is None else f"of at least {least:g}"
            raise ConfigError(f"{self.where}: {field} {given}; it must be a number {bound}.")
        return float(value)

    def numbers(self, field: str) -> list[float]:
        value = self.values.get(field)
        if not isinstance(value, list) or not all(_is_number(each) and each >= 0 for each in value):
            raise ConfigError(f"{self.where}: {field} must be a list of numbers, none negative.")
        return [float(each) for each in value]

    def count(self, field: str, *, default: int) -> int:
        value = self.values.get(field, default)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ConfigError(f"{self.where}: {field} is {value!r}; it must be a whole number, at least 1.")
        return value


def _is_number(value: object) -> TypeGuard[float]:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
