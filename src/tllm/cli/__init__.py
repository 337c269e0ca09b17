"""The `tllm` command: one file per verb. The only place that prints, parses flags and sets up logging.

Nothing heavy is imported until a verb needs it, so that `tllm --help` answers at once.
"""

from __future__ import annotations

import typer

from tllm.cli import (
    bench,
    cache,
    demo,
    doctor,
    drain,
    estimate,
    join,
    lab,
    nodes,
    plan,
    quantize,
    run,
    serve,
    token,
    trace,
    version,
)
from tllm.cli.reporting import reported

app = typer.Typer(
    name="tllm",
    help="Together-LLM: one large language model across the machines you have, as one OpenAI-compatible server.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
app.command("serve")(serve.serve)
app.command("join")(join.join)
app.command("run")(run.run)
app.command("demo")(demo.demo)
app.command("nodes")(nodes.nodes)
app.command("plan")(plan.plan)
app.add_typer(estimate.app, name="estimate")
app.command("quantize")(quantize.quantize)
app.command("drain")(drain.drain)
app.command("trace")(trace.trace)
app.command("doctor")(doctor.doctor)
app.command("version")(version.version)
app.add_typer(token.app, name="token")
app.add_typer(cache.app, name="cache")
app.add_typer(bench.app, name="bench")
app.add_typer(lab.app, name="lab")


def main() -> None:
    """Entry point."""
    with reported():
        app()
