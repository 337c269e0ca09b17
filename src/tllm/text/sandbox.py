"""Where chat templates run: the jinja2 dialect of transformers, sandboxed and bounded.

A template comes with a checkpoint, so it is somebody else's program. The rules:

1. It sees values, never objects of ours: plain JSON types, no attribute that starts with an underscore, no mutation of
   what it was given (jinja2's immutable sandbox).
2. It ends: turns of loops and calls are counted, and what it writes is measured, against limits.

Not bounded is the work inside one filter or operator (`"x" * 10 ** 9`).

The dialect, beside jinja2's own: blocks are trimmed on both sides, `{% break %}` and `{% continue %}`,
`{% generation %}` around what the model said (of use to training alone, so it only opens a scope),
`raise_exception(message)`, `strftime_now(format)`, and a `tojson` that writes what `json.dumps` writes, not HTML.

This file does not know messages, roles or tokenizers.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from datetime import datetime
from typing import Any, Final, NoReturn

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

# Neither is an identifier, so no template can name them.
_BUDGET: Final = "steps left"
_COUNTED: Final = "counted turns"


class TemplateRefusal(jinja2.TemplateError):
    """The template called `raise_exception`."""


class StepLimitError(jinja2.TemplateError):
    """The template made more turns and calls than it may."""


class OutputLimitError(jinja2.TemplateError):
    """The template wrote more than it may."""


class Program:
    """A compiled template. Immutable; may render in several threads at once.

    Every render is on its own: it gets `max_steps` turns of loops and calls, and may write `max_chars` characters.
    """

    def __init__(self, source: str, *, now: Callable[[], datetime], max_steps: int, max_chars: int) -> None:
        """`now` is the clock of `strftime_now`. Raises jinja2.TemplateSyntaxError."""
        environment = _Environment(now)
        tree = environment.parse(source)
        for loop in tree.find_all(nodes.For):
            counted = nodes.Filter(loop.iter, _COUNTED, [], [], None, None, lineno=loop.lineno)
            counted.set_environment(environment)
            loop.iter = counted
        self._template = jinja2.Template.from_code(
            environment, environment.compile(tree), environment.make_globals(None)
        )
        self._max_steps = max_steps
        self._max_chars = max_chars

    def render(self, variables: Mapping[str, object]) -> str:
        """Raises jinja2.TemplateError, or whatever Python raises for an expression such as `1 / 0` or `"" + 1`."""
        budget = _Budget(self._max_steps)
        pieces: list[str] = []
        room = self._max_chars
        for piece in self._template.generate({**variables, _BUDGET: budget}):
            room -= len(piece)
            if room < 0:
                raise OutputLimitError(f"it wrote more than {self._max_chars} characters")
            pieces.append(piece)
        return "".join(pieces)


class _Budget:
    __slots__ = ("_left",)

    def __init__(self, num_steps: int) -> None:
        self._left = num_steps

    def _spend(self) -> None:
        self._left -= 1
        if self._left < 0:
            raise StepLimitError("it did not end within the turns of loops and the calls that it may make")


@jinja2.pass_context
def _counted(context: Context, items: Iterable[object]) -> Iterator[object]:
    budget: _Budget = context[_BUDGET]
    for item in items:
        budget._spend()
        yield item


class _GenerationTag(Extension):
    tags = {"generation"}  # noqa: RUF012  (jinja2's declaration)

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body, lineno=line)


class _PublicNamespace(Namespace):
    """`namespace(...)` whose attributes are data: no name starts with an underscore."""

    def __init__(*args: Any, **kwargs: Any) -> None:  # `self` may be a name in the namespace
        self, *rest = args
        values = dict(*rest, **kwargs)
        for name in values:
            _check_public(name)
        Namespace.__init__(self, values)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_public(name)
        super().__setitem__(name, value)


def _check_public(name: object) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise jinja2.exceptions.SecurityError(f"a namespace cannot hold {name!r}: names that start with _ are private")


def _new_dict(*args: Any, **kwargs: Any) -> dict[Any, Any]:
    return dict(*args, **kwargs)


def _raise_exception(message: object) -> NoReturn:
    raise TemplateRefusal(str(message))


def _tojson(
    value: object,
    ensure_ascii: bool = False,
    indent: int | str | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


class _Environment(ImmutableSandboxedEnvironment):
    def __init__(self, now: Callable[[], datetime]) -> None:
        super().__init__(trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationTag, loopcontrols])
        self.filters["tojson"] = _tojson
        self.filters[_COUNTED] = _counted
        self.globals["raise_exception"] = _raise_exception
        self.globals["strftime_now"] = lambda form: now().strftime(form)
        self.globals["namespace"] = _PublicNamespace
        self.globals["dict"] = _new_dict
        del self.globals["lipsum"]  # random text of any length

    def call(self, context: Context, obj: Any, /, *args: Any, **kwargs: Any) -> Any:
        budget: _Budget = context[_BUDGET]
        budget._spend()
        return super().call(context, obj, *args, **kwargs)
