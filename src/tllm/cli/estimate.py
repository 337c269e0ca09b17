"""`tllm estimate`: what a model needs and how fast it can be on given machines, by arithmetic alone.

    tllm estimate llama-3.1-8b --hardware m4              `model` is meant where no command is named
    tllm estimate network --pp 8 --hidden 8192 ...        what links must be able to do

This file does not know any formula.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Final

import typer
from typer.core import TyperGroup

from tllm.cli import options
from tllm.cli.estimate_network import network
from tllm.cli.estimate_options import AsJson, Explain, LinkText, Report, counts, parse_link, tell
from tllm.core.errors import ConfigError
from tllm.core.types import DType

if TYPE_CHECKING:
    from tllm.lab.estimate import Question
    from tllm.models.checkpoint import Checkpoint
    from tllm.planner.formats import WeightFormat
    from tllm.planner.hardware import Hardware
    from tllm.planner.shape import Shape

_THIS = "this"
_MEMORY_SHARE = 0.8  # of what is free on this machine
_FORMAT_OF_DTYPE: Final = {DType.FLOAT32: "fp32", DType.BFLOAT16: "bf16", DType.FLOAT16: "fp16"}
_ELEMENT_BYTES: Final = {"fp32": 4.0, "bf16": 2.0, "fp16": 2.0, "fp8": 1.0}


class _ModelByDefault(TyperGroup):
    """`tllm estimate X` is `tllm estimate model X` unless X is a command; then a model is given by its path, `./X`."""

    def parse_args(self, ctx: typer.Context, args: list[str]) -> list[str]:  # type: ignore[override]
        if args and args[0] not in self.commands and args[0] not in ("--help", "-h"):
            args = ["model", *args]
        return super().parse_args(ctx, args)


app = typer.Typer(
    help="What a model needs and how fast it can be, by arithmetic alone: `tllm estimate llama-3.1-8b --hardware m4`. "
    "The word `model` may be left out; `tllm estimate model --help` has its flags.",
    no_args_is_help=True,
    cls=_ModelByDefault,
)
app.command("network")(network)


@app.command()
def model(
    name: Annotated[
        str | None,
        typer.Argument(
            metavar="[MODEL]",
            help="A directory, a GGUF file, a hub id, a known shape such as llama-3.1-8b, or the embedded model; "
            "none where a shape is given by flags.",
        ),
    ] = None,
    hardware: Annotated[
        str,
        typer.Option(
            help="a100-40gb, a100-80gb, h100, h200, m4, m3-pro; this: as measured now; or figures, alone or after a "
            "name: flops=312T,bandwidth=1.5TB/s,memory=40GB,link=300GB/s."
        ),
    ] = _THIS,
    nodes: Annotated[int | None, typer.Option(help="Machines, each like --hardware; --pp x --tp by default.")] = None,
    pp: Annotated[int | None, typer.Option(help="Stages of layers; --nodes / --tp by default.")] = None,
    tp: Annotated[int, typer.Option(help="Machines that share each stage's matrices.")] = 1,
    link: LinkText = None,
    dtype: options.ModelDType = None,
    quantize: options.Quantize = None,
    weights: Annotated[
        str | None,
        typer.Option("--format", help="Of weights: fp32, bf16, fp16, fp8, int8, int4, q8_0, q4_0, mlx-4bit, mxfp4."),
    ] = None,
    kv_dtype: Annotated[
        str | None, typer.Option(help="Of KV: fp32, bf16, fp16 or fp8; that of --dtype by default.")
    ] = None,
    batch: Annotated[str, typer.Option(help="Sequences decoded at once; several for a table: 1,4,16.")] = "1",
    context: Annotated[int, typer.Option(help="Tokens of each sequence before a decode step.")] = 2048,
    prompt: Annotated[int, typer.Option(help="Tokens of a prompt.")] = 512,
    answer: Annotated[int, typer.Option(help="Tokens of an answer.")] = 128,
    draft: Annotated[
        str | None, typer.Option(help="Speculation: tokens drafted and the share accepted, such as 3,0.55.")
    ] = None,
    layers: Annotated[int | None, typer.Option(help="A shape by flags, instead of MODEL.")] = None,
    hidden: Annotated[int | None, typer.Option(help="Width of the hidden states.")] = None,
    heads: Annotated[int | None, typer.Option(help="Query heads.")] = None,
    kv_heads: Annotated[int | None, typer.Option(help="KV heads; as many as --heads by default.")] = None,
    head_dim: Annotated[int | None, typer.Option(help="Elements of a head; not always --hidden / --heads.")] = None,
    intermediate: Annotated[int | None, typer.Option(help="Width of the MLP, or of one expert.")] = None,
    vocab: Annotated[int | None, typer.Option(help="Tokens in the vocabulary.")] = None,
    tied: Annotated[bool, typer.Option("--tied", help="The output projection is the embedding.")] = False,
    plain_mlp: Annotated[bool, typer.Option("--plain-mlp", help="Two matrices in an MLP instead of three.")] = False,
    qk_norm: Annotated[bool, typer.Option("--qk-norm", help="Queries and keys have norms.")] = False,
    experts: Annotated[int | None, typer.Option(help="MLPs of which a token takes some.")] = None,
    experts_per_token: Annotated[int | None, typer.Option(help="How many of them.")] = None,
    shared_experts: Annotated[int, typer.Option(help="Experts that every token takes as well.")] = 0,
    window: Annotated[int | None, typer.Option(help="Positions that a token sees, itself included.")] = None,
    explain: Explain = False,
    as_json: AsJson = False,
    report: Report = None,
) -> None:
    """Parameters, memory, KV, decode and prefill of a model on given machines, and what bounds them."""
    from tllm.lab.estimate import Question
    from tllm.lab.estimate_sheet import estimate

    given = {
        "--layers": layers,
        "--hidden": hidden,
        "--heads": heads,
        "--head-dim": head_dim,
        "--intermediate": intermediate,
        "--vocab": vocab,
    }
    others = {
        "--kv-heads": kv_heads is not None,
        "--tied": tied,
        "--plain-mlp": plain_mlp,
        "--qk-norm": qk_norm,
        "--experts": experts is not None,
        "--experts-per-token": experts_per_token is not None,
        "--shared-experts": shared_experts > 0,
        "--window": window is not None,
    }
    if name is not None:
        if flags := [flag for flag, value in given.items() if value is not None] + [
            f for f, on in others.items() if on
        ]:
            raise ConfigError(f"{', '.join(flags)} and the model {name} contradict each other; give one or the other.")
        shape, held = _named(name, dtype, quantize, weights)
    else:
        shape = _by_flags(
            given,
            kv_heads=kv_heads,
            tied=tied,
            gated=not plain_mlp,
            qk_norm=qk_norm,
            experts=experts,
            experts_per_token=experts_per_token,
            shared_experts=shared_experts,
            window=window,
        )
        held = _format(dtype, quantize, weights) or _known_format("bf16")
    machine, notes = _hardware(hardware)
    num_stages, num_ranks = _division(nodes, pp, tp)
    element = _FORMAT_OF_DTYPE[dtype] if dtype else held.name if held.name in _FORMAT_OF_DTYPE.values() else "bf16"
    question = Question(
        shape=shape,
        held=held,
        kv_element_bytes=_element_bytes("--kv-dtype", kv_dtype or element),
        activation_bytes=_ELEMENT_BYTES[element],
        hardware=machine,
        num_stages=num_stages,
        num_ranks=num_ranks,
        link=parse_link(link) if link is not None else None,
        batches=counts("--batch", batch),
        context=context,
        prompt=prompt,
        answer=answer,
        drafted=_draft(draft),
        notes=notes,
    )
    tell(estimate(question), explain=explain, as_json=as_json, report=report, pictures=_pictures(question))


def _named(name: str, dtype: DType | None, quantize: str | None, weights: str | None) -> tuple[Shape, WeightFormat]:
    """A model's shape, and how its weights are held: as asked, else as they are stored; of a known shape, bf16."""
    from tllm.core.config import EMBEDDED_MODEL
    from tllm.models.checkpoint import Checkpoint
    from tllm.models.hub import is_hub_name
    from tllm.models.repository import resolve_headers
    from tllm.planner.presets import SHAPES
    from tllm.planner.shape import Shape

    asked = _format(dtype, quantize, weights)
    path = Path(name).expanduser()
    if name in SHAPES and not path.exists():
        return SHAPES[name], asked or _known_format("bf16")
    if name != EMBEDDED_MODEL and not path.exists() and not is_hub_name(name):
        raise ConfigError(
            f"There is no model {name!r}: it is neither an existing directory, nor a name on the hub such as "
            f"Qwen/Qwen3-0.6B, nor a known shape ({', '.join(SHAPES)}). Or give a shape by flags: --layers and others."
        )
    if _is_config_alone(path):
        return _of_config(path, name), asked or _known_format("bf16")
    checkpoint = Checkpoint.open(resolve_headers(name))
    shape = Shape.of(checkpoint.spec, name)
    if asked is None:
        asked = _as_stored(checkpoint, shape)
    elif checkpoint.method is not None:
        raise ConfigError(
            f"{name} is quantized already ({checkpoint.method}); leave out --dtype, --quantize, --format."
        )
    return shape, asked


def _is_config_alone(path: Path) -> bool:
    kinds = ("*.safetensors", "*.gguf", "tllm.manifest.json")
    return (path / "config.json").is_file() and not any(True for kind in kinds for _ in path.glob(kind))


def _of_config(path: Path, name: str) -> Shape:
    from tllm.models.config import Config
    from tllm.models.families import find_family, read_spec
    from tllm.planner.shape import Shape

    config = Config.read(path / "config.json")
    return Shape.of(read_spec(config, find_family(config)), name)


def _as_stored(checkpoint: Checkpoint, shape: Shape) -> WeightFormat:
    """Bits of a weight as the checkpoint's files have them, on average over all layers."""
    from tllm.models.spec import Shard
    from tllm.planner.formats import FORMATS, WeightFormat

    plain = FORMATS[_FORMAT_OF_DTYPE[checkpoint.dtype]]
    if checkpoint.method is None:
        return plain

    def num_bytes(shard: Shard) -> int:
        return checkpoint.weight_bytes(shard, checkpoint.dtype)

    layers = num_bytes(Shard(first_layer=0, last_layer=shape.num_layers, embed=False, head=False))
    num_matrix = sum(shape.matrix_params(layer) for layer in range(shape.num_layers))
    num_plain = sum(shape.layer_params(layer) for layer in range(shape.num_layers)) - num_matrix
    ends = num_bytes(Shard(first_layer=0, last_layer=0, embed=True, head=False))
    return WeightFormat(
        name=f"as stored ({checkpoint.method})",
        matrix_bits=8 * (layers - num_plain * checkpoint.dtype.num_bytes) / num_matrix,
        end_bits=8 * ends / shape.embed_params,
        plain_bits=plain.plain_bits,
    )


def _by_flags(
    given: dict[str, int | None],
    *,
    kv_heads: int | None,
    tied: bool,
    gated: bool,
    qk_norm: bool,
    experts: int | None,
    experts_per_token: int | None,
    shared_experts: int,
    window: int | None,
) -> Shape:
    """Raises ConfigError naming every flag that is missing."""
    from tllm.planner.presets import SHAPES
    from tllm.planner.shape import Experts, Shape

    sizes = {flag: value for flag, value in given.items() if value is not None}
    if not sizes:
        raise ConfigError(
            "Which model? Give a directory, a hub id, embedded, a known shape "
            f"({', '.join(SHAPES)}), or a shape by flags: {', '.join(given)}."
        )
    if missing := [flag for flag in given if flag not in sizes]:
        raise ConfigError(f"A shape by flags needs {', '.join(missing)} as well; nothing is guessed.")
    if (experts is None) != (experts_per_token is None) or (shared_experts and experts is None):
        raise ConfigError("Experts need both --experts and --experts-per-token.")
    return Shape(
        name="given shape",
        num_layers=sizes["--layers"],
        hidden_size=sizes["--hidden"],
        num_heads=sizes["--heads"],
        num_kv_heads=sizes["--heads"] if kv_heads is None else kv_heads,
        head_dim=sizes["--head-dim"],
        intermediate_size=sizes["--intermediate"],
        vocab_size=sizes["--vocab"],
        gated=gated,
        tied=tied,
        qk_norm=qk_norm,
        experts=None
        if experts is None or experts_per_token is None
        else Experts(num_experts=experts, per_token=experts_per_token, num_shared=shared_experts),
        windows=() if window is None else (window,) * sizes["--layers"],
    )


def _format(dtype: DType | None, quantize: str | None, weights: str | None) -> WeightFormat | None:
    """What the flags ask for; None: nothing. Raises ConfigError."""
    from tllm.planner.formats import WeightFormat, parse_format

    if quantize is not None and weights is not None:
        raise ConfigError(f"--quantize {quantize} and --format {weights} both say how weights are held; give one.")
    if quantize is not None:
        quantization = options.quantization(quantize)
        assert quantization is not None
        return WeightFormat.of(quantization)
    if weights is not None:
        return parse_format(weights)
    return None if dtype is None else _known_format(_FORMAT_OF_DTYPE[dtype])


def _known_format(name: str) -> WeightFormat:
    from tllm.planner.formats import FORMATS

    return FORMATS[name]


def _hardware(text: str) -> tuple[Hardware, tuple[str, ...]]:
    """The machine, and what is to be said of it."""
    from tllm.planner.hardware import Hardware, parse_hardware

    if text != _THIS:
        return parse_hardware(text), ()
    from tllm.cli.plan import copied_bytes_per_s, multiplied_flop_per_s
    from tllm.cluster.machine import free_bytes, num_processors

    machine = Hardware(
        name="this machine",
        bytes_per_s=copied_bytes_per_s(num_processors()),
        flop_per_s=multiplied_flop_per_s(),
        memory_bytes=int(free_bytes() * _MEMORY_SHARE),
    )
    note = (
        f"this machine: copies memory at {machine.bytes_per_s / 1e9:.3g} GB/s and multiplies float32 matrices at "
        f"{machine.reached_flop_per_s / 1e9:.3g} GFLOP/s, measured now and roughly; memory is 80 % of what is free"
    )
    return machine, (note,)


def _division(nodes: int | None, pp: int | None, tp: int) -> tuple[int, int]:
    """Stages, and ranks of each. Raises ConfigError."""
    for flag, value in (("--nodes", nodes), ("--pp", pp), ("--tp", tp)):
        if value is not None and value < 1:
            raise ConfigError(f"{flag} is {value}; it must be at least 1.")
    if nodes is None:
        return pp or 1, tp
    if nodes % tp or (pp is not None and pp * tp != nodes):
        stages = f"--pp {pp} x " if pp is not None else ""
        raise ConfigError(
            f"{nodes} nodes cannot be {stages}--tp {tp}: --nodes is --pp times --tp. Leave one of them out."
        )
    return nodes // tp, tp


def _draft(text: str | None) -> tuple[int, float] | None:
    """Tokens drafted and the share of them that is accepted. Raises ConfigError."""
    if text is None:
        return None
    count, _, share = text.partition(",")
    try:
        drafted = int(count), float(share)
    except ValueError:
        drafted = 0, 0.0
    if drafted[0] < 1 or not 0 <= drafted[1] < 1:
        raise ConfigError(f"--draft is {text!r}; give tokens drafted and the share accepted, such as 3,0.55.")
    return drafted


def _element_bytes(flag: str, name: str) -> float:
    if name not in _ELEMENT_BYTES:
        raise ConfigError(f"{flag} is {name!r}; possible are {', '.join(_ELEMENT_BYTES)}.")
    return _ELEMENT_BYTES[name]


def _pictures(question: Question) -> Callable[[Path], tuple[str, ...]]:
    def draw(directory: Path) -> tuple[str, ...]:
        from tllm.lab.estimate_report import draw_model

        return draw_model(question, directory)

    return draw
