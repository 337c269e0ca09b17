"""Chat templates against transformers' `apply_chat_template`.

The templates in `templates/` are ours; between them they use the constructs of the templates that popular models
carry: alternation checks, `namespace`, `selectattr`, slices from behind, macros with `caller`, `split('</think>')`,
dates, tools as indented JSON, calls as text or as objects, parts of content, `{% generation %}`, loop controls.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import jinja2
import pytest

from tllm.core.errors import ModelError, RequestError
from tllm.text.template import RESERVED_VARIABLES, ChatTemplate
from tllm.text.tokenizer import Tokenizer

_FOLDER = Path(__file__).parent / "templates"
_SOURCES = {path.stem: path.read_text() for path in sorted(_FOLDER.glob("*.jinja"))}
# `parts` reads lists alone; transformers leaves that to its caller, so it has tests of its own.
_TEXT_SOURCES = [name for name in _SOURCES if name != "parts"]

_TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "description": "The weather in a place.\n\nÜber <b>all</b> & 'everywhere'.",
            "parameters": {
                "type": "object",
                "properties": {
                    "place": {"type": "string", "description": "Where? 日本"},
                    "days": {"type": "array", "items": {"type": "integer"}},
                    "unit": {"type": ["string", "null"], "enum": ["C", "F"]},
                    "more": {"type": "object", "properties": {"b": {}, "a": {}}},
                },
                "required": ["place"],
            },
        },
    },
    {
        "type": "function",
        "function": {"name": "now", "description": "", "parameters": {"type": "object", "properties": {}}},
    },
]


def _call(name: str, arguments: object, index: int = 0) -> dict[str, object]:
    return {"id": f"call{index:05d}", "type": "function", "function": {"name": name, "arguments": arguments}}


def _user(text: str) -> dict[str, object]:
    return {"role": "user", "content": text}


def _assistant(text: str | None, **fields: object) -> dict[str, object]:
    return {"role": "assistant", "content": text, **fields}


_SYSTEM = {"role": "system", "content": " Be brief.\n"}
_CONVERSATIONS: dict[str, list[dict[str, object]]] = {
    "one": [_user("  Hello <world> & 'all' 😀 \n")],
    "system": [_SYSTEM, _user("Hi")],
    "turns": [_user("1 + 1?"), _assistant(" 2 "), _user("sure?"), _assistant("Yes."), _user("Why?")],
    "system and turns": [_SYSTEM, _user("a"), _assistant("b"), _user("c"), _assistant("d\n")],
    "unfinished": [_user("a"), _assistant("It begins with  ")],
    "unfinished and empty": [_user("a"), _assistant("")],
    "not alternating": [_user("a"), _user("b")],
    "begins with the model": [_assistant("Hello!"), _user("b")],
    "two systems": [_SYSTEM, _user("a"), {"role": "system", "content": "Now be long."}, _user("b")],
    "unknown role": [{"role": "critic", "content": "no"}],
    "thoughts in text": [
        _user("a"),
        _assistant("<think>\nhm\n</think>\n\nb"),
        _user("c"),
        _assistant("<think>\nlonger</think>d"),
    ],
    "thoughts apart": [
        _user("a"),
        _assistant("b", reasoning_content="hm"),
        _user("c"),
        _assistant("d", reasoning="oh"),
    ],
    "one call": [
        _SYSTEM,
        _user("Weather?"),
        _assistant(None, tool_calls=[_call("weather", {"place": "Köln", "days": [1, 2], "unit": None, "ok": True})]),
        {"role": "tool", "name": "weather", "tool_call_id": "call00000", "content": '{"t": 3.5}'},
        _assistant("3.5 °C"),
        _user("Thanks"),
    ],
    "open call": [
        _user("Weather?"),
        _assistant("Let me see.", tool_calls=[_call("weather", {"place": "a\"b'c"})]),
        {"role": "tool", "name": "weather", "tool_call_id": "call00000", "content": "rain"},
    ],
    "two calls": [
        _user("Weather?"),
        _assistant(None, tool_calls=[_call("now", {}), _call("weather", {"place": "X"}, 1)]),
        {"role": "tool", "name": "now", "tool_call_id": "call00000", "content": "noon"},
        {"role": "tool", "name": "weather", "tool_call_id": "call00001", "content": "rain"},
    ],
}
_OPTIONS: list[dict[str, Any]] = [
    {"add_generation_prompt": True},
    {"add_generation_prompt": False},
    {"add_generation_prompt": False, "continue_final_message": True},
    {"add_generation_prompt": True, "tools": _TOOLS},
    {"add_generation_prompt": False, "tools": _TOOLS, "tools_in_user_message": False, "date_string": "1 Mai"},
    {"add_generation_prompt": True, "enable_thinking": False, "bos_token": "<other>"},
    {
        "add_generation_prompt": True,
        "documents": [{"title": "one big fox", "text": "a" * 40}, {"title": "", "text": ""}],
    },
]
_THEIR_REFUSALS = (jinja2.TemplateError, TypeError, ValueError)
_REFUSED = "<refused>"


def _both(checkpoint: Any, source: str, messages: list[dict[str, object]], options: dict[str, Any]) -> tuple[str, str]:
    """Our rendering of the messages as a client sends them, and transformers' of the same with arguments parsed."""
    try:
        theirs = checkpoint.theirs.apply_chat_template(
            copy.deepcopy(messages), chat_template=source, tokenize=False, **options
        )
    except _THEIR_REFUSALS:
        theirs = _REFUSED
    try:
        ours = ChatTemplate(source, checkpoint.ours).render(_as_sent(messages), **options)
    except RequestError:
        ours = _REFUSED
    return ours, theirs


def _as_sent(messages: list[dict[str, object]]) -> list[dict[str, object]]:
    """Clients send arguments as JSON text."""
    sent = copy.deepcopy(messages)
    for message in sent:
        for call in message.get("tool_calls") or ():  # type: ignore[attr-defined]
            call["function"]["arguments"] = json.dumps(call["function"]["arguments"])
    return sent


# This template adds arguments to a string, which transformers refuses to do with an object.
_WANTS_TEXT = {("reasoner", name) for name in ("one call", "open call", "two calls")}


@pytest.mark.parametrize("template", _TEXT_SOURCES)
def test_rendering_is_that_of_transformers(plain_checkpoint: Any, template: str) -> None:
    num_rendered = 0
    for name, messages in _CONVERSATIONS.items():
        if (template, name) in _WANTS_TEXT:
            continue
        for options in _OPTIONS:
            ours, theirs = _both(plain_checkpoint, _SOURCES[template], messages, options)
            assert ours == theirs, (name, options)
            num_rendered += theirs != _REFUSED
    assert num_rendered > len(_CONVERSATIONS) * len(_OPTIONS) / 3, "the conversations do not suit the template"


def test_arguments_read_as_sent_where_a_template_wants_text(plain_checkpoint: Any) -> None:
    sent = '{"place":  "Köln"}'  # spaced as no serializer of ours would
    messages = [_user("a"), _assistant(None, tool_calls=[_call("weather", sent)])]
    expected = plain_checkpoint.theirs.apply_chat_template(
        messages, chat_template=_SOURCES["reasoner"], tokenize=False, add_generation_prompt=True
    )
    template = ChatTemplate(_SOURCES["reasoner"], plain_checkpoint.ours)
    assert template.render(messages) == expected
    assert sent in expected
    loop = "{% for c in messages[0].tool_calls %}{{ c.function.arguments"
    end = " }}{% endfor %}"
    message = _assistant(None, tool_calls=[_call("weather", sent)])
    for expression, text in {
        "": sent,
        " + '!'": f"{sent}!",
        " ~ '!'": f"{sent}!",
        "|string|length": str(len(sent)),
        "|tojson": '{"place": "Köln"}',
        ".place": "Köln",
        "['place']": "Köln",
        "|items|list": "[('place', 'Köln')]",
        " is mapping": "True",
        " is string": "False",
    }.items():
        assert ChatTemplate(loop + expression + end, plain_checkpoint.ours).render([message]) == text, expression


def test_parts_reach_templates_that_read_them_as_transformers_gives_them(plain_checkpoint: Any) -> None:
    parts = [{"type": "text", "text": "one "}, {"type": "text", "text": "two"}]
    for name in ("parts", "turns"):
        messages = [{"role": "user", "content": parts}]
        for options in _OPTIONS[:3]:
            ours, theirs = _both(plain_checkpoint, _SOURCES[name], messages, options)
            assert ours == theirs != _REFUSED


def test_text_becomes_a_part_for_templates_that_read_parts_alone(plain_checkpoint: Any) -> None:
    template = ChatTemplate(_SOURCES["parts"], plain_checkpoint.ours)
    texts = [_SYSTEM, _user("one"), _assistant("two")]
    as_parts = [{**message, "content": [{"type": "text", "text": message["content"]}]} for message in texts]
    assert template.render(texts) == template.render(as_parts)
    assert "User: one<" in template.render(texts)


def test_parts_become_text_for_templates_that_read_text_alone(plain_checkpoint: Any) -> None:
    parts = [{"type": "text", "text": "one"}, {"type": "input_text", "text": "two"}]
    for name in _TEXT_SOURCES:
        if name == "turns":
            continue
        template = ChatTemplate(_SOURCES[name], plain_checkpoint.ours)
        assert template.render([{"role": "user", "content": parts}]) == template.render([_user("one\ntwo")]), name


def test_a_role_that_reads_text_alone_gets_text_beside_one_that_reads_parts(plain_checkpoint: Any) -> None:
    source = (
        "{% for m in messages %}{% if m.role == 'user' %}{% for p in m.content %}{{ p.text }}{% endfor %}"
        "{% else %}{{ '[' + m.content + ']' }}{% endif %}{% endfor %}"
    )
    template = ChatTemplate(source, plain_checkpoint.ours)
    both = [[{"type": "text", "text": "x"}], "x"]
    for system in both:
        for user in both:
            messages = [{"role": "system", "content": system}, {"role": "user", "content": user}]
            assert template.render(messages) == "[x]x"


def test_developer_is_system_unless_the_template_knows_it(plain_checkpoint: Any) -> None:
    messages = [{"role": "developer", "content": "x"}, _user("y")]
    renamed = ChatTemplate(_SOURCES["chatml"], plain_checkpoint.ours).render(messages)
    assert renamed.startswith("<|im_start|>system\nx<|im_end|>")
    source = "{% for m in messages %}{{ m.role }}{% if m.role == 'developer' %}!{% endif %}{% endfor %}"
    assert ChatTemplate(source, plain_checkpoint.ours).render(messages) == "developer!user"


def test_null_fields_and_empty_calls_are_as_if_left_out(plain_checkpoint: Any) -> None:
    source = "{% for m in messages %}{{ m.keys() | sort | join(',') }};{% endfor %}"
    messages = [_assistant(None, tool_calls=[], name=None, refusal=None), _assistant("", tool_calls=None)]
    assert ChatTemplate(source, plain_checkpoint.ours).render(messages) == "role;content,role;"


def test_reasoning_is_found_under_each_of_its_names(plain_checkpoint: Any) -> None:
    source = "{% for m in messages %}{{ m.reasoning_content }}/{{ m.thinking }};{% endfor %}"
    for name in ("reasoning", "reasoning_content", "thinking"):
        assert ChatTemplate(source, plain_checkpoint.ours).render([_assistant("", **{name: "hm"})]) == "hm/hm;"


def test_messages_given_are_not_changed(plain_checkpoint: Any) -> None:
    messages = [*_as_sent(_CONVERSATIONS["two calls"]), _assistant("x", reasoning="y")]
    before = copy.deepcopy(messages)
    template = ChatTemplate(_SOURCES["thinking"], plain_checkpoint.ours)
    template.render(messages, add_generation_prompt=False, continue_final_message=True)
    assert messages == before


def test_tools_choose_the_template_for_tools(save: Callable[..., Path], plain_checkpoint: Any) -> None:
    named = [{"name": "default", "template": "plain"}, {"name": "tool_use", "template": "{{ tools | length }} tools"}]
    backend = copy.deepcopy(plain_checkpoint.theirs.backend_tokenizer)
    template = ChatTemplate.of(Tokenizer.load(save(backend, {"chat_template": named})))
    assert template is not None
    assert template.render([_user("a")]) == "plain"
    assert template.render([_user("a")], tools=_TOOLS) == "2 tools"
    assert ChatTemplate.of(plain_checkpoint.ours) is None


def test_the_clock_is_the_one_given(plain_checkpoint: Any) -> None:
    template = ChatTemplate(
        "{{ strftime_now('%d %b %Y') }}", plain_checkpoint.ours, now=lambda: datetime(2026, 1, 2, tzinfo=UTC)
    )
    assert template.render([_user("a")]) == "02 Jan 2026"


@pytest.mark.parametrize(
    ("messages", "words", "param"),
    [
        ([], "messages is empty", "messages"),
        (["hello"], r"messages\[0\] is a str", "messages[0]"),
        ([{"content": "a"}], r"messages\[0\]\.role must be a string", "messages[0].role"),
        ([{"role": "user", "content": 7}], "is a int; a string or a list", "messages[0].content"),
        ([{"role": "user", "content": [7]}], "must be an object with a type", "messages[0].content[0]"),
        ([{"role": "user", "content": [{"type": "image_url"}]}], "takes text alone", "messages[0].content[0]"),
        ([{"role": "user", "content": [{"type": "text"}]}], "text must be a string", "messages[0].content[0].text"),
        (
            [_user("a"), _assistant(None, tool_calls=[_call("f", '{"a": ')])],
            "is not JSON",
            "messages[1].tool_calls[0].function.arguments",
        ),
        (
            [_assistant(None, tool_calls=[_call("f", "[1]")])],
            "is a JSON list; an object is needed",
            "messages[0].tool_calls[0].function.arguments",
        ),
        ([_assistant(None, tool_calls=["f"])], "is a str; an object", "messages[0].tool_calls[0]"),
        ([_assistant(None, tool_calls={})], "is a dict; a list", "messages[0].tool_calls"),
    ],
)
def test_a_malformed_message_is_refused_by_its_place(
    plain_checkpoint: Any, messages: Any, words: str, param: str
) -> None:
    with pytest.raises(RequestError, match=words) as caught:
        ChatTemplate(_SOURCES["thinking"], plain_checkpoint.ours).render(messages)
    assert caught.value.param == param


def test_no_text_for_arguments_means_none(plain_checkpoint: Any) -> None:
    source = "{{ messages[0].tool_calls[0].function.arguments | tojson }}"
    message = _assistant(None, tool_calls=[_call("f", "")])
    assert ChatTemplate(source, plain_checkpoint.ours).render([message]) == "{}"


def test_the_templates_own_words_reach_the_client(plain_checkpoint: Any) -> None:
    template = ChatTemplate(_SOURCES["strict"], plain_checkpoint.ours)
    with pytest.raises(RequestError, match="user and assistant take turns") as caught:
        template.render(_CONVERSATIONS["not alternating"])
    assert caught.value.param == "messages"


def test_messages_that_a_template_cannot_render_are_the_requests_fault(plain_checkpoint: Any) -> None:
    for source in ("{{ 'a' + messages[0].nothing }}", "{{ 1 // (messages | length - 1) }}", "{{ messages[0].a.b }}"):
        with pytest.raises(RequestError, match="cannot render these messages") as caught:
            ChatTemplate(source, plain_checkpoint.ours).render([_user("a")])
        assert caught.value.param == "messages"


def test_continuing_and_beginning_a_message_exclude_each_other(plain_checkpoint: Any) -> None:
    template = ChatTemplate(_SOURCES["chatml"], plain_checkpoint.ours)
    with pytest.raises(RequestError, match="exclude each other") as caught:
        template.render([_user("a")], continue_final_message=True)
    assert caught.value.param == "add_generation_prompt"


def test_a_message_without_text_cannot_be_continued(plain_checkpoint: Any) -> None:
    template = ChatTemplate(_SOURCES["chatml"], plain_checkpoint.ours)
    for content in (None, []):
        message = {"role": "assistant", "content": content}
        if content == []:
            template = ChatTemplate(_SOURCES["parts"], plain_checkpoint.ours)
        with pytest.raises(RequestError, match="no content to go on with"):
            template.render([_user("a"), message], add_generation_prompt=False, continue_final_message=True)


def test_a_template_that_drops_the_last_message_cannot_continue_it(plain_checkpoint: Any) -> None:
    template = ChatTemplate("{{ messages[0].content }}", plain_checkpoint.ours)
    with pytest.raises(RequestError, match="leaves the last message out"):
        template.render([_user("a"), _assistant("b")], add_generation_prompt=False, continue_final_message=True)


def test_reserved_variables_are_the_parameters_of_render(plain_checkpoint: Any) -> None:
    parameters = set(ChatTemplate.render.__annotations__) - {"variables", "return"}
    assert parameters < RESERVED_VARIABLES


def test_a_source_that_is_no_template_is_refused_with_its_line(plain_checkpoint: Any) -> None:
    with pytest.raises(ModelError, match=r"not valid jinja2: line 2"):
        ChatTemplate("a\n{% if %}", plain_checkpoint.ours)


def test_a_rendered_template_has_its_special_tokens_once(checkpoints: dict[str, Any]) -> None:
    """What a chat endpoint does: render, then encode without adding more; as `apply_chat_template(tokenize=True)`."""
    for name in ("byte_level_with_bos", "byte_fallback"):
        both = checkpoints[name]
        text = ChatTemplate(_SOURCES["inst"], both.ours).render(_CONVERSATIONS["turns"])
        expected = both.theirs.apply_chat_template(
            _CONVERSATIONS["turns"], chat_template=_SOURCES["inst"], add_generation_prompt=True, return_dict=False
        )
        assert list(both.ours.encode(text, add_special_tokens=False)) == expected
