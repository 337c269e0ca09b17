"""`tllm bench serve`: load on any OpenAI-compatible server, and what became of it: a table, JSON, a picture, a record.

This file does not know how load is made, nor what follows from the times.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tllm.core.errors import ConfigError
from tllm.core.units import format_seconds, parse_seconds

if TYPE_CHECKING:
    from types import TracebackType

    from rich.progress import Progress

    from tllm.lab.record import Record
    from tllm.lab.serve_bench import Bench, Load, Run, Served
    from tllm.lab.serve_summary import Distribution, Outcome, Summary
    from tllm.lab.workload import Lengths, LogNormal

_URL = "http://127.0.0.1:8022"
_NUM_PROMPTS = 100
_INPUT_LEN, _OUTPUT_LEN = "128", "64"


class Dataset(StrEnum):
    FIXED = "fixed"
    UNIFORM = "uniform"
    SHAREGPT = "sharegpt"


class EndpointName(StrEnum):
    COMPLETIONS = "completions"
    CHAT = "chat"


def serve(
    url: Annotated[str, typer.Option("--url", "--base-url", help="With or without /v1.")] = _URL,
    model: Annotated[str | None, typer.Option(help="As the server lists it; the only one by default.")] = None,
    endpoint: Annotated[EndpointName, typer.Option(help="What is asked.")] = EndpointName.COMPLETIONS,
    num_prompts: Annotated[
        int | None, typer.Option(help=f"Requests in all; {_NUM_PROMPTS} by default, no limit beside --duration.")
    ] = None,
    duration: Annotated[
        str | None, typer.Option(help="Begin no request after this long, such as 30s; those under way are waited for.")
    ] = None,
    concurrency: Annotated[
        int | None,
        typer.Option(
            "--concurrency",
            "--max-concurrency",
            help="Requests at once, each following on another's end; 1 by default. Beside --request-rate a cap.",
        ),
    ] = None,
    request_rate: Annotated[
        float | None, typer.Option(help="Arrivals per second that wait for no answer; inf is all at once.")
    ] = None,
    burstiness: Annotated[
        float, typer.Option(help="Of the arrivals: 1 is Poisson, below 1 in bursts, above 1 more even.")
    ] = 1.0,
    dataset: Annotated[
        Dataset, typer.Option(help="Lengths: fixed, uniform, or a log-normal mixture like ShareGPT's conversations.")
    ] = Dataset.FIXED,
    input_len: Annotated[
        str | None, typer.Option(help=f"Tokens of a prompt, N or LO:HI; {_INPUT_LEN} by default. Bounds for sharegpt.")
    ] = None,
    output_len: Annotated[
        str | None,
        typer.Option(help=f"Tokens of an answer, likewise; {_OUTPUT_LEN} by default."),
    ] = None,
    range_ratio: Annotated[
        float | None, typer.Option(help="Uniform lengths from N less this share to N and as much more.")
    ] = None,
    ignore_eos: Annotated[bool, typer.Option("--ignore-eos", help="Ask for answers of full length.")] = False,
    warmup: Annotated[int, typer.Option("--warmup", help="Requests before that do not count.")] = 2,
    seed: Annotated[int, typer.Option(min=0, help="Of arrivals, lengths and prompts.")] = 0,
    goodput: Annotated[
        str | None, typer.Option(help="Also count what meets limits: 'ttft:200ms tpot:50ms e2e:2s', any of them.")
    ] = None,
    percentiles: Annotated[str, typer.Option(help="Columns beside mean and median.")] = "95,99",
    timeout: Annotated[str, typer.Option(help="For a whole answer.")] = "600s",
    api_key: Annotated[str | None, typer.Option(help="The server's key.", envvar="TLLM_API_KEY")] = None,
    header: Annotated[list[str] | None, typer.Option(help="'Name: value', sent along; may be repeated.")] = None,
    save: Annotated[Path | None, typer.Option(help="Write figures and every request's times to a JSON file.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="For programs.")] = False,
    picture: Annotated[Path | None, typer.Option(help="Draw the distributions: a PNG file.")] = None,
) -> None:
    """Put load on any OpenAI-compatible server and tell its throughput and latencies, queueing included."""
    import asyncio

    from tllm.lab.client import Client, Endpoint, parse_headers
    from tllm.lab.serve_bench import Bench, Load, bench
    from tllm.lab.serve_summary import parse_limits, summarise
    from tllm.lab.workload import Rate

    if burstiness != 1.0 and request_rate is None:
        raise ConfigError("--burstiness is of arrivals: give it beside --request-rate.")
    prompts, answers = _lengths(dataset, input_len, output_len, range_ratio)
    rate = None if request_rate is None else Rate(requests_per_s=request_rate, burstiness=burstiness)
    plan = Bench(
        endpoint=Endpoint(endpoint.value),
        model=model,
        prompt_lengths=prompts,
        answer_lengths=answers,
        load=Load(
            concurrency=1 if concurrency is None and rate is None else concurrency,
            num_requests=_NUM_PROMPTS if num_prompts is None and duration is None else num_prompts,
            duration_s=None if duration is None else parse_seconds(duration),
        ),
        rate=rate,
        num_warm_up=warmup,
        seed=seed,
        ignore_eos=ignore_eos,
    )
    limits = parse_limits(goodput) if goodput else ()
    percents = _percentiles(percentiles)
    if picture is not None and picture.suffix != ".png":
        raise ConfigError(f"--picture is {picture}; it must end in .png.")
    client = Client(url, api_key=api_key, headers=parse_headers(header or ()), timeout_s=parse_seconds(timeout))
    with _Progress(plan.load) as progress:
        run = asyncio.run(bench(client, plan, on_begin=progress.begin, on_outcome=progress.count))
    summary = summarise(
        run.outcomes,
        duration_s=run.duration_s,
        is_open_loop=rate is not None,
        percentiles=percents,
        limits=limits,
    )
    record = _record(plan, client.url, progress.model, summary)
    if as_json:
        print(json.dumps(_for_programs(record, summary), indent=2))
    else:
        print(f"{progress.model} at {client.url}: {told(plan)}")
        print("\n".join(lines(summary, percents)))
    if save is not None:
        _write(save, json.dumps(_for_programs(record, summary, run), indent=1))
    if picture is not None:
        _draw(picture, progress.model, summary)
    if summary.num_completed == 0:
        raise typer.Exit(1)


class _Progress:
    """A bar on a terminal, on stderr; nothing elsewhere. Knows what is measured once that has begun."""

    def __init__(self, load: Load) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

        console = Console(stderr=True)
        self.model = ""
        self._num_done = self._num_failed = 0
        self._progress: Progress | None = None
        if console.is_terminal:
            self._progress = Progress(
                TextColumn("{task.description}", markup=False),
                BarColumn(),
                TextColumn("{task.completed:.0f} requests{task.fields[failed]}", markup=False),
                TimeElapsedColumn(),
                console=console,
                refresh_per_second=2,  # it shares processors with what it shows
                transient=True,
            )
            self._task = self._progress.add_task("warming up", total=load.num_requests, failed="")

    def __enter__(self) -> _Progress:
        if self._progress is not None:
            self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._progress is not None:
            self._progress.stop()

    def begin(self, served: Served) -> None:
        self.model = served.model
        if self._progress is not None:
            self._progress.update(self._task, description=served.model)

    def count(self, outcome: Outcome) -> None:
        self._num_done += 1
        self._num_failed += not outcome.is_complete
        if self._progress is not None:
            failed = f", {self._num_failed} failed" if self._num_failed else ""
            self._progress.update(self._task, completed=self._num_done, failed=failed)


def told(plan: Bench) -> str:
    """What was asked, in a line."""
    load = plan.load
    loop = f"{load.concurrency} at once" if plan.rate is None else f"{plan.rate.requests_per_s:g} requests/s"
    if plan.rate is not None and load.concurrency is not None:
        loop += f", at most {load.concurrency} at once"
    lasts = f" for {format_seconds(load.duration_s)}" if load.duration_s is not None else ""
    return f"{loop}{lasts}; prompts of {plan.prompt_lengths} tokens, answers of {plan.answer_lengths}; seed {plan.seed}"


def lines(summary: Summary, percentiles: Sequence[float]) -> Iterator[str]:
    """The figures as a person reads them."""
    from tllm.lab.client import ADVICE

    num_failed = summary.num_requests - summary.num_completed
    figures = [
        ("requests", f"{summary.num_completed} answered, {num_failed} failed, in {_s(summary.duration_s)}"),
        ("tokens", f"{summary.num_prompt_tokens:,} of prompts, {summary.num_answer_tokens:,} of answers"),
        ("peak concurrency", f"{summary.peak_concurrency}"),
        ("request throughput", f"{summary.requests_per_s:.4g} requests/s"),
        ("output throughput", f"{summary.answer_tokens_per_s:.4g} tokens/s"),
        ("total throughput", f"{summary.total_tokens_per_s:.4g} tokens/s"),
    ]
    if summary.goodput is not None:
        good = summary.goodput
        limits = " ".join(f"{limit.measure}:{_s(limit.at_most_s)}" for limit in good.limits)
        figures.append(("goodput", f"{good.requests_per_s:.4g} requests/s, {good.share:.1%} within {limits}"))
    for name, value in figures:
        yield f"  {name:<20}{value}"
    if summary.latencies:
        yield ""
        yield f"  {'':<16}" + "".join(
            f"{column:>12}" for column in ("mean", "median", *(f"p{percent:g}" for percent in percentiles))
        )
        for latency in summary.latencies:
            yield f"  {latency.name:<16}{_cells(latency.over)}"
        if summary.lateness is not None and summary.client_queue is not None:
            yield f"  {'client late':<16}{_cells(summary.lateness)}"
            yield f"  {'client queue':<16}{_cells(summary.client_queue)}"
    if summary.failures:
        yield ""
    for failure in summary.failures:
        yield f"  {failure.num} x {failure.kind}: {failure.example} {ADVICE[failure.kind]}"
    if summary.notes:
        yield ""
    for note in summary.notes:
        yield f"  {note}"


def _cells(over: Distribution) -> str:
    values = (over.mean, over.median, *(value for _, value in over.percentiles))
    return "".join(f"{_s(value):>12}" for value in values)


def _s(seconds: float) -> str:
    return format_seconds(seconds)


def _record(plan: Bench, url: str, model: str, summary: Summary) -> Record:
    """Kept with this user's records."""
    from tllm.lab.environment import environment
    from tllm.lab.record import Record, Records, records_path, utc_now

    at = utc_now()
    record = Record(
        experiment="serve",
        run=f"serve {at}",
        at=at,
        environment=environment(),
        settings={"url": url, "model": model, **plan.settings()},
        repeat=0,
        seed=plan.seed,
        metrics=summary.metrics(),
        notes=" ".join(summary.notes),
    )
    with Records(records_path()) as records:
        records.add(record)
    return record


def _for_programs(record: Record, summary: Summary, run: Run | None = None) -> Mapping[str, object]:
    """Plain JSON, times in seconds; with a run, every request's times from when it was due."""
    made: dict[str, object] = json.loads(record.as_json())
    made["failures"] = [{"kind": each.kind, "num": each.num, "example": each.example} for each in summary.failures]
    if run is not None:
        made["requests"] = [_request(outcome) for outcome in sorted(run.outcomes, key=lambda each: each.planned.index)]
    return made


def _request(outcome: Outcome) -> Mapping[str, object]:
    failure, frames = outcome.reply.failure, outcome.reply.frames
    return {
        "index": outcome.planned.index,
        "due_s": outcome.planned.due_s,
        "sent_after_s": outcome.reply.sent_s - outcome.due_s,
        "frames_after_s": [round(frame.at_s - outcome.due_s, 6) for frame in frames],
        "tokens_of_frames": [frame.num_tokens for frame in frames],
        "num_prompt_tokens": outcome.num_prompt_tokens,
        "num_answer_tokens": outcome.num_tokens,
        "finish_reason": outcome.reply.finish_reason,
        "failure": None if failure is None else {"kind": failure.kind, "message": failure.message},
    }


def _write(path: Path, text: str) -> None:
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{path} cannot be written: {error.strerror}.") from error


def _draw(path: Path, model: str, summary: Summary) -> None:
    """The share of values that are no greater, over time; as high as the line is, so many were as fast."""
    from tllm.lab.pictures import figure

    title = f"{model}: {summary.answer_tokens_per_s:.4g} tokens/s, peak concurrency {summary.peak_concurrency}"
    with figure(path, title=title, x_label="ms", y_label="share of values", x_log=True) as axes:
        for latency in summary.latencies:
            ordered = sorted(latency.values_s)
            shares = [(at + 1) / len(ordered) for at in range(len(ordered))]
            axes.step([1e3 * value_s for value_s in ordered], shares, where="post", label=latency.name)


def _lengths(
    dataset: Dataset, input_len: str | None, output_len: str | None, range_ratio: float | None
) -> tuple[Lengths, Lengths]:
    from tllm.lab.workload import SHAREGPT_ANSWER, SHAREGPT_PROMPT, around, parse_lengths

    if dataset is Dataset.SHAREGPT:
        if range_ratio is not None:
            raise ConfigError("--range-ratio has no effect on --dataset sharegpt; bound its lengths with --input-len.")
        return _bounded(SHAREGPT_PROMPT, input_len), _bounded(SHAREGPT_ANSWER, output_len)
    both = []
    for flag, text in (("--input-len", input_len or _INPUT_LEN), ("--output-len", output_len or _OUTPUT_LEN)):
        lengths = parse_lengths(text)
        if range_ratio is not None:
            if lengths.low != lengths.high:
                raise ConfigError(f"{flag} {text} is a range already; leave out --range-ratio or give one number.")
            lengths = around(lengths.low, range_ratio)
        both.append(lengths)
    prompts, answers = both
    is_fixed = all(lengths.low == lengths.high for lengths in both)
    if dataset is Dataset.UNIFORM and is_fixed:
        raise ConfigError("--dataset uniform needs a range: --input-len LO:HI, --output-len LO:HI or --range-ratio.")
    return prompts, answers


def _bounded(mixture: LogNormal, text: str | None) -> LogNormal:
    """One number is the greatest length."""
    from tllm.lab.workload import parse_lengths

    if text is None:
        return mixture
    bounds = parse_lengths(text)
    low = bounds.low if bounds.low != bounds.high else min(mixture.low, bounds.high)
    return replace(mixture, low=low, high=bounds.high)


def _percentiles(text: str) -> tuple[float, ...]:
    try:
        percents = tuple(float(part) for part in text.split(","))
    except ValueError:
        percents = ()
    if not percents or not all(0 < percent < 100 for percent in percents):
        raise ConfigError(f"--percentiles is {text!r}; give numbers between 0 and 100, such as 90,95,99.9.")
    return percents
