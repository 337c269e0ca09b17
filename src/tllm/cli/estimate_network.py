"""`tllm estimate network`: which rate and which latency the links of a pipeline need.

This file does not know any formula.
"""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path
from typing import Annotated

import typer

from tllm.cli.estimate_options import AsJson, Explain, LinkText, Report, counts, parse_link, tell
from tllm.core.errors import ConfigError


def network(
    pp: Annotated[int, typer.Option(help="Stages, all alike.")] = 2,
    hidden: Annotated[int | None, typer.Option(help="Width of the hidden states; or give --model.")] = None,
    model: Annotated[str | None, typer.Option(help="A known shape, whose width is taken.")] = None,
    target_tpot: Annotated[str, typer.Option(help="Between two tokens of a sequence.")] = "50ms",
    target_ttft: Annotated[str, typer.Option(help="To the first token of a prompt.")] = "3s",
    prompt: Annotated[int, typer.Option(help="Tokens of the prompt.")] = 1000,
    batch: Annotated[int, typer.Option(help="Sequences in a step.")] = 1,
    compute_share: Annotated[
        str, typer.Option(help="Of --target-tpot, that stages compute, such as 0.8 or 4/5; the network has the rest.")
    ] = "0.8",
    ttft_compute_share: Annotated[
        str | None, typer.Option(help="The same of --target-ttft; that of --compute-share by default.")
    ] = None,
    latency: Annotated[str, typer.Option(help="Latencies of a hop to compare, one way.")] = "0s,0.2ms,0.5ms,1ms",
    chunks: Annotated[str, typer.Option(help="Numbers of chunks of the prompt to compare.")] = "1,4,16,32",
    hops: Annotated[int | None, typer.Option(help="As somebody else counts them, beside the ways there are.")] = None,
    bits: Annotated[float, typer.Option(help="Of one element on the wire, where nothing is compressed.")] = 16,
    link: LinkText = None,
    explain: Explain = False,
    as_json: AsJson = False,
    report: Report = None,
) -> None:
    """The rate and latency that links need for a token and a first token in given times, and what changes them."""
    from tllm.core.units import parse_seconds
    from tllm.lab.estimate_network import NetworkQuestion, network_sections
    from tllm.planner.presets import parse_shape

    if (hidden is None) == (model is None):
        raise ConfigError("How wide are hidden states? Give either --hidden, such as 8192, or --model.")
    shares = [_share("--compute-share", compute_share)]
    shares.append(shares[0] if ttft_compute_share is None else _share("--ttft-compute-share", ttft_compute_share))
    question = NetworkQuestion(
        num_stages=pp,
        hidden_size=parse_shape(model).hidden_size if model is not None else hidden or 0,
        element_bits=bits,
        batch=batch,
        prompt=prompt,
        target_tpot_s=parse_seconds(target_tpot),
        target_ttft_s=parse_seconds(target_ttft),
        tpot_compute_share=shares[0],
        ttft_compute_share=shares[1],
        latencies_s=tuple(sorted({parse_seconds(part) for part in latency.split(",")})),
        chunks=counts("--chunks", chunks),
        num_given_hops=hops,
        link=None if link is None else parse_link(link),
    )

    def draw(directory: Path) -> tuple[str, ...]:
        from tllm.lab.estimate_report import draw_network

        return draw_network(question, directory)

    tell(network_sections(question), explain=explain, as_json=as_json, report=report, pictures=draw)


def _share(flag: str, text: str) -> float:
    try:
        return float(Fraction(text.strip()))
    except (ValueError, ZeroDivisionError):
        raise ConfigError(f"{flag} is {text!r}; give a share such as 0.8 or 4/5.") from None
