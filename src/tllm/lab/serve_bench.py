"""Load on a server, in a closed or an open loop, through any OpenAI-compatible URL.

    closed loop   as many requests at once as were asked for; each follows on the end of another
    open loop     requests are due at their scheduled arrivals, whatever becomes of those before them
                  with a cap on concurrency, those above it wait in the client, and their waiting counts

This file does not know what is concluded from the outcomes, nor how anything is shown.
"""

from __future__ import annotations

import asyncio
import json
import math
import secrets
from collections.abc import Awaitable, Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import islice
from random import Random

from tllm.core.errors import ConfigError, UnavailableError
from tllm.lab.client import ADVICE, Client, Endpoint, Reply
from tllm.lab.record import Setting
from tllm.lab.serve_summary import Outcome
from tllm.lab.workload import WORDS, Ids, Lengths, Planned, Rate, Words, Workload, alphabet

# How many words are asked about to learn how many tokens a word makes, and how many a template adds.
_FEW_WORDS, _MANY_WORDS = 8, 32
_TIMER_S = 1e-3  # that an event loop's timers may be late on Linux: a poll waits whole milliseconds


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """A request, ready to be sent."""

    planned: Planned
    body: bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """How much is asked. `concurrency` is None only in an open loop, and says there that nothing caps it."""

    concurrency: int | None
    num_requests: int | None = None  # None: until `duration_s`
    duration_s: float | None = None  # after which nothing new is due; what is under way is waited for

    def __post_init__(self) -> None:
        if self.concurrency is not None and self.concurrency < 1:
            raise ConfigError(f"The concurrency is {self.concurrency}; it must be at least 1.")
        if self.num_requests is not None and self.num_requests < 1:
            raise ConfigError(f"The number of prompts is {self.num_requests}; it must be at least 1.")
        if self.duration_s is not None and not self.duration_s > 0:
            raise ConfigError(f"The duration is {self.duration_s:g} s; it must be above 0.")
        assert self.num_requests is not None or self.duration_s is not None


@dataclass(frozen=True, slots=True, kw_only=True)
class Bench:
    """All that a person decides."""

    endpoint: Endpoint = Endpoint.COMPLETIONS
    model: str | None = None  # the only one that is served
    prompt_lengths: Lengths
    answer_lengths: Lengths
    load: Load
    rate: Rate | None = None  # an open loop
    num_warm_up: int = 2
    seed: int = 0
    ignore_eos: bool = False

    def __post_init__(self) -> None:
        if self.num_warm_up < 0:
            raise ConfigError(f"{self.num_warm_up} requests cannot warm up; give at least 0.")
        if self.rate is not None and self.rate.requests_per_s == math.inf and self.load.num_requests is None:
            raise ConfigError("An infinite request rate never ends. Say how many requests: give --num-prompts.")
        assert self.rate is not None or self.load.concurrency is not None

    def workload(self, prompts: Ids | Words) -> Workload:
        return Workload(
            seed=self.seed,
            prompt_lengths=self.prompt_lengths,
            answer_lengths=self.answer_lengths,
            prompts=prompts,
            rate=self.rate,
        )

    def settings(self) -> Mapping[str, Setting]:
        """For a record."""
        made: dict[str, Setting] = {
            "endpoint": self.endpoint.value,
            "prompt_tokens": str(self.prompt_lengths),
            "answer_tokens": str(self.answer_lengths),
            "ignore_eos": self.ignore_eos,
            "warm_up": self.num_warm_up,
        }
        if self.rate is not None:
            made |= {"request_rate_per_s": f"{self.rate.requests_per_s:g}", "burstiness": self.rate.burstiness}
        if self.load.concurrency is not None:
            made["concurrency"] = self.load.concurrency
        if self.load.num_requests is not None:
            made["num_requests"] = self.load.num_requests
        if self.load.duration_s is not None:
            made["duration_s"] = self.load.duration_s
        return made


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """All requests, in the order in which they ended, and how long they took together."""

    outcomes: tuple[Outcome, ...]
    duration_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Dialect:
    """What a kind of server takes beyond what all do."""

    takes_ids: bool = False  # prompts of token ids
    counts_tokens: bool = False  # in every frame, by their ids
    fresh: str | None = None  # the field that keeps this run's prompts apart from those cached by another
    is_salted: bool = False  # the field takes a word of ours; else False turns the cache off


# By what /v1/models calls the owner of a model. Others are sent nothing that is not OpenAI's.
_DIALECTS: Mapping[str, Dialect] = {
    "tllm": Dialect(takes_ids=True, counts_tokens=True, fresh="cache_salt", is_salted=True),
    "vllm": Dialect(takes_ids=True, counts_tokens=True, fresh="cache_salt", is_salted=True),
    "llamacpp": Dialect(takes_ids=True, fresh="cache_prompt"),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Served:
    """A model at a server, and how it is asked."""

    endpoint: Endpoint
    model: str
    dialect: Dialect
    ignore_eos: bool
    salt: str
    prompts: Ids | Words

    def question(self, planned: Planned) -> Question:
        body: dict[str, object] = {
            "model": self.model,
            "max_tokens": planned.num_answer_tokens,
            "temperature": 0,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        if self.dialect.counts_tokens:
            body["return_token_ids"] = True
        if self.dialect.fresh is not None:
            body[self.dialect.fresh] = self.salt if self.dialect.is_salted else False
        if self.ignore_eos:
            body["ignore_eos"] = True
        prompt = planned.prompt
        match self.endpoint:
            case Endpoint.COMPLETIONS:
                body["prompt"] = list(prompt.ids) if prompt.ids else prompt.text
            case Endpoint.CHAT:
                body["messages"] = [{"role": "user", "content": prompt.text}]
        return Question(planned=planned, body=json.dumps(body).encode())


async def find_model(client: Client, *, endpoint: Endpoint, model: str | None, ignore_eos: bool) -> Served:
    """What the server has, and how to make prompts for it: of ids where it takes them and names some, else of words.

    Raises ConfigError where several models are served and none was named, UnavailableError and TransportError.
    """
    listed = await client.models()
    if model is None:
        if not listed:
            raise UnavailableError(f"The server at {client.url} lists no model.", state="failed")
        if len(listed) > 1:
            names = ", ".join(each.name for each in listed)
            raise ConfigError(f"The server at {client.url} has several models. Give one with --model: {names}.")
        model = listed[0].name
    owner = next((each.owner for each in listed if each.name == model), "")
    served = Served(
        endpoint=endpoint,
        model=model,
        dialect=_DIALECTS.get(owner, Dialect()),
        ignore_eos=ignore_eos,
        salt=secrets.token_hex(8),
        prompts=Words(tokens_per_word=1.0),
    )
    if endpoint is Endpoint.COMPLETIONS and served.dialect.takes_ids:
        ids = await client.tokenize(model, " ".join(WORDS))
        if ids:
            return replace(served, prompts=Ids(alphabet=alphabet(ids)))
    return replace(served, prompts=await _words(client, served))


async def bench(
    client: Client,
    plan: Bench,
    *,
    on_begin: Callable[[Served], None] = lambda _: None,
    on_outcome: Callable[[Outcome], None] = lambda _: None,
) -> Run:
    """Find the model, warm up, and put the load on it; what fails then is an outcome too.

    Raises ConfigError, UnavailableError and TransportError for what goes wrong before. Closes the client.
    """
    try:
        served = await find_model(client, endpoint=plan.endpoint, model=plan.model, ignore_eos=plan.ignore_eos)
        work = plan.workload(served.prompts)
        await _warm_up(client, served, plan)
        on_begin(served)
        return await drive(
            map(served.question, work.requests()), _asking(client, served), plan.load, on_outcome=on_outcome
        )
    finally:
        client.close()


async def drive(
    questions: Iterator[Question],
    ask: Callable[[Question], Awaitable[Reply]],
    load: Load,
    *,
    on_outcome: Callable[[Outcome], None] = lambda _: None,
) -> Run:
    """Ask as the load says, from now on. Questions are made before they are due, so that making them takes no time."""
    clock = asyncio.get_running_loop().time
    questions = islice(questions, load.num_requests)
    first = next(questions)
    outcomes: list[Outcome] = []
    start_s = clock()
    end_s = start_s + load.duration_s if load.duration_s is not None else None

    def keep(question: Question, due_s: float, begun_s: float, reply: Reply) -> None:
        outcome = Outcome(planned=question.planned, due_s=due_s, begun_s=begun_s, reply=reply)
        outcomes.append(outcome)
        on_outcome(outcome)

    async def follow(question: Question | None) -> None:
        while question is not None and (end_s is None or clock() < end_s):
            due_s = clock()
            keep(question, due_s, due_s, await ask(question))
            question = next(questions, None)

    async def arrive(group: asyncio.TaskGroup, question: Question | None) -> None:
        gate = asyncio.Semaphore(load.concurrency) if load.concurrency is not None else None

        async def answer(question: Question, due_s: float) -> None:
            begun_s = clock()
            if gate is None:
                reply = await ask(question)
            else:
                async with gate:
                    reply = await ask(question)
            keep(question, due_s, begun_s, reply)

        while question is not None:
            assert question.planned.due_s is not None
            due_s = start_s + question.planned.due_s
            if end_s is not None and due_s >= end_s:
                return
            await _until(due_s)
            group.create_task(answer(question, due_s))
            question = next(questions, None)

    async with asyncio.TaskGroup() as group:
        if first.planned.due_s is not None:
            await arrive(group, first)
        else:
            assert load.concurrency is not None
            for question in (first, *islice(questions, load.concurrency - 1)):
                group.create_task(follow(question))
    return Run(outcomes=tuple(outcomes), duration_s=clock() - start_s)


async def _until(at_s: float) -> None:
    """Sleep while a timer is good enough, then look again and again, so that arrivals are not a millisecond late."""
    clock = asyncio.get_running_loop().time
    if (timer_s := at_s - clock() - _TIMER_S) > 0:
        await asyncio.sleep(timer_s)
    while clock() < at_s:  # noqa: ASYNC110  there is nothing to wait for but time
        await asyncio.sleep(0)


async def _warm_up(client: Client, served: Served, plan: Bench) -> None:
    """Requests of the same kind with other prompts, in a closed loop. Raises UnavailableError when none is answered."""
    if plan.num_warm_up == 0:
        return
    at_once = min(plan.load.concurrency or plan.num_warm_up, plan.num_warm_up)
    load = Load(concurrency=at_once, num_requests=plan.num_warm_up)
    # No seed of a user is negative, so that no prompt of the warm-up is one that counts.
    work = replace(plan, seed=-1 - plan.seed, rate=None, load=load).workload(served.prompts)
    run = await drive(map(served.question, work.requests()), _asking(client, served), load)
    failures = [outcome.reply.failure for outcome in run.outcomes if outcome.reply.failure is not None]
    if len(failures) == len(run.outcomes):
        raise UnavailableError(
            f"No request of the warm-up was answered. {failures[0].message} {ADVICE[failures[0].kind]}", state="failed"
        )


def _asking(client: Client, served: Served) -> Callable[[Question], Awaitable[Reply]]:
    return lambda question: client.ask(served.endpoint, question.body)


async def _words(client: Client, served: Served) -> Words:
    """How many tokens words make at this server, from the usage of two answers of one token; 1 where it tells none.

    Raises UnavailableError when it refuses them.
    """
    counts = []
    for num_words in (_FEW_WORDS, _MANY_WORDS):
        planned = Planned(
            index=0,
            due_s=None,
            num_prompt_tokens=num_words,
            num_answer_tokens=1,
            prompt=served.prompts.prompt(Random("words"), num_words),
        )
        reply = await client.ask(served.endpoint, served.question(planned).body)
        if reply.usage is None and reply.failure is not None:
            raise UnavailableError(f"{reply.failure.message} {ADVICE[reply.failure.kind]}", state="failed")
        if reply.usage is None:
            return Words(tokens_per_word=1.0)
        counts.append(reply.usage.num_prompt_tokens)
    few, many = counts
    tokens_per_word = max((many - few) / (_MANY_WORDS - _FEW_WORDS), 0.1)
    return Words(tokens_per_word=tokens_per_word, num_extra_tokens=max(0.0, few - _FEW_WORDS * tokens_per_word))
