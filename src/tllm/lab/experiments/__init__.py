"""The experiments that come with tllm, by name. Each is a file of this package, imported when it is asked for."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import TYPE_CHECKING, Final, cast

from tllm.core.errors import ConfigError

if TYPE_CHECKING:
    from tllm.lab.experiment import Experiment, Parameter

# What each one asks, and where it is.
KINDS: Final[Mapping[str, tuple[str, str]]] = {
    "baseline": ("How long does one answer take, from the files on disk to its last token?", "baseline"),
    "phases": ("What do prefill and decode compute, keep and choose, step by step?", "phases"),
    "batching": ("What do batches and waiting for them gain, and what do they cost?", "batching"),
    "pp-tp": ("How fast are pipelines and tensor parallel groups of few cores?", "pp_tp"),
    "local-vs-cluster": ("What does it cost that a model is served rather than called?", "local_vs_cluster"),
}


def find(kind: str, parameters: Mapping[str, Parameter]) -> Experiment:
    """The experiment with these parameters of its own, the others at their defaults. Nothing is loaded.

    Raises ConfigError for a kind or a parameter that there is not.
    """
    if kind not in KINDS:
        raise ConfigError(f"There is no experiment {kind!r}; there are {', '.join(KINDS)}.")
    from tllm.lab.experiment import Parameters

    module = importlib.import_module(f"{__name__}.{KINDS[kind][1]}")
    taken = Parameters(kind, parameters)
    experiment = cast("Experiment", module.experiment(taken))
    taken.done()
    return experiment
