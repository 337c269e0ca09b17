"""Load is put on as asked, streams are read to the token, and figures follow from times, which are made up here."""

from __future__ import annotations

import asyncio
import itertools
import json
import selectors
from collections.abc import Awaitable, Callable, Coroutine, Iterator, Sequence
from contextlib import asynccontextmanager
from typing import Any, TypeVar

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tllm.core.errors import ConfigError, TransportError, UnavailableError
from tllm.lab.client import ADVICE, Client, Endpoint, Events, Failure, FailureKind, Frame, Reply, Usage, parse_headers
from tllm.lab.serve_bench import Bench, Load, Question, Run, bench, drive
from tllm.lab.serve_summary import Limit, Measure, Outcome, parse_limits, peak_concurrency, summarise
from tllm.lab.workload import Planned, Prompt, fixed

T = TypeVar("T")
DONE = b"data: [DONE]\n\n"


# Streams --------------------------------------------------------------------------------------------------------------


def event(**fields: object) -> bytes:
    return b"data: " + json.dumps(fields).encode() + b"\n\n"


def text(*, words: str = "word", ids: Sequence[int] | None = None, finish: str | None = None) -> bytes:
    choice = {"index": 0, "text": words, "finish_reason": finish}
    return event(choices=[choice if ids is None else {**choice, "token_ids": list(ids)}])


def delta(finish: str | None = None, **content: object) -> bytes:
    return event(choices=[{"index": 0, "delta": content, "finish_reason": finish}])


def usage(prompt: int, answer: int, cached: int = 0, choices: Sequence[object] = ()) -> bytes:
    counts = {"prompt_tokens": prompt, "completion_tokens": answer, "prompt_tokens_details": {"cached_tokens": cached}}
    return event(choices=list(choices), usage=counts)


def read(*pieces: bytes) -> Events:
    """As if the pieces came at 0, 1, 2, ..."""
    events = Events()
    for at_s, piece in enumerate(pieces):
        events.feed(float(at_s), piece)
    return events


def test_tokens_are_counted_by_their_ids_also_those_without_text():
    events = read(text(words="", ids=[1]), text(ids=[2, 3]), text(words="rest", ids=[]), usage(9, 3, 4), DONE)
    assert events.frames == [Frame(0.0, 1), Frame(1.0, 2)]
    assert events.usage == Usage(num_prompt_tokens=9, num_answer_tokens=3, num_cached_tokens=4)
    assert events.is_done


def test_tokens_are_counted_by_usage_in_every_frame():
    told = [{"index": 0, "text": "word", "finish_reason": None}]
    assert read(usage(9, 1, choices=told), usage(9, 4, choices=told), usage(9, 4)).frames == [Frame(0, 1), Frame(1, 3)]


def test_a_sum_at_the_end_does_not_count_the_last_frame():
    last = [{"index": 0, "text": "end", "finish_reason": "stop"}]
    events = read(text(), text(), usage(9, 7, choices=last))
    assert events.frames == [Frame(0, None), Frame(1, None), Frame(2, None)]
    assert events.usage is not None
    assert events.usage.num_answer_tokens == 7


def test_a_chat_begins_with_its_first_content_also_reasoning():
    events = read(
        delta(role="assistant", content=""), delta(reasoning_content="Hm"), delta(content="Yes"), delta("stop")
    )
    assert events.frames == [Frame(1, None), Frame(2, None)]
    assert events.finish_reason == "stop"


def test_comments_and_carriage_returns_are_no_frames():
    assert read(b": ping\n\n", b'data:{"choices": [{"text": "a"}]}\r\n\r\n').frames == [Frame(1, None)]


@given(st.lists(st.integers(1, 200)))
def test_a_stream_may_be_cut_anywhere(sizes):
    whole = text(ids=[1]) + b": ping\n\n" + text(ids=[2, 3]) + usage(5, 3) + DONE
    events = Events()
    rest = whole
    for size in (*sizes, len(whole)):
        events.feed(7.0, rest[:size])
        rest = rest[size:]
    assert events.frames == [Frame(7, 1), Frame(7, 2)]
    assert events.usage is not None
    assert events.is_done


def test_errors_and_nonsense_in_a_stream_are_failures():
    failed = read(text(), event(error={"message": "out of nodes"})).failure
    assert failed == Failure(kind=FailureKind.FAILED, message="out of nodes")
    nonsense = read(b"data: {oops\n\n").failure
    assert nonsense is not None
    assert nonsense.kind is FailureKind.NONSENSE


# Load, in a time that only passes when everybody waits ----------------------------------------------------------------


class _Instant(selectors.SelectSelector):
    now_s = 100.0

    def select(self, timeout: float | None = None) -> Any:
        if not (ready := super().select(0)):
            assert timeout is not None, "everybody waits for nothing"
            self.now_s += max(timeout, 1e-6)
        return ready


class MadeUpTime(asyncio.SelectorEventLoop):
    def __init__(self) -> None:
        self._instant = _Instant()
        super().__init__(self._instant)

    def time(self) -> float:
        return self._instant.now_s


def in_made_up_time(work: Coroutine[Any, Any, T]) -> T:
    with asyncio.Runner(loop_factory=MadeUpTime) as runner:
        return runner.run(work)


def about(seconds: Any) -> Any:
    """Looking at the time again and again takes microseconds of it."""
    return pytest.approx(seconds, abs=2e-3)


def questions(due_s: Sequence[float | None]) -> Iterator[Question]:
    for index, at_s in enumerate(due_s):
        planned = Planned(
            index=index, due_s=at_s, num_prompt_tokens=8, num_answer_tokens=2, prompt=Prompt(ids=(1,) * 8)
        )
        yield Question(planned=planned, body=b"")


def answering_in(*seconds: float) -> Callable[[Question], Awaitable[Reply]]:
    """A server that gives request i its only token after seconds[i]."""

    async def ask(question: Question) -> Reply:
        clock = asyncio.get_running_loop().time
        sent_s = clock()
        await asyncio.sleep(seconds[question.planned.index % len(seconds)])
        return Reply(sent_s=sent_s, ended_s=clock(), frames=(Frame(clock(), 1),))

    return ask


def driven(due_s: Sequence[float | None], ask: Callable[[Question], Awaitable[Reply]], **load: Any) -> Run:
    return in_made_up_time(drive(questions(due_s), ask, Load(**{"concurrency": None, "num_requests": 99, **load})))


def by_index(run: Run) -> list[Outcome]:
    return sorted(run.outcomes, key=lambda outcome: outcome.planned.index)


def test_a_closed_loop_keeps_so_many_under_way():
    run = driven([None] * 7, answering_in(1.0), concurrency=3)
    assert run.duration_s == about(3.0)  # 3 + 3 + 1
    assert peak_concurrency(run.outcomes) == 3
    assert [outcome.ttft_s for outcome in run.outcomes] == about([1.0] * 7)


def test_a_closed_loop_follows_on_whichever_ends_first():
    run = driven([None] * 4, answering_in(5.0, 1.0, 1.0, 1.0), concurrency=2)
    assert [outcome.due_s - 100 for outcome in by_index(run)] == about([0, 0, 1, 2])


def test_an_open_loop_waits_for_no_answer():
    run = driven([0.0, 0.5, 0.75], answering_in(10.0))
    assert [outcome.due_s - 100 for outcome in by_index(run)] == about([0, 0.5, 0.75])
    assert [outcome.begun_s - 100 for outcome in by_index(run)] == about([0, 0.5, 0.75])
    assert peak_concurrency(run.outcomes) == 3


def test_what_waits_below_the_cap_has_waited_since_it_was_due():
    """Three are due within a moment; one at a time, of a second each."""
    run = driven([0.0, 0.1, 0.2], answering_in(1.0), concurrency=1)
    assert [outcome.ttft_s for outcome in by_index(run)] == about([1.0, 1.9, 2.8])
    assert peak_concurrency(run.outcomes) == 1


def test_a_client_that_comes_late_does_not_hide_it():
    """The first answer holds the client itself up for 2 seconds, in which another was due."""

    async def ask(question: Question) -> Reply:
        loop = asyncio.get_running_loop()
        assert isinstance(loop, MadeUpTime)
        if question.planned.index == 0:
            loop._instant.now_s += 2.0
        return Reply(sent_s=loop.time(), ended_s=loop.time(), frames=(Frame(loop.time(), 1),))

    run = driven([0.0, 0.5], ask)
    late = by_index(run)[1]
    assert late.begun_s - late.due_s == about(1.5)
    assert late.ttft_s == about(1.5)
    summary = summarise(run.outcomes, duration_s=run.duration_s, is_open_loop=True)
    assert summary.lateness is not None
    assert summary.lateness.percentiles[-1][1] == pytest.approx(1.5, rel=0.02)


def test_a_duration_ends_the_beginning_of_requests_not_those_under_way():
    closed = driven(itertools.repeat(None), answering_in(0.8), concurrency=1, num_requests=None, duration_s=2.0)
    assert len(closed.outcomes) == 3
    assert closed.duration_s == about(2.4)
    opened = driven([0.0, 1.0, 1.9, 2.1], answering_in(0.8), duration_s=2.0)
    assert len(opened.outcomes) == 3
    assert opened.duration_s == about(2.7)


def test_every_outcome_is_told_as_it_comes():
    seen: list[Outcome] = []
    load = Load(concurrency=2, num_requests=3)
    run = in_made_up_time(drive(questions([None] * 9), answering_in(1.0, 2.0), load, on_outcome=seen.append))
    assert tuple(seen) == run.outcomes
    assert len(seen) == 3


@pytest.mark.parametrize("load", [{"concurrency": 0}, {"num_requests": 0}, {"duration_s": 0.0}, {"duration_s": -1.0}])
def test_no_load_is_refused(load):
    with pytest.raises(ConfigError):
        Load(**{"concurrency": 1, "num_requests": 1, **load})


# Figures --------------------------------------------------------------------------------------------------------------


def outcome(
    *at_s: float,
    due_s: float = 0.0,
    sent_s: float | None = None,
    tokens: Sequence[int | None] | None = None,
    counted: Usage | None = None,
    failure: FailureKind | None = None,
    asked: int | None = None,
) -> Outcome:
    counts = tokens if tokens is not None else [1] * len(at_s)
    num_answer_tokens = asked if asked is not None else (counted.num_answer_tokens if counted else len(at_s))
    return Outcome(
        planned=Planned(
            index=0, due_s=None, num_prompt_tokens=10, num_answer_tokens=num_answer_tokens, prompt=Prompt(ids=(1,) * 10)
        ),
        due_s=due_s,
        begun_s=due_s,
        reply=Reply(
            sent_s=due_s if sent_s is None else sent_s,
            ended_s=at_s[-1] if at_s else due_s + 1,
            frames=tuple(map(Frame, at_s, counts)),
            usage=counted,
            failure=None if failure is None else Failure(kind=failure, message=f"because of {failure}"),
        ),
    )


def used(answer: int, prompt: int = 10, cached: int = 0) -> Usage:
    return Usage(num_prompt_tokens=prompt, num_answer_tokens=answer, num_cached_tokens=cached)


def test_latencies_and_throughput_are_those_of_the_times():
    outcomes = [outcome(1.0, 1.2, 1.6, counted=used(3)), outcome(2.5, 3.0, due_s=0.5, counted=used(2))]
    summary = summarise(outcomes, duration_s=4.0, percentiles=[50, 100])
    medians = {latency.name: latency.over.median for latency in summary.latencies}
    assert medians == pytest.approx({"TTFT": 1.5, "TPOT": 0.4, "ITL": 0.4, "E2E": 2.05})
    assert summary.latencies[0].over.percentiles == ((50, pytest.approx(1.5)), (100, 2.0))
    assert (summary.requests_per_s, summary.answer_tokens_per_s, summary.total_tokens_per_s) == (0.5, 1.25, 6.25)
    assert summary.peak_concurrency == 2
    assert summary.notes == ()


def test_coalesced_frames_are_not_gaps_between_tokens():
    """Ids say how many tokens a frame has: 1, then 3 after 0.6 s."""
    summary = summarise([outcome(1.0, 1.6, tokens=[1, 3], counted=used(4))], duration_s=2.0)
    rows = {latency.name: latency for latency in summary.latencies}
    assert "ITL" not in rows
    assert rows["ITL per frame"].values_s == pytest.approx((0.6,))
    assert rows["ITL per token"].values_s == pytest.approx((0.2, 0.2, 0.2))
    assert rows["TPOT"].over.mean == pytest.approx(0.2)
    assert "2 frames for 4 tokens" in summary.notes[0]


def test_frames_of_unknown_size_have_no_gap_per_token():
    summary = summarise([outcome(1.0, 1.6, tokens=[None, None], counted=used(4))], duration_s=2.0)
    assert [latency.name for latency in summary.latencies] == ["TTFT", "TPOT", "ITL per frame", "E2E"]
    assert summary.num_answer_tokens == 4


def test_as_many_frames_as_tokens_are_a_token_each():
    summary = summarise([outcome(1.0, 1.5, tokens=[None, None], counted=used(2))], duration_s=2.0)
    assert [latency.name for latency in summary.latencies] == ["TTFT", "TPOT", "ITL", "E2E"]
    assert summary.notes == ()


def test_without_usage_frames_are_counted_and_that_is_said():
    summary = summarise([outcome(1.0, 1.5, 2.0, tokens=[None] * 3)], duration_s=2.0)
    assert summary.num_answer_tokens == 3
    assert any("counted as frames" in note for note in summary.notes)
    by_ids = summarise([outcome(1.0, 1.5, tokens=[1, 2], asked=3)], duration_s=2.0)
    assert by_ids.num_answer_tokens == 3
    assert any("by their ids" in note for note in by_ids.notes)


def test_one_token_or_one_frame_has_no_time_per_token():
    summary = summarise([outcome(1.0), outcome(1.0, tokens=[3], counted=used(3))], duration_s=2.0)
    assert [latency.key for latency in summary.latencies] == ["ttft", "e2e"]


def test_goodput_counts_what_meets_every_limit_of_all_that_was_asked():
    outcomes = [
        outcome(0.1, 0.2),  # good
        outcome(0.1, 0.9),  # TPOT
        outcome(0.5, 0.6),  # TTFT
        outcome(0.1),  # one token meets TPOT
        outcome(failure=FailureKind.TOO_MANY),
    ]
    summary = summarise(outcomes, duration_s=2.0, limits=parse_limits("ttft:200ms tpot:150ms e2e:2s"))
    assert summary.goodput is not None
    assert (summary.goodput.num_good, summary.goodput.share, summary.goodput.requests_per_s) == (2, 0.4, 1.0)
    assert summary.metrics()["goodput_share"] == 0.4


def test_limits_are_read_as_people_write_them():
    assert parse_limits("ttft:200ms, e2e:2s") == (
        Limit(measure=Measure.TTFT, at_most_s=0.2),
        Limit(measure=Measure.E2E, at_most_s=2.0),
    )
    for wrong in ("ttft", "ttft:", "itl:3ms", "ttft:200", "ttft:1s ttft:2s"):
        with pytest.raises(ConfigError):
            parse_limits(wrong)


def test_failures_are_counted_by_kind_and_left_out_of_the_rest():
    many = [outcome(due_s=1.0, failure=FailureKind.TOO_MANY) for _ in range(3)]
    cut = outcome(0.1, 0.2, failure=FailureKind.BROKEN)
    summary = summarise([cut, *many, outcome(0.5, 1.0)], duration_s=2.0)
    assert [(each.kind, each.num) for each in summary.failures] == [(FailureKind.TOO_MANY, 3), (FailureKind.BROKEN, 1)]
    assert summary.failures[0].example == "because of too_many"
    assert (summary.num_requests, summary.num_completed, summary.num_answer_tokens) == (5, 1, 2)
    assert summary.metrics()["num_failed_too_many"] == 3
    assert summary.latencies[0].values_s == (0.5,)


def test_when_all_failed_there_are_no_latencies():
    summary = summarise([outcome(failure=FailureKind.UNREACHABLE)], duration_s=1.0)
    assert summary.latencies == ()
    assert summary.requests_per_s == 0


def test_short_answers_other_prompts_and_cached_ones_are_said():
    summary = summarise([outcome(1.0, 2.0, counted=used(2, prompt=12, cached=5), asked=8)], duration_s=2.0)
    told = " ".join(summary.notes)
    assert "1 answers ended before" in told
    assert "12 tokens in all, planned were 10" in told
    assert "took 5 prompt tokens from its cache" in told
    assert summary.num_prompt_tokens == 12


def test_a_kind_of_failure_has_its_advice():
    assert set(ADVICE) == set(FailureKind)


# A server on a socket -------------------------------------------------------------------------------------------------


class Scripted:
    """A server that gives each request the next raw reply; None closes the connection, "hang" says nothing."""

    def __init__(self, *replies: bytes | str | None) -> None:
        self._replies = list(replies)
        self.bodies: list[dict[str, Any]] = []
        self.num_connections = 0
        self.asked, self.closed = asyncio.Event(), asyncio.Event()
        self.url = ""

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.num_connections += 1
        try:
            while True:
                head = (await reader.readuntil(b"\r\n\r\n")).decode().lower()
                length = next(line.partition(":")[2] for line in head.splitlines() if line.startswith("content-length"))
                self.bodies.append(json.loads(await reader.readexactly(int(length)) or b"{}"))
                self.asked.set()
                reply = self._replies.pop(0)
                if reply == "hang":
                    await reader.read()
                if not isinstance(reply, bytes):
                    return
                writer.write(reply)
                await writer.drain()
                if b"connection: close" in reply:
                    return
        except asyncio.IncompleteReadError:
            pass
        finally:
            self.closed.set()
            writer.close()


@asynccontextmanager
async def scripted(*replies: bytes | str | None, **options: Any) -> Any:
    """The script and a client of it."""
    script = Scripted(*replies)
    server = await asyncio.start_server(script.serve, "127.0.0.1", 0)
    script.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    client = Client(script.url, **options)
    try:
        yield script, client
    finally:
        client.close()
        server.close()
        await server.wait_closed()


def http(body: bytes, *, status: str = "200 OK", kind: str = "application/json", more: str = "") -> bytes:
    head = f"HTTP/1.1 {status}\r\ncontent-type: {kind}\r\ncontent-length: {len(body)}\r\n{more}\r\n"
    return head.encode() + body


def stream(*events: bytes) -> bytes:
    chunks = b"".join(b"%x\r\n%s\r\n" % (len(each), each) for each in (*events, DONE))
    head = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream; charset=utf-8\r\ntransfer-encoding: chunked\r\n\r\n"
    return head + chunks + b"0\r\n\r\n"


def refusal(status: str, message: str = "no") -> bytes:
    return http(json.dumps({"error": {"message": message}}).encode(), status=status)


async def ask(client: Client) -> Reply:
    return await client.ask(Endpoint.COMPLETIONS, b"{}")


async def test_a_stream_is_read_to_its_end_and_its_connection_used_again():
    reply = stream(text(ids=[1]), text(ids=[2], finish="length"), usage(3, 2))
    async with scripted(reply, reply) as (script, client):
        for _ in range(2):
            got = await ask(client)
            assert got.failure is None
            assert [frame.num_tokens for frame in got.frames] == [1, 1]
            assert got.usage == used(2, prompt=3)
            assert got.finish_reason == "length"
            assert got.sent_s <= got.frames[0].at_s <= got.ended_s
        assert script.num_connections == 1


async def test_an_answer_may_end_with_its_connection():
    body = text(ids=[1]) + text(ids=[2], finish="stop")
    reply = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\nconnection: close\r\n\r\n" + body
    async with scripted(reply, reply) as (script, client):
        assert (await ask(client)).failure is None
        assert len((await ask(client)).frames) == 2
        assert script.num_connections == 2


async def test_a_connection_that_was_closed_in_between_is_replaced():
    reply = stream(text(ids=[1], finish="stop"))
    async with scripted(reply, None, reply) as (script, client):
        assert (await ask(client)).failure is None
        assert (await ask(client)).failure is None  # its first try finds the connection closed
        assert script.num_connections == 2


@pytest.mark.parametrize(
    ("reply", "kind", "said"),
    [
        (refusal("401 Unauthorized", "Wrong API key."), FailureKind.UNAUTHORIZED, "HTTP 401: Wrong API key."),
        (refusal("404 Not Found", "No such model."), FailureKind.NOT_FOUND, "No such model."),
        (refusal("429 Too Many Requests", "Full."), FailureKind.TOO_MANY, "HTTP 429: Full."),
        (refusal("503 Service Unavailable", "Loading."), FailureKind.UNAVAILABLE, "HTTP 503: Loading."),
        (refusal("400 Bad Request", "Too long."), FailureKind.REFUSED, "Too long."),
        (http(b"oh", status="500 Internal"), FailureKind.SERVER_ERROR, "HTTP 500: 'oh'"),
        (http(b"<html>", kind="text/html"), FailureKind.NONSENSE, "'<html>'"),
        (stream(text(), event(error={"message": "out of nodes"})), FailureKind.FAILED, "out of nodes"),
        (stream(), FailureKind.EMPTY, "no token"),
        (None, FailureKind.BROKEN, "connection"),
        (b"SSH-2.0\r\n\r\n", FailureKind.BROKEN, "HTTP"),
        (http(text(), kind="text/event-stream"), FailureKind.BROKEN, "without its end"),
        (stream(text())[:-20] + b"", FailureKind.TIMEOUT, "0.1 s"),
        ("hang", FailureKind.TIMEOUT, "0.1 s"),
    ],
)
async def test_what_a_server_does_wrong_is_a_failure_of_its_kind(reply, kind, said):
    async with scripted(reply, timeout_s=0.1 if kind is FailureKind.TIMEOUT else 10.0) as (_, client):
        failure = (await ask(client)).failure
        assert failure is not None
        assert failure.kind is kind
        assert said in failure.message


async def test_nobody_there_is_a_failure_too():
    async with scripted() as (script, _):
        pass
    failure = (await ask(Client(script.url))).failure
    assert failure is not None
    assert failure.kind is FailureKind.UNREACHABLE
    assert script.url in failure.message


async def test_a_cancelled_request_is_dropped():
    async with scripted("hang") as (script, client):
        task = asyncio.create_task(ask(client))
        await asyncio.wait_for(script.asked.wait(), 5)
        task.cancel()
        await asyncio.wait_for(script.closed.wait(), 5)


MODELS = http(json.dumps({"data": [{"id": "one", "owned_by": "somebody"}]}).encode())


def plan(**fields: Any) -> Bench:
    defaults = {"prompt_lengths": fixed(40), "answer_lengths": fixed(2), "num_warm_up": 0}
    return Bench(**{**defaults, "load": Load(concurrency=1, num_requests=2), **fields})


async def test_a_stranger_is_asked_in_words_that_make_the_tokens():
    """8 words are 20 tokens and 32 are 68: two each, and a template of 4. So 40 tokens are 18 words."""
    calibration = [stream(text(), usage(20, 1)), stream(text(), usage(68, 1))]
    async with scripted(MODELS, *calibration, *[stream(text(), text(), usage(40, 2))] * 2) as (script, client):
        run = await bench(client, plan(endpoint=Endpoint.CHAT))
    assert [outcome.num_prompt_tokens for outcome in run.outcomes] == [40, 40]
    body = script.bodies[-1]
    assert len(body["messages"][0]["content"].split()) == 18
    assert body["stream_options"] == {"include_usage": True}
    assert set(body) == {"model", "messages", "max_tokens", "temperature", "stream", "stream_options"}


async def test_a_server_that_counts_nothing_is_asked_in_as_many_words_and_that_is_said():
    async with scripted(MODELS, *[stream(text(), text())] * 3) as (script, client):
        run = await bench(client, plan())
    assert len(script.bodies[-1]["prompt"].split()) == 40
    told = " ".join(summarise(run.outcomes, duration_s=1.0).notes)
    assert "Lengths of 2 prompts are a guess" in told
    assert "Tokens of 2 answers are counted as frames" in told


async def test_a_known_server_is_asked_by_ids_of_its_own_tokenizer():
    models = http(json.dumps({"data": [{"id": "one", "owned_by": "vllm"}]}).encode())
    reply = stream(text(ids=[1]), text(ids=[2]), usage(40, 2))
    async with scripted(models, http(b'{"tokens": [7, 8, 8, 9]}'), *[reply] * 3) as (script, client):
        run = await bench(client, plan(ignore_eos=True, num_warm_up=1))
    warm, *counted = script.bodies[-3:]
    assert len(run.outcomes) == 2
    assert all(len(body["prompt"]) == 40 and set(body["prompt"]) <= {7, 8, 9} for body in (warm, *counted))
    assert warm["prompt"] not in [body["prompt"] for body in counted]
    assert counted[0]["ignore_eos"] is True
    assert counted[0]["return_token_ids"] is True
    assert counted[0]["cache_salt"] == counted[1]["cache_salt"]


async def test_failures_after_the_warm_up_are_outcomes():
    good = stream(text(), usage(40, 1))
    replies = [MODELS, good, good, refusal("429 Too Many Requests"), good]
    async with scripted(*replies) as (_, client):
        run = await bench(client, plan())
    assert [outcome.is_complete for outcome in run.outcomes] == [False, True]


@pytest.mark.parametrize(
    ("replies", "error", "said"),
    [
        ([refusal("401 Unauthorized", "Wrong key.")], UnavailableError, "--api-key"),
        ([http(b'{"data": []}')], UnavailableError, "no model"),
        ([http(b'{"data": [{"id": "a"}, {"id": "b"}]}')], ConfigError, "--model: a, b"),
        ([http(b"<html>")], TransportError, "does not answer as"),
        ([http(b'{"data": [{}]}')], TransportError, "does not answer as"),
        ([None], TransportError, "Check the URL"),
        ([MODELS, refusal("503 Service Unavailable", "Loading.")], UnavailableError, "Loading. The server is loading"),
        (
            [MODELS, *[stream(text(), usage(30, 1))] * 2, refusal("400 Bad Request", "Too long.")],
            UnavailableError,
            "Too long. Check --input-len",
        ),
    ],
)
async def test_what_is_wrong_before_anything_counts_is_an_error(replies, error, said):
    async with scripted(*replies) as (_, client):
        with pytest.raises(error, match=said):
            await bench(client, plan(num_warm_up=1))


@pytest.mark.parametrize("url", ["foo", "ftp://x", "http://", "http://x:y", "http://[", "http://h:99999"])
def test_a_url_that_is_none_is_refused(url):
    with pytest.raises(ConfigError, match="http://HOST:PORT"):
        Client(url)


def test_headers_are_checked_before_anything_is_sent():
    assert parse_headers(["X-One: a: b", "Two:2"]) == {"x-one": "a: b", "two": "2"}
    for wrong in ("novalue", ": x"):
        with pytest.raises(ConfigError, match="Name: value"):
            parse_headers([wrong])
    with pytest.raises(ConfigError):
        Client("http://h", api_key="schlüssel")
    with pytest.raises(ConfigError):
        Client("http://h", headers={"bad name": "x"})
