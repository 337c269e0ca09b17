"""How the processors of one machine are shared out among the stages of a pipeline on it.

This file does not know what the stages compute.
"""

from __future__ import annotations

from tllm.cluster.machine import processors
from tllm.core.errors import ConfigError
from tllm.lab.rig import Stage


def stages_of(num_threads: int, num_stages: int) -> tuple[Stage, ...]:
    """`num_threads` in equal parts. Several stages are pinned to processors of their own; one alone to nothing.

    Raises ConfigError where a stage would have none.
    """
    if num_stages == 1:
        return (Stage(num_threads=num_threads),)
    if num_threads < num_stages:
        raise ConfigError(
            f"{num_stages} stages cannot share {num_threads} threads; give at least one each, or fewer stages."
        )
    return pinned_stages(num_threads // num_stages, num_stages)


def pinned_stages(num_cores: int, num_stages: int) -> tuple[Stage, ...]:
    """So many processors each, neighbours together. Raises ConfigError where there are not so many."""
    cpus = processors()
    if num_cores * num_stages > len(cpus):
        raise ConfigError(
            f"{num_stages} stages on {num_cores} processors each need {num_stages * num_cores}; this machine gives "
            f"{len(cpus)}."
        )
    return tuple(
        Stage(num_threads=num_cores, cpus=tuple(cpus[stage * num_cores : (stage + 1) * num_cores]))
        for stage in range(num_stages)
    )
