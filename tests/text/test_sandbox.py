"""A template is somebody else's program: it sees values alone, and it ends."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from tllm.core.errors import ModelError, RequestError
from tllm.text.template import ChatTemplate

_MESSAGES = [{"role": "user", "content": "hello"}]


@pytest.mark.parametrize(
    "source",
    [
        "{{ ''.__class__.__mro__ }}",
        "{{ messages.__class__ }}{{ messages.append.__self__.__class__() }}",
        "{% for m in messages %}{{ m.update({'role': 'system'}) }}{% endfor %}",
        "{{ messages.append(1) }}",
        "{{ '{0.__class__}'.format(messages) }}",
        "{{ raise_exception.__globals__ }}",
        "{{ strftime_now.__globals__['x'] }}",
        "{{ (cycler.__init__).__globals__ }}",
    ],
)
def test_what_is_inside_the_program_is_out_of_reach(plain_checkpoint: Any, source: str) -> None:
    try:
        text = ChatTemplate(source, plain_checkpoint.ours).render(_MESSAGES)
    except (ModelError, RequestError):
        return
    assert text == "", "an undefined value is all that may come of it"


@pytest.mark.parametrize("source", ["namespace(__class__=1) %}", "namespace() %}{% set ns._hidden = 1 %}"])
def test_a_namespace_holds_no_private_names(plain_checkpoint: Any, source: str) -> None:
    template = ChatTemplate("{% set ns = " + source, plain_checkpoint.ours)
    with pytest.raises(ModelError, match="was stopped: a namespace cannot hold"):
        template.render(_MESSAGES)


def test_only_json_values_are_taken(plain_checkpoint: Any) -> None:
    template = ChatTemplate("{{ thing }}", plain_checkpoint.ours)
    with pytest.raises(TypeError, match="takes JSON values, not object"):
        template.render(_MESSAGES, thing=object())


@pytest.mark.parametrize(
    "source",
    [
        "{% for a in range(size) %}{% for b in range(size) %}{% endfor %}{% endfor %}",
        "{% set all = range(size)|list %}"
        "{% for a in all %}{% for b in all %}{% for c in all if false %}{% endfor %}{% endfor %}{% endfor %}",
        "{% macro twice(n) %}{% if n > 0 %}{{ twice(n - 1) }}{{ twice(n - 1) }}{% endif %}{% endmacro %}"
        "{{ twice(size // 500) }}",
    ],
)
def test_a_template_that_does_not_end_is_stopped(plain_checkpoint: Any, source: str) -> None:
    started = time.monotonic()
    source = "{% set size = size | default(1) %}" + source
    template = ChatTemplate(source, plain_checkpoint.ours, max_steps=100_000)
    assert template.render(_MESSAGES) == ""
    with pytest.raises(ModelError, match="was stopped: it did not end"):
        template.render(_MESSAGES, size=50_000)
    assert time.monotonic() - started < 30


def test_a_template_that_never_ends_is_refused_when_opened(plain_checkpoint: Any) -> None:
    source = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
    with pytest.raises(ModelError, match="even for a few words"):
        ChatTemplate(source, plain_checkpoint.ours, max_steps=100_000)


def test_endless_recursion_and_huge_ranges_are_refused(plain_checkpoint: Any) -> None:
    for source in ("{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", "{{ range(10 ** 9) | list }}"):
        with pytest.raises(RequestError, match="cannot render"):
            ChatTemplate(source, plain_checkpoint.ours).render(_MESSAGES)


def test_output_has_a_limit(plain_checkpoint: Any) -> None:
    template = ChatTemplate("{% for m in messages %}{{ m.content }}{% endfor %}", plain_checkpoint.ours, max_chars=20)
    assert template.render(_MESSAGES * 4) == "hello" * 4
    with pytest.raises(RequestError, match="more than 20 characters"):
        template.render(_MESSAGES * 5)


def test_steps_are_counted_for_each_rendering_alone(plain_checkpoint: Any) -> None:
    source = "{% for m in messages %}{% for a in range(100) %}{{ loop.index }}{% endfor %}{% endfor %}"
    template = ChatTemplate(source, plain_checkpoint.ours, max_steps=320)
    expected = "".join(map(str, range(1, 101)))
    with ThreadPoolExecutor(4) as pool:
        assert set(pool.map(lambda _: template.render(_MESSAGES), range(64))) == {expected}


def test_loops_keep_their_variables_though_they_are_counted(plain_checkpoint: Any) -> None:
    source = (
        "{% for x in 'abc' %}{{ loop.index }}{{ loop.revindex0 }}{{ loop.length }}{{ loop.first }}{{ loop.last }}"
        "{{ loop.previtem }}{{ loop.nextitem }}{{ loop.changed(x) }}{{ x }} {% else %}none{% endfor %}"
        "{% for x in nothing %}{% else %}none{% endfor %}"
        "{% for k, v in {'a': 1}.items() if v %}{{ k }}{{ v }}{% endfor %}"
        "{% for x in [1, [2, [3]]] recursive %}{% if x is iterable %}<{{ loop(x) }}>{% else %}{{ x }}{{ loop.depth }}"
        "{% endif %}{% endfor %}"
    )
    theirs = plain_checkpoint.theirs.apply_chat_template(_MESSAGES, chat_template=source, tokenize=False)
    assert ChatTemplate(source, plain_checkpoint.ours).render(_MESSAGES) == theirs
