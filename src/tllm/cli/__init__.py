"""The `tllm` command: one file per verb. The only place that prints, parses flags and sets up logging.

Nothing heavy is imported until a verb needs it, so that `tllm --help` answers at once.
"""

from __future__ import annotations

import sys

import typer

from tllm.cli import bench, cache, demo, doctor, drain, join, nodes, plan, run, serve, token, version
from tllm.core.errors import TllmError

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
app.command("drain")(drain.drain)
app.command("doctor")(doctor.doctor)
app.command("version")(version.version)
app.add_typer(token.app, name="token")
app.add_typer(cache.app, name="cache")
app.add_typer(bench.app, name="bench")


def main() -> None:
    """Entry point. An error of ours is one screen on stderr and exit status 1; a bug keeps its traceback."""
    try:
        app()
    except TllmError as error:
        print(f"tllm: {error}", file=sys.stderr)
        if error.__cause__ is not None and not isinstance(error.__cause__, TllmError):
            print(f"      ({type(error.__cause__).__name__}: {error.__cause__})", file=sys.stderr)
        sys.exit(1)
