"""`tllm lab`: experiments that can be repeated, their records, and reports of them."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tllm.cli import options
from tllm.core.errors import ConfigError, EngineError
from tllm.core.units import format_seconds

if TYPE_CHECKING:
    from collections.abc import Callable

    from rich.console import Console

    from tllm.lab.description import Description
    from tllm.lab.experiment import Experiment, Parameter
    from tllm.lab.record import Records
    from tllm.lab.runner import Progress
    from tllm.lab.spec import Spec

Out = Annotated[
    Path | None, typer.Option(help="Directory of report.md and its pictures; beside the records by default.")
]
NoPictures = Annotated[bool, typer.Option("--no-pictures", help="The report in Markdown alone, without matplotlib.")]

app = typer.Typer(help="Run experiments, keep their records, report what they say.", no_args_is_help=True)


@app.command("list")
def list_() -> None:
    """Experiments that there are, and runs that are kept."""
    from tllm.lab.experiments import KINDS
    from tllm.lab.record import Records, records_path

    for kind, (question, _) in KINDS.items():
        print(f"{kind:<18}{question}")
    with Records(records_path()) as records:
        print(f"\n{records.path} has")
        for name in records.runs() or ("no run yet",):
            print(f"  {name}")


@app.command()
def run(
    what: Annotated[str, typer.Argument(help="An experiment that `tllm lab list` names, or a file SPEC.toml.")],
    model: Annotated[
        str | None, typer.Option(help="A directory, a hub id, or a preset; the experiment's own by default.")
    ] = None,
    dtype: options.ModelDType = None,
    quantize: options.Quantize = None,
    repeats: Annotated[
        int | None, typer.Option(help="Counted ones of every cell; 5 by default. Fewer conclude nothing.")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Of the order and of the workloads; 0 by default.")] = None,
    settings: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Any other parameter, such as batch=[1,4].")
    ] = None,
    out: Out = None,
    no_pictures: NoPictures = False,
    log_level: options.Log = options.LogLevel.ERROR,
) -> None:
    """Measure every cell of an experiment, keep the records, and report."""
    options.set_up_logging(log_level)
    import asyncio

    from rich.console import Console

    from tllm.lab.environment import environment
    from tllm.lab.experiments import find
    from tllm.lab.record import Records, records_path
    from tllm.lab.runner import run as run_experiment
    from tllm.lab.spec import parse_settings, read_spec, spec_of

    kind, values = read_spec(Path(what)) if what.endswith(".toml") else (what, {})
    flags = {"model": model, "dtype": dtype, "quantize": quantize, "repeats": repeats, "seed": seed}
    values |= {name: value for name, value in flags.items() if value is not None}
    values |= _beside(flags, parse_settings(settings or ()))
    spec = spec_of(kind, values)
    experiment = find(kind, spec.parameters)
    if not no_pictures:
        _require_pictures()
    console = Console(stderr=True, highlight=False, soft_wrap=True, markup=False)
    console.print(_announcement(experiment, spec))
    with Records(records_path()) as records:
        name = _new_name(records, kind)
        try:
            with _progress(console) as on_progress:
                running = run_experiment(
                    experiment, spec, records, name=name, environment=environment(), on_progress=on_progress
                )
                description = asyncio.run(running)
        except KeyboardInterrupt:
            console.print(f"Interrupted. What was measured is kept; `tllm lab report {name}` shows it.")
            raise
        _report(records, description, out, drawn=not no_pictures)
    if len(description.failures) == sum(not cell.refused for cell in description.cells):
        raise EngineError(f"No cell of {kind} could be measured; the report says why.")


@app.command()
def report(
    which: Annotated[
        str | None, typer.Argument(help="A run, or an experiment for its latest; the latest of all.")
    ] = None,
    out: Out = None,
    no_pictures: NoPictures = False,
) -> None:
    """Make a report again from what was kept."""
    from tllm.lab.description import Description
    from tllm.lab.record import Records, records_path

    if not no_pictures:
        _require_pictures()
    with Records(records_path()) as records:
        found = [name for name in records.runs() if which == name] or records.runs(which)
        if not found:
            asked = "no run yet" if which is None else f"no run and no experiment {which!r}"
            kept = ", ".join(records.runs()) or "nothing: `tllm lab run` comes first"
            raise ConfigError(f"{records.path} has {asked}; it has {kept}.")
        _report(records, Description.from_json(records.description(found[-1])), out, drawn=not no_pictures)


def _report(records: Records, description: Description, out: Path | None, *, drawn: bool) -> None:
    """Write it, show what it says, and where it is."""
    from tllm.lab.report import summary, write
    from tllm.lab.rows import rows

    kept = records.find(experiment=description.experiment, run=description.run)
    directory = out or records.path.parent / "reports" / description.run
    path = write(description, kept, directory, drawn=drawn)
    print(summary(description, rows(description, kept)))
    print(f"\n{path}")


def _new_name(records: Records, kind: str) -> str:
    """One that no run has yet: the experiment and the second in which it starts."""
    from tllm.lab.record import utc_now

    name = f"{kind}-{utc_now()[:19].replace('-', '').replace(':', '').replace('T', '-')}"
    taken = records.runs()
    numbered = (f"{name}-{number}" for number in range(2, len(taken) + 2))
    return next(each for each in (name, *numbered) if each not in taken)


def _beside(flags: Mapping[str, object], settings: dict[str, Parameter]) -> dict[str, Parameter]:
    """`settings` themselves. Raises ConfigError when one was given by its flag as well."""
    if twice := sorted(name for name in settings if flags.get(name) is not None):
        raise ConfigError(f"{', '.join(twice)}: given by --set and by a flag. Leave out one or the other.")
    return settings


def _require_pictures() -> None:
    """Before anything is measured. Raises ConfigError."""
    if importlib.util.find_spec("matplotlib") is None:
        raise ConfigError(
            "A report with pictures needs matplotlib. Install it with: pip install 'tllm[lab]', or give --no-pictures."
        )


def _announcement(experiment: Experiment, spec: Spec) -> str:
    cells = [cell for cell in experiment.cells if not cell.refused]
    number = len(cells) * (spec.warmups + spec.repeats)
    return (
        f"{experiment.name}: {experiment.title}\n"
        f"{experiment.conditions.model}; {len(cells)} cells of {len(experiment.cells)} can be measured here, each "
        f"{spec.warmups} + {spec.repeats} times: {number} measurements, none longer than {format_seconds(spec.limit_s)}"
    )


@contextmanager
def _progress(console: Console) -> Iterator[Callable[[Progress], None]]:
    """A bar on a terminal; elsewhere the expected time once it is known, and every failure."""
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn
    from rich.progress import Progress as Bar

    failed: set[str] = set()
    estimated = False
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[left]}"))
    with Bar(*columns, console=console, disable=not console.is_terminal, transient=True) as bar:
        task = bar.add_task("opening", total=None, left="")

        def show(progress: Progress) -> None:
            nonlocal estimated
            left = "" if progress.left_s is None else f"about {format_seconds(progress.left_s)} left"
            bar.update(
                task,
                description=f"{progress.phase} of {progress.cell}",
                completed=progress.num_done,
                total=progress.num_total,
                left=left,
            )
            if left and not estimated:
                estimated = True
                bar.console.print(f"{progress.num_total - progress.num_done} measurements to come: {left}")
            if progress.failure and progress.cell not in failed:
                failed.add(progress.cell)
                bar.console.print(f"{progress.cell} failed: {progress.failure}")

        yield show
