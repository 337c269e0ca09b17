"""What a person sees while a head starts: nodes, the plan, a bar for every shard, and how it ended.

Names, addresses and errors come from elsewhere: they are printed as `Text`, in which rich reads no markup.

This file does not know how any of it comes about.
"""

from __future__ import annotations

from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TaskID, TextColumn
from rich.table import Table
from rich.text import Text

from tllm.cluster.events import (
    HeadEvent,
    Listening,
    Lost,
    Measuring,
    NodeJoined,
    NodeLeft,
    Planned,
    Replanning,
    Serving,
    ShardLoaded,
    ShardLoading,
    Waiting,
)
from tllm.core.units import format_bytes, format_seconds
from tllm.planner.plan import Plan, Prediction, StagePlan, format_rate
from tllm.planner.profile import Load, ModelProfile


class StartView:
    """Shows a head's events on a console; a context, because progress bars own the terminal while they move."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._progress = Progress(
            TextColumn("  {task.description}", markup=False),
            BarColumn(),
            DownloadColumn(),
            TextColumn("{task.fields[took]}", markup=False),
            console=console,
        )
        self._bars: dict[int, TaskID] = {}  # by a stage's first layer

    def __enter__(self) -> StartView:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()

    def __call__(self, event: HeadEvent) -> None:
        match event:
            case Listening():
                return  # only a server that other machines are meant for shows where they can join
            case NodeJoined():
                node = event.node
                self._say(
                    f"  + {node.name}: {node.num_threads} threads, {format_bytes(node.memory_bytes)}, "
                    f"{node.device}, {node.platform}"
                )
            case NodeLeft():
                self._say(f"  - {event.node.name}: {event.reason}")
            case Measuring():
                self._say(f"Measuring {event.num_nodes} nodes and their links, some seconds the first time.")
            case Waiting():
                if event.reason:
                    self._say(event.reason)
                self._say(f"Waiting for {event.num_nodes} node{'s' * (event.num_nodes > 1)}.")
            case Planned():
                self._forget_bars()
                self._console.print(plan_table(event.model, event.plan))
                for line in event.plan.dropped:
                    self._say(f"  not used: {line}")
                if event.plan.prediction is not None:
                    for line in prediction_lines(event.plan.prediction, event.load):
                        self._say(line)
            case ShardLoading():
                self._advance(event.stage, event.done_bytes, event.total_bytes, took="fetching" * event.fetching)
            case ShardLoaded():
                held = event.stage.held_bytes
                fetched = f", {format_bytes(event.fetched_bytes)} over the network" if event.fetched_bytes else ""
                self._advance(event.stage, held, held, took=f"in {format_seconds(event.load_s)}{fetched}")
            case Serving():
                self._progress.stop()
                positions = event.num_blocks * event.block_size
                self._say(f"Serving: contexts of {event.max_model_len} tokens, KV for {positions} in all")
            case Lost():
                self._progress.stop()
                self._say(f"Lost: {event.reason}", style="red")
            case Replanning():
                self._progress.stop()
                self._say(f"Changing the plan: {event.reason}")

    def _forget_bars(self) -> None:
        self._progress.stop()
        for task in self._bars.values():
            self._progress.remove_task(task)
        self._bars.clear()

    def _say(self, line: str, *, style: str = "") -> None:
        self._console.print(Text(line, style=style))

    def _advance(self, stage: StagePlan, done_bytes: int, total_bytes: int, *, took: str = "") -> None:
        first = stage.shard.first_layer
        if first not in self._bars:
            self._progress.start()
            description = f"{stage.node.name} {layers_text(stage)}"
            self._bars[first] = self._progress.add_task(description, total=total_bytes, took="")
        self._progress.update(self._bars[first], completed=done_bytes, total=max(total_bytes, 1), took=took)


def layers_text(stage: StagePlan) -> str:
    """`layers 0..3`, counted from the model's first."""
    return f"layers {stage.shard.first_layer}..{stage.shard.last_layer - 1}"


def plan_table(model: ModelProfile, plan: Plan) -> Table:
    """Which node holds which layers, what that takes, and what a decode step reads there and is predicted to take."""
    title = Text(f"{model.name}: {model.num_layers} layers, {len(plan.stages)} stage(s)", style="table.title")
    predicted = plan.prediction
    table = Table(title=title, title_justify="left", pad_edge=predicted is None)  # 80 columns are enough for both
    columns = ["node", "layers", "holds", "threads", "weights", "read per step"]
    if predicted is not None:
        columns += ["hop", "step"]
    for column in columns:
        words = column in ("node", "layers", "holds")
        table.add_column(column, justify="left" if words else "right", min_width=10 if column == "holds" else None)
    for index, stage in enumerate(plan.stages):
        shard = stage.shard
        ends = ["embedding"] * shard.embed + ["layers"] + ["head"] * shard.head
        times = (predicted.hop_s[index], predicted.stage_s[index]) if predicted is not None else ()
        table.add_row(
            Text(stage.node.name),
            f"{shard.first_layer}..{shard.last_layer - 1}",
            ", ".join(ends),
            str(stage.num_threads),
            format_bytes(stage.held_bytes),
            format_bytes(stage.read_bytes),
            *map(format_seconds, times),
        )
    return table


def prediction_lines(prediction: Prediction, load: Load) -> list[str]:
    """How fast a plan should be, what bounds it, and what that rests on."""
    streams = f"{load.streams} stream{'s' * (load.streams > 1)}"
    lines = [
        f"Predicted: {format_rate(prediction.tokens_per_s)} tokens/s for {streams}, "
        f"{format_seconds(prediction.tpot_s)} from token to token; "
        f"the first after {format_seconds(prediction.ttft_s)} for a prompt of {load.prompt}",
        f"  bound by {prediction.bound}",
    ]
    return lines + [f"  {prediction.note}"] * bool(prediction.note)


def alternatives_table(plan: Plan) -> Table:
    """The plans that lost, best first, with the reason."""
    table = Table(title="not chosen", title_justify="left")
    for column in ("plan", "tokens/s", "token", "first token", "why"):
        table.add_column(column, justify="left" if column in ("plan", "why") else "right")
    for each in plan.alternatives:
        found = each.prediction
        speeds = (
            ("", "", "")
            if found is None
            else (format_rate(found.tokens_per_s), format_seconds(found.tpot_s), format_seconds(found.ttft_s))
        )
        table.add_row(Text(each.description), *speeds, Text(each.why))
    return table
