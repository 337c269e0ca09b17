"""Whatever a client sends, it gets an answer or a reasoned refusal: never a 5xx, never the framework's 422."""

from __future__ import annotations

import json

import httpx
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.api.fake_deployment import FakeDeployment
from tllm.api.choices import ChoiceText, TextOptions
from tllm.api.refusals import REFUSED
from tllm.api.schema import ChatBody, CompletionBody, DetokenizeBody, TokenizeBody
from tllm.cluster.deployment import GenerationOutput
from tllm.core.types import FinishReason, Sampled, SequenceId

ROUTES = {
    "/v1/chat/completions": ChatBody,
    "/v1/completions": CompletionBody,
    "/tokenize": TokenizeBody,
    "/detokenize": DetokenizeBody,
}
VALID = {
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 3},
    "/v1/completions": {"prompt": "Hi", "max_tokens": 3},
    "/tokenize": {"prompt": "Hi"},
    "/detokenize": {"tokens": [1, 2]},
}
words = st.sampled_from(["user", "assistant", "tool", "text", "none", "auto", "fake", "json_object", "type", "content"])
scalars = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 300),
    st.integers(),
    st.floats(allow_nan=False, allow_infinity=False),
    st.text(max_size=8),
    words,
)
values = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(words | st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)
relaxed = settings(
    max_examples=150,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
    database=None,
    derandomize=True,
)


@st.composite
def bodies(draw: st.DrawFn) -> tuple[str, dict]:
    path = draw(st.sampled_from(sorted(ROUTES)))
    names = st.sampled_from(sorted({*ROUTES[path].model_fields, *REFUSED}))
    return path, {**VALID[path], **draw(st.dictionaries(names, values, max_size=4))}


@relaxed
@given(body=bodies())
def test_any_values_in_known_fields_are_answered_or_refused(
    client: httpx.Client, deployment: FakeDeployment, body: tuple[str, dict]
) -> None:
    path, content = body
    response = client.post(path, json=content)
    assert response.status_code in (200, 400, 404), response.text
    if response.status_code != 200:
        assert response.json()["error"]["message"]
    assert not deployment.running


@relaxed
@given(path=st.sampled_from(sorted(ROUTES)), body=st.binary(max_size=50) | values.map(lambda v: json.dumps(v).encode()))
def test_any_bytes_are_answered_or_refused(client: httpx.Client, path: str, body: bytes) -> None:
    assert client.post(path, content=body).status_code in (200, 400, 404)


@settings(
    max_examples=150, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    text=st.text(alphabet="abé😀 ", max_size=20),
    stop=st.lists(st.text(alphabet="abé😀 ", min_size=1, max_size=3), max_size=2),
    cuts=st.lists(st.integers(1, 7), max_size=20),
)
def test_the_cut_into_outputs_changes_nothing(
    deployment: FakeDeployment, text: str, stop: list[str], cuts: list[int]
) -> None:
    """Text, count and log-probabilities are the same however many tokens each look brought."""
    ids = (*deployment.ids(text), deployment.end_ids[0])

    def answer(sizes: list[int]) -> tuple:
        options = TextOptions(stop=tuple(stop), keep_scores=True)
        choice = ChoiceText(deployment.tokenizer, (), options)
        shown, entries, rest = "", [], list(ids)
        sizes = [*sizes, len(ids)]
        for size in sizes:
            now, rest = rest[:size], rest[size:]
            is_last = not rest
            piece = choice.feed(
                GenerationOutput(
                    tokens=tuple(Sampled(seq=SequenceId(0), token=token, logprob=-1.0) for token in now),
                    finish=FinishReason.STOP if is_last else None,
                    stop_id=ids[-1] if is_last else None,
                )
            )
            shown += piece.text
            entries += piece.entries
            if piece.finish is not None:
                return shown, entries, choice.num_tokens, piece.stop_reason
        raise AssertionError("it never ended")

    whole = answer([])
    assert answer(cuts) == whole
    assert answer([1] * len(ids)) == whole
    shown, entries, _, stopped = whole
    if stopped is None:
        assert shown == text
        assert len(entries) == len(ids)
    else:
        assert shown == text[: text.index(stopped)] or any(other in text for other in stop if other != stopped)
        joined = b"".join(deployment.tokenizer.token_bytes(entry.sampled.token) for entry in entries)
        assert joined.decode() == shown
