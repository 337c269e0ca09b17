"""`tllm plan`: how a model would be cut over machines, how fast that should be, and what bounds it. No cluster needed.

This file does not know how machines are described (nodes_file.py) nor how a plan is found.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tllm.cli import options
from tllm.core.config import DEFAULT_BLOCK_SIZE, DEFAULT_MAX_BATCH_TOKENS, EMBEDDED_MODEL
from tllm.core.errors import ConfigError

if TYPE_CHECKING:
    from rich.console import Console

    from tllm.cli.nodes_file import Cluster
    from tllm.planner.plan import Plan
    from tllm.planner.profile import Load, ModelProfile

_MEMORY_SHARE = 0.8  # of what is free on this machine
_PROBE_S = 0.3


def plan(
    model: options.Model = EMBEDDED_MODEL,
    nodes: Annotated[
        Path | None, typer.Option(help="TOML or JSON file that describes machines; this machine alone by default.")
    ] = None,
    streams: Annotated[int, typer.Option(help="Answers that are written at the same time.")] = 1,
    prompt: Annotated[int, typer.Option(help="Tokens of a typical prompt.")] = 512,
    answer: Annotated[int, typer.Option(help="Tokens of a typical answer.")] = 128,
    all_nodes: Annotated[bool, typer.Option("--all-nodes", help="Use every node, even one that slows it.")] = False,
    dtype: options.ModelDType = None,
    quantize: options.Quantize = None,
    max_model_len: options.MaxModelLen = None,
    max_batch_tokens: options.MaxBatchTokens = DEFAULT_MAX_BATCH_TOKENS,
    as_json: Annotated[bool, typer.Option("--json", help="For programs.")] = False,
) -> None:
    """Show how a model would be cut over machines, and how fast that should be."""
    from tllm.cli.nodes_file import read_nodes
    from tllm.cluster.placement import model_profile
    from tllm.models.checkpoint import Checkpoint
    from tllm.models.repository import resolve_model
    from tllm.planner.profile import Load
    from tllm.planner.search import place

    if max_model_len is not None and max_model_len < 1:
        raise ConfigError(f"--max-model-len is {max_model_len}; it must be at least 1.")
    load = Load(streams=streams, prompt=prompt, answer=answer, max_batch_tokens=max_batch_tokens)
    checkpoint = Checkpoint.open(resolve_model(model))
    profile = model_profile(checkpoint, dtype or checkpoint.dtype, options.quantization(quantize), model)
    cluster = this_machine(profile) if nodes is None else read_nodes(nodes, profile)
    found = place(
        profile,
        cluster.nodes,
        min_kv_positions=max_model_len or DEFAULT_BLOCK_SIZE,
        links=cluster.links,
        load=load,
        head_machine=cluster.head_machine,
        use_all=all_nodes,
    )
    if as_json:
        print(json.dumps(as_record(profile, found, load, cluster.notes), indent=2))
        return
    from rich.console import Console

    _show(Console(), profile, found, load, cluster.notes)


def _show(console: Console, model: ModelProfile, plan: Plan, load: Load, notes: Sequence[str]) -> None:
    from rich.text import Text

    from tllm.cli.view import alternatives_table, plan_table, prediction_lines

    console.print(plan_table(model, plan))
    for line in plan.dropped:
        console.print(Text(f"  not used: {line}"))
    if plan.prediction is None:
        console.print(Text("No prediction: a node has neither a speed nor a bandwidth."))
    else:
        for line in prediction_lines(plan.prediction, load):
            console.print(Text(line), soft_wrap=True)
    for note in notes:
        console.print(Text(f"  {note}"), soft_wrap=True)
    if plan.alternatives:
        console.print(alternatives_table(plan))


def as_record(model: ModelProfile, plan: Plan, load: Load, notes: Sequence[str]) -> dict[str, object]:
    """A plan for programs: plain JSON, times in seconds, sizes in bytes."""
    return {
        "model": model.name,
        "num_layers": model.num_layers,
        "load": asdict(load),
        "stages": [
            {
                "node": stage.node.name,
                "first_layer": stage.shard.first_layer,
                "last_layer": stage.shard.last_layer,
                "embed": stage.shard.embed,
                "head": stage.shard.head,
                "num_threads": stage.num_threads,
                "held_bytes": stage.held_bytes,
                "read_bytes": stage.read_bytes,
            }
            for stage in plan.stages
        ],
        "prediction": plan.prediction and asdict(plan.prediction),
        "dropped": list(plan.dropped),
        "alternatives": [asdict(each) for each in plan.alternatives],
        "notes": list(notes),
    }


def this_machine(model: ModelProfile) -> Cluster:
    """This machine alone, by the speed at which it copies memory and multiplies matrices: rough, and said so."""
    import socket

    from tllm.cli.nodes_file import Cluster
    from tllm.cluster.machine import free_bytes, machine_id, num_processors
    from tllm.planner.cost import estimated_speed
    from tllm.planner.profile import NodeProfile

    num_threads = num_processors()
    bytes_per_s, flop_per_s = copied_bytes_per_s(num_threads), multiplied_flop_per_s()
    node = NodeProfile(
        id="local",
        name=socket.gethostname(),
        machine=machine_id(),
        host="",
        memory_bytes=int(free_bytes() * _MEMORY_SHARE),
        num_threads=num_threads,
        speed=estimated_speed(model, bytes_per_s=bytes_per_s, flop_per_s=flop_per_s),
    )
    note = (
        f"rough: this machine copies memory at {bytes_per_s / 1e9:.3g} GB/s and multiplies at "
        f"{flop_per_s / 1e9:.3g} GFLOP/s; `tllm serve` measures the model's own layers"
    )
    return Cluster(nodes=(node,), head_machine=node.machine, notes=(note,))


def copied_bytes_per_s(num_threads: int) -> float:
    """Bytes that all threads together move a second, read and written, far beyond what caches hold."""
    import time
    from concurrent.futures import ThreadPoolExecutor

    import numpy as np

    num_bytes = 64_000_000
    pairs = [(np.ones(num_bytes, np.uint8), np.ones(num_bytes, np.uint8)) for _ in range(num_threads)]
    end_s = time.monotonic() + _PROBE_S

    def copy(pair: tuple[np.ndarray, np.ndarray]) -> float:
        began_s, num = time.monotonic(), 0
        while num == 0 or time.monotonic() < end_s:
            np.copyto(pair[1], pair[0])
            num += 1
        return 2 * num_bytes * num / (time.monotonic() - began_s)

    with ThreadPoolExecutor(num_threads) as pool:
        return sum(pool.map(copy, pairs))


def multiplied_flop_per_s() -> float:
    """Of float32 matrices, by numpy with as many threads as it takes."""
    import time

    import numpy as np

    size, num = 512, 0
    left = np.ones((size, size), np.float32)
    left @ left  # threads start
    began_s = time.monotonic()
    while num == 0 or time.monotonic() < began_s + _PROBE_S / 3:
        left @ left
        num += 1
    return 2 * size**3 * num / (time.monotonic() - began_s)
