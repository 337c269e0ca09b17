"""What the planner knows of machines and of a model: numbers, however they came about.

This file does not know how anything is measured or read.
"""

from __future__ import annotations

from dataclasses import dataclass

from tllm.core.errors import ConfigError


@dataclass(frozen=True, slots=True, kw_only=True)
class Speed:
    """Seconds that one worker's engine takes for a model's parts, measured at several numbers of rows in a step.

    `rows` is ascending and starts with 1; `layer_s[i]` is one layer for `rows[i]` rows, `head_s[i]` the final norm,
    the projection and the sampling of `rows[i]` rows, `step_s` what every step costs a stage whatever is in it.
    Attention is apart: `read_s` is what a layer takes to read one position of one sequence's KV, `pair_s` what it takes
    to let one row look at one position where KV is not read for it alone, as in a prompt. Zero where not measured:
    `layer_s` then has it in it, for the short contexts that it was measured with.
    """

    rows: tuple[int, ...]
    layer_s: tuple[float, ...]
    head_s: tuple[float, ...]
    step_s: float
    read_s: float = 0.0
    pair_s: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class LinkProfile:
    """What it takes to get from one node to another, measured through the transport that steps use.

    A message of n bytes takes `rtt_s / 2 + n / bytes_per_s` seconds. `HEAD` stands for the head itself.
    """

    source: str  # node id
    target: str
    rtt_s: float
    bytes_per_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """What a plan is to be best for. One stream: the time of its tokens; several: tokens of all together."""

    streams: int = 1  # sequences decoded at once
    prompt: int = 512  # tokens of a typical prompt
    answer: int = 128  # and of its answer
    max_batch_tokens: int = 512  # of one step; a longer prompt is cut into chunks of so many

    @property
    def context(self) -> float:
        """Positions that a decode step looks at, in the middle of an answer."""
        return self.prompt + self.answer / 2

    def __post_init__(self) -> None:
        for name in ("streams", "prompt", "answer", "max_batch_tokens"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} of a load is {getattr(self, name)}; it must be at least 1.")


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeProfile:
    """One machine as its agent describes it."""

    id: str
    name: str
    machine: str  # nodes with the same value share one machine and speak over Unix sockets
    host: str  # where its workers can be reached; empty: only from its own machine
    memory_bytes: int  # that its workers may take together
    num_threads: int  # of all its workers together
    device: str = "cpu"
    platform: str = ""
    num_workers: int = 1  # stages it is to be cut into
    speed: Speed | None = None  # of each of its workers, for the model to be placed; None: not measured


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelProfile:
    """Bytes of one model in the form it will be served in.

    `layer_bytes[i]` are held and, in a decode step, read by whoever has layer `i`. The embedding is held by the first
    stage, which reads a row of it a token. The head (final norm and output projection) is held and read by the last;
    a tied pair on one stage is held once.
    """

    name: str
    layer_bytes: tuple[int, ...]
    embed_bytes: int
    head_bytes: int
    tied: bool
    kv_bytes_per_position: int  # of one layer
    bytes_per_weight: float = 2.0  # of a layer, on average
    hidden_bytes: int = 0  # of one row of hidden states; 0: not known, and then neither links nor activations count it

    @property
    def num_layers(self) -> int:
        return len(self.layer_bytes)

    def held_bytes(self, first_layer: int, last_layer: int) -> int:
        """Weights in the memory of a stage with layers `[first_layer, last_layer)`."""
        embeds, heads = first_layer == 0, last_layer == self.num_layers
        ends = self.embed_bytes * embeds + self.head_bytes * heads
        if self.tied and embeds and heads:
            ends = max(self.embed_bytes, self.head_bytes)
        return sum(self.layer_bytes[first_layer:last_layer]) + ends

    def read_bytes(self, first_layer: int, last_layer: int) -> int:
        """Weights that one decode step reads on that stage."""
        return sum(self.layer_bytes[first_layer:last_layer]) + self.head_bytes * (last_layer == self.num_layers)
