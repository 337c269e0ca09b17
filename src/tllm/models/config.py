"""A config.json as typed questions: every answer is of the right kind, or a ModelError that names the field.

This file does not know which fields there are.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypeGuard

from tllm.core.errors import ModelError


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    """One JSON object, and what to call it in a message (its path, or its place within a file)."""

    path: str
    fields: Mapping[str, object]

    @classmethod
    def read(cls, path: Path) -> Config:
        """Raises ModelError when the file is missing or is not a JSON object."""
        try:
            content = json.loads(path.read_bytes())
        except OSError as error:
            raise ModelError(f"{path} cannot be read: {error.strerror}.") from error
        except ValueError as error:
            raise ModelError(f"{path} is not JSON: {error}.") from error
        if not isinstance(content, dict):
            raise ModelError(f"{path} is not a JSON object.")
        return cls(path=str(path), fields=content)

    def section(self, name: str) -> Config | None:
        """An object within this one; None when it is absent, null or empty."""
        value = self.fields.get(name)
        if value is None or value == {}:
            return None
        if not isinstance(value, dict):
            raise self._wrong(name, "must be an object or null")
        return Config(path=f"{self.path}: {name}", fields=value)

    def size(self, name: str, *, default: int | None = None) -> int:
        """A positive integer; required when there is no default."""
        value = self.fields.get(name, default)
        if type(value) is not int or value < 1:
            raise self._wrong(name, "must be a positive integer")
        return value

    def optional_size(self, name: str, *, default: int | None) -> int | None:
        """A positive integer or null."""
        return None if self.fields.get(name, default) is None else self.size(name, default=default)

    def count(self, name: str, *, default: int) -> int:
        """An integer from 0 on."""
        value = self.fields.get(name, default)
        if type(value) is not int or value < 0:
            raise self._wrong(name, "must be an integer from 0 on")
        return value

    def flag(self, name: str, *, default: bool) -> bool:
        """A bool; the default when it is absent or null."""
        value = self.fields.get(name)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise self._wrong(name, "must be true or false")
        return value

    def positive_number(self, name: str, *, default: float | None = None) -> float:
        """A finite number above 0; required when there is no default."""
        value = self.fields.get(name, default)
        if not _is_number(value) or value <= 0:
            raise self._wrong(name, "must be a number above 0")
        return float(value)

    def optional_number(self, name: str) -> float | None:
        """A finite number, or None when absent or null."""
        value = self.fields.get(name)
        if value is None:
            return None
        if not _is_number(value):
            raise self._wrong(name, "must be a number or null")
        return float(value)

    def numbers(self, name: str) -> tuple[float, ...]:
        """A list of finite numbers above 0."""
        value = self.fields.get(name)
        if not isinstance(value, list) or not all(_is_number(item) and item > 0 for item in value):
            raise self._wrong(name, "must be a list of numbers above 0")
        return tuple(float(item) for item in value)

    def text(self, name: str) -> str | None:
        value = self.fields.get(name)
        if value is not None and not isinstance(value, str):
            raise self._wrong(name, "must be a string")
        return value

    def texts(self, name: str) -> tuple[str, ...]:
        """A list of strings; empty when absent or null."""
        value = self.fields.get(name)
        if value is None:
            return ()
        if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
            raise self._wrong(name, "must be a list of strings")
        return tuple(value)

    def refuse_unless(self, name: str, allowed: object, why: str) -> None:
        """Raise ModelError when the field is present and neither null nor the only value that is honoured."""
        value = self.fields.get(name)
        if value is not None and value != allowed:
            raise ModelError(f"{self.path}: {name} is {_short(value)}, which is not supported; {why}.")

    def _wrong(self, name: str, what: str) -> ModelError:
        given = f"not {_short(self.fields[name])}" if name in self.fields else "and is missing"
        return ModelError(f"{self.path}: {name} {what}, {given}.")


def _is_number(value: object) -> TypeGuard[float]:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _short(value: object) -> str:
    text = json.dumps(value)
    return text if len(text) <= 80 else text[:77] + "..."
