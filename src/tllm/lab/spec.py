"""What is to be run: the kind of experiment, how often, and its own parameters; from a file, from flags, or both.

    [experiment]
    kind = "batching"
    repeats = 5             # of every cell, after
    warmups = 1             # uncounted ones
    seed = 0
    limit_s = 300           # that one measurement may take
    batch = [1, 4, 8]       # this and all that follows: the kind's own

This file does not know which parameters a kind has.
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from tllm.core.errors import ConfigError
from tllm.lab.experiment import Parameter, Parameters

_OWN = ("repeats", "warmups", "seed", "limit_s")
_DEFAULT_LIMIT_S = 300.0
_MAX_SEED = 2**53  # what every reader of JSON keeps exactly; repeats are added to it


@dataclass(frozen=True, slots=True, kw_only=True)
class Spec:
    kind: str
    repeats: int = 5
    warmups: int = 1
    seed: int = 0
    limit_s: float = _DEFAULT_LIMIT_S
    parameters: Mapping[str, Parameter]


def spec_of(kind: str, values: Mapping[str, Parameter]) -> Spec:
    """Raises ConfigError when one of the common values is impossible; the rest is the kind's to judge."""
    common = Parameters(kind, {name: values[name] for name in _OWN if name in values})
    spec = Spec(
        kind=kind,
        repeats=common.count("repeats", 5),
        warmups=common.count("warmups", 1, least=0),
        seed=common.count("seed", 0, least=0),
        limit_s=common.number("limit_s", _DEFAULT_LIMIT_S),
        parameters={name: value for name, value in values.items() if name not in _OWN},
    )
    if spec.seed > _MAX_SEED or spec.limit_s <= 0:
        raise ConfigError(
            f"The experiment {kind}: seed is {spec.seed} and limit_s {spec.limit_s:g}; the seed must be at most "
            f"{_MAX_SEED}, the limit above 0."
        )
    return spec


def read_spec(path: Path) -> tuple[str, dict[str, Parameter]]:
    """The kind and all other values of a file. Raises ConfigError naming the file and what is wrong with it."""
    try:
        parsed = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}.") from error
    except ValueError as error:  # of the format or of the encoding
        raise ConfigError(f"{path} is not TOML: {error}") from error
    table = parsed.get("experiment")
    if parsed.keys() != {"experiment"} or not isinstance(table, dict):
        found = ", ".join(sorted(parsed)) or "nothing"
        raise ConfigError(f"{path} has {found}; it must have one table [experiment] and nothing else.")
    kind = table.pop("kind", None)
    if not isinstance(kind, str):
        raise ConfigError(f'{path}: kind is {kind!r}; it must name an experiment, such as kind = "batching".')
    return kind, {name: _parameter(f"{path}: {name}", value) for name, value in table.items()}


def parse_settings(texts: Sequence[str]) -> dict[str, Parameter]:
    """Each `key=value` as in a file; a value that is no TOML is taken as a text. Raises ConfigError."""
    values: dict[str, Parameter] = {}
    for text in texts:
        name, equals, given = text.partition("=")
        name = name.strip()
        if not equals or not name or not given.strip():
            raise ConfigError(f"--set is {text!r}; give key=value, such as requests=32 or batch=[1,4].")
        try:
            value = tomllib.loads(f"value = {given}")["value"]
        except tomllib.TOMLDecodeError:
            value = given.strip()
        values[name] = _parameter(f"--set {name}", value)
    return values


def _parameter(where: str, value: object) -> Parameter:
    if isinstance(value, str | int | float):
        return value
    if isinstance(value, list) and all(isinstance(each, str | int | float) for each in value):
        return tuple(value)
    raise ConfigError(f"{where} is {value!r}; it must be a text, a number, true, false or a list of these.")
