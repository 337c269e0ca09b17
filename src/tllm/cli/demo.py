"""`tllm demo`: the main job, small. A head and two workers, the embedded model cut in two, one question answered over
HTTP."""

from __future__ import annotations

from typing import Annotated

import typer

from tllm.cli import options
from tllm.core.config import ModelConfig, ServeConfig


def demo(
    question: Annotated[str, typer.Argument(help="What to ask the embedded model.")] = "What is tllm?",
    workers: options.Workers = 2,
    log_level: options.Log = options.LogLevel.WARNING,
) -> None:
    """Cut the embedded model over two workers, ask it one question through the API, show who computed what."""
    options.set_up_logging(log_level)
    from rich.console import Console
    from rich.text import Text

    from tllm.cli.client import Turn, ask, connected
    from tllm.cli.serving import background_service
    from tllm.cli.view import StartView
    from tllm.core.units import format_seconds

    console = Console(highlight=False)
    config = ServeConfig(port=0, grpc_port=0, model=ModelConfig(), local_node=options.node_config(workers=workers))
    with StartView(console) as view, background_service(config, view) as service:
        model = service.deployment.names[0]
        console.print(Text.assemble(f"\nPOST {service.url}/v1/chat/completions\n", (question, "bold")))
        with (
            connected(service.url, silence_s=120) as client,
            ask(client, model=model, turns=[Turn(role="user", content=question)], options={"temperature": 0}) as answer,
        ):
            for piece in answer.text():
                console.print(Text(piece), end="", soft_wrap=True)
        plan = service.deployment.plan
        assert plan is not None, "a deployment that answered has a plan"
        where = "  →  ".join(
            f"layers {stage.shard.first_layer}..{stage.shard.last_layer - 1} on {stage.node.name} (worker {number})"
            for number, stage in enumerate(plan.stages, start=1)
        )
        figures = (
            f"{answer.num_tokens} tokens   TTFT {format_seconds(answer.ttft_s)}   "
            f"{answer.tokens_per_s:.0f} tokens/s after the first"
        )
        console.print(Text(f"\n\n{figures}\n{where}"))
