"""A model as numbers for arithmetic: parameters, FLOP and KV of any decoder, without a checkpoint.

    layer       norms + attention + MLP (or router and experts)
    P           embedding (+ positions) + layers + final norm + head; a tied head counts once
    P_step      what one decode step reads: layers + final norm + head, never the embedding, of which it reads a row;
                of experts those that its tokens chose
    FLOP        2 for every weight of a matrix and token: a multiplication and an addition

Counts of parameters, not bytes: `WeightFormat` says what they take.

Sources: kipply, Transformer Inference Arithmetic (2022), for the plain decoder; the models' published configurations
and code for grouped queries, gated MLPs, experts and latent KV.

This file does not know models by name, machines, links, or what anything takes in seconds.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from tllm.core.errors import ConfigError
from tllm.models.spec import LearnedPositions, MlpKind, ModelSpec, NormKind
from tllm.planner.cost import FLOP_PER_WEIGHT, num_pairs
from tllm.planner.formats import WeightFormat
from tllm.planner.profile import ModelProfile


@dataclass(frozen=True, slots=True, kw_only=True)
class Experts:
    """MLPs of which a router chooses some for every token. Each is as wide as `Shape.intermediate_size`."""

    num_experts: int
    per_token: int
    num_shared: int = 0  # that every token goes through
    num_dense_layers: int = 0  # the first layers have one MLP instead,
    dense_size: int = 0  # of this width

    def touched(self, num_tokens: float) -> float:
        """Distinct routed experts that a step of so many tokens reads, where routing is uniform and independent."""
        missed: float = (1 - self.per_token / self.num_experts) ** num_tokens
        return self.num_experts * (1 - missed)


@dataclass(frozen=True, slots=True, kw_only=True)
class Latent:
    """Multi-head latent attention: of a position one latent vector and one rotated key are kept for all heads.

    A query head has `head_dim` plain and `rope_size` rotated elements, a value head `head_dim`.
    """

    latent_size: int
    rope_size: int
    query_rank: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """A decoder with pre-norm layers. `norm` None: norms are not counted, as in the article's own figures."""

    name: str
    num_layers: int
    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int  # as given, never hidden_size / num_heads
    intermediate_size: int
    vocab_size: int
    gated: bool = True
    tied: bool = False
    qk_norm: bool = False
    norm: NormKind | None = NormKind.RMS
    qkv_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    head_bias: bool = False
    num_positions: int = 0  # learned ones
    experts: Experts | None = None
    latent: Latent | None = None
    windows: tuple[int | None, ...] = ()  # per layer, as in ModelSpec

    def __post_init__(self) -> None:
        for name in (
            "num_layers",
            "hidden_size",
            "num_heads",
            "num_kv_heads",
            "head_dim",
            "intermediate_size",
            "vocab_size",
        ):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} of a shape is {getattr(self, name)}; it must be at least 1.")
        if self.num_heads % self.num_kv_heads:
            raise ConfigError(f"{self.num_heads} attention heads cannot share {self.num_kv_heads} key-value heads.")
        if self.experts and not 1 <= self.experts.per_token <= self.experts.num_experts:
            raise ConfigError(
                f"A token goes through 1 to all of {self.experts.num_experts} experts; {self.experts.per_token} given."
            )

    @classmethod
    def of(cls, spec: ModelSpec, name: str) -> Shape:
        positions = spec.positions.num_positions if isinstance(spec.positions, LearnedPositions) else 0
        return cls(
            name=name,
            num_layers=spec.num_layers,
            hidden_size=spec.hidden_size,
            num_heads=spec.num_heads,
            num_kv_heads=spec.num_kv_heads,
            head_dim=spec.head_dim,
            intermediate_size=spec.intermediate_size,
            vocab_size=spec.vocab_size,
            gated=spec.mlp is MlpKind.GATED,
            tied=spec.tied,
            qk_norm=spec.qk_norm,
            norm=spec.norm,
            qkv_bias=spec.qkv_bias,
            output_bias=spec.output_bias,
            mlp_bias=spec.mlp_bias,
            head_bias=spec.head_bias,
            num_positions=positions,
            windows=spec.windows,
        )

    # Parameters

    @property
    def query_size(self) -> int:
        return self.num_heads * self.head_dim

    @property
    def kv_size(self) -> int:
        """Elements of one position's keys in one layer; values take as many."""
        return self.num_kv_heads * self.head_dim

    @property
    def attention_params(self) -> int:
        """Matrices of one layer's attention, without norms and biases."""
        if self.latent is None:
            return 2 * self.hidden_size * self.query_size + 2 * self.hidden_size * self.kv_size  # q, o; k, v
        latent, width = self.latent, self.hidden_size
        queries = latent.query_rank * (width + self.num_heads * (self.head_dim + latent.rope_size))
        keys_values = width * (latent.latent_size + latent.rope_size) + latent.latent_size * 2 * self.query_size
        return queries + keys_values + self.query_size * width

    def mlp_params(self, width: int) -> int:
        """Matrices of one MLP of that width."""
        return (3 if self.gated else 2) * self.hidden_size * width

    def matrix_params(self, layer: int = 0) -> int:
        """Of all matrices of a layer, all experts included: what formats with few bits apply to."""
        return self.attention_params + round(self._mlps(layer, self.experts.num_experts if self.experts else 0))

    def router_params(self, layer: int = 0) -> int:
        return self.hidden_size * self.experts.num_experts if self._is_routed(layer) and self.experts else 0

    def layer_params(self, layer: int = 0) -> int:
        """Everything a layer has, norms and biases included."""
        return self.matrix_params(layer) + self.router_params(layer) + self._small_params

    @property
    def embed_params(self) -> int:
        """The embedding's table, and that of learned positions."""
        return (self.vocab_size + self.num_positions) * self.hidden_size

    @property
    def head_params(self) -> int:
        """The output projection, tied or not."""
        return self.vocab_size * self.hidden_size

    @property
    def num_params(self) -> int:
        """All of them; a tied projection counts once."""
        layers = sum(self.layer_params(layer) for layer in range(self.num_layers))
        head = 0 if self.tied else self.head_params
        return self.embed_params + layers + self.norm_params + head + self.head_bias * self.vocab_size

    def step_params(self, num_tokens: float = 1) -> int:
        """What one step of so many tokens reads, the output projection included. Without experts it is always the
        same; with them it is the expected number, rounded."""
        layers = sum(self.layer_step_params(layer, num_tokens) for layer in range(self.num_layers))
        return layers + self.norm_params + self.head_params + self.head_bias * self.vocab_size

    def layer_step_params(self, layer: int, num_tokens: float = 1) -> int:
        """What one step of so many tokens reads of a layer."""
        touched = self.experts.touched(num_tokens) if self.experts else 0
        matrices = self.attention_params + round(self._mlps(layer, touched))
        return matrices + self.router_params(layer) + self._small_params

    def active_params(self, *, embedding: bool = False) -> int:
        """What one token goes through; with `embedding` its whole table, as publishers count. A tied one is then
        counted once."""
        return self.step_params(1) + (self.embed_params if embedding and not self.tied else 0)

    @property
    def norm_params(self) -> int:
        """Of one norm of the model's width."""
        match self.norm:
            case None:
                return 0
            case NormKind.RMS:
                return self.hidden_size
            case NormKind.LAYER:
                return 2 * self.hidden_size

    # FLOP

    def matrix_flop(self, layer: int = 0) -> int:
        """Of all matrices of one layer for one token."""
        num_routed = self.experts.per_token if self.experts else 0
        num_params = self.attention_params + round(self._mlps(layer, num_routed)) + self.router_params(layer)
        return FLOP_PER_WEIGHT * num_params

    @property
    def head_flop(self) -> int:
        """Of the output projection, for one row that is sampled."""
        return FLOP_PER_WEIGHT * self.head_params

    @property
    def forward_flop(self) -> int:
        """Of all layers' matrices for one token: neither attention over the context nor the projection."""
        return sum(self.matrix_flop(layer) for layer in range(self.num_layers))

    @property
    def kv_flop(self) -> int:
        """Of the two matrices that make one token's keys and values, in all layers."""
        return FLOP_PER_WEIGHT * 2 * self.num_layers * self.hidden_size * self.kv_size

    @property
    def pair_flop(self) -> int:
        """One layer's attention of one token to one position: its product with the key, and its share of the value."""
        rope_size = self.latent.rope_size if self.latent else 0
        return FLOP_PER_WEIGHT * self.num_heads * (2 * self.head_dim + rope_size)

    def attention_flop(self, num_tokens: int, *, cached: int = 0) -> int:
        """Of all layers' attention for so many tokens of one sequence that come after `cached` others: each looks at
        all positions up to its own, or as many as its layer's window has."""
        windows = map(self.window, range(self.num_layers))
        return sum(self.pair_flop * num_pairs(num_tokens, cached, window) for window in windows)

    def prefill_flop(self, num_tokens: int, *, cached: int = 0, num_sampled: int = 1) -> int:
        """Of a prompt's tokens, with the projection of as many rows as are sampled."""
        attention = self.attention_flop(num_tokens, cached=cached)
        return num_tokens * self.forward_flop + attention + num_sampled * self.head_flop

    def attention_share(self, context: int) -> float:
        """FLOP of one token's attention to so many positions, for each FLOP of the layers' matrices."""
        return self.attention_flop(1, cached=context - 1) / self.forward_flop

    @property
    def context_of_equal_flop(self) -> float:
        """Positions at which attention takes as much arithmetic as the layers' matrices, where no layer has a window.
        With plain heads and an MLP four times as wide it is 6 x hidden_size."""
        return self.forward_flop / (self.num_layers * self.pair_flop)

    # KV

    def window(self, layer: int) -> int | None:
        """Positions that a query of the layer sees, its own included; None: all."""
        return self.windows[layer] if self.windows else None

    @property
    def layer_kv_elements(self) -> int:
        """That one layer keeps of one position."""
        if self.latent is not None:
            return self.latent.latent_size + self.latent.rope_size
        return 2 * self.kv_size

    def kv_parts(self, num_ranks: int) -> int:
        """Into how many parts a group divides KV: by heads, and ranks beyond them hold copies; a latent vector belongs
        to all heads."""
        return 1 if self.latent else min(num_ranks, self.num_kv_heads)

    def kv_bytes_per_token(self, bytes_per_element: float = 2) -> int:
        """Of one position in all layers."""
        return math.ceil(self.num_layers * self.layer_kv_elements * bytes_per_element)

    def kv_bytes(self, context: int, bytes_per_element: float = 2) -> int:
        """What one token of a sequence looks at; layers with a window have no more than it."""
        windows = map(self.window, range(self.num_layers))
        positions = sum(context if window is None else min(context, window) for window in windows)
        return math.ceil(positions * self.layer_kv_elements * bytes_per_element)

    # Weights

    def layer_bytes(self, held: WeightFormat, layer: int = 0) -> int:
        """In memory."""
        return held.num_bytes(matrices=self.matrix_params(layer), plain=self._plain_params(layer))

    def layer_step_bytes(self, held: WeightFormat, layer: int = 0, num_tokens: float = 1) -> int:
        """That a step of so many tokens reads of a layer."""
        plain = self._plain_params(layer)
        return held.num_bytes(matrices=self.layer_step_params(layer, num_tokens) - plain, plain=plain)

    def embed_bytes(self, held: WeightFormat) -> int:
        return held.num_bytes(ends=self.head_params, plain=self.num_positions * self.hidden_size)

    def head_bytes(self, held: WeightFormat) -> int:
        """Final norm and output projection, tied or not."""
        return held.num_bytes(ends=self.head_params, plain=self.norm_params + self.head_bias * self.vocab_size)

    def weight_bytes(self, held: WeightFormat) -> int:
        """Of the whole model on one machine, where a tied projection is held once."""
        profile = model_profile(self, held)
        tied = held.num_bytes(ends=self.head_params) if self.tied else 0
        return sum(profile.layer_bytes) + profile.embed_bytes + profile.head_bytes - tied

    def step_bytes(self, held: WeightFormat, num_tokens: float = 1) -> int:
        """Weights that a step of so many tokens reads."""
        layers = sum(self.layer_step_bytes(held, layer, num_tokens) for layer in range(self.num_layers))
        return layers + self.head_bytes(held)

    def activation_bytes(self, num_tokens: int, num_sampled: int) -> int:
        """That a stage needs to compute a step: the widest tensors of a layer at 16 bit, and logits in full."""
        rows = num_tokens * (4 * self.hidden_size + 3 * self.intermediate_size) * 2
        return rows + num_sampled * self.vocab_size * 4

    def _plain_params(self, layer: int) -> int:
        return self.router_params(layer) + self._small_params

    @property
    def _small_params(self) -> int:
        """A layer's norms and biases."""
        found = 2 * self.norm_params + (2 * self.head_dim if self.qk_norm else 0)
        if self.latent is not None and self.norm is not None:
            found += self.latent.query_rank + self.latent.latent_size  # each has a norm of its own
        found += self.qkv_bias * (self.query_size + 2 * self.kv_size) + self.output_bias * self.hidden_size
        return found + self.mlp_bias * (self.intermediate_size * (2 if self.gated else 1) + self.hidden_size)

    def _is_routed(self, layer: int) -> bool:
        return self.experts is not None and layer >= self.experts.num_dense_layers

    def _mlps(self, layer: int, num_routed: float) -> float:
        """Of a layer's MLPs: the one, or the shared experts and so many others."""
        if self.experts is None:
            return self.mlp_params(self.intermediate_size)
        if not self._is_routed(layer):
            return self.mlp_params(self.experts.dense_size)
        return (num_routed + self.experts.num_shared) * self.mlp_params(self.intermediate_size)


def model_profile(
    shape: Shape, held: WeightFormat, *, kv_bytes_per_element: float = 2, activation_bytes: float = 2
) -> ModelProfile:
    """The shape as the planner sees models. `activation_bytes`: of one element on the wire."""
    layer_bytes = tuple(shape.layer_bytes(held, layer) for layer in range(shape.num_layers))
    num_params = sum(shape.layer_params(layer) for layer in range(shape.num_layers))
    return ModelProfile(
        name=shape.name,
        layer_bytes=layer_bytes,
        embed_bytes=shape.embed_bytes(held),
        head_bytes=shape.head_bytes(held),
        tied=shape.tied,
        kv_bytes_per_position=math.ceil(shape.layer_kv_elements * kv_bytes_per_element),
        bytes_per_weight=sum(layer_bytes) / num_params,
        hidden_bytes=math.ceil(shape.hidden_size * activation_bytes),
    )
