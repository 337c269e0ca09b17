"""One request alone, and what is told of it wherever its answer comes from.

    TTFT                      from the request to its first token
    with the first token      tokens / (TTFT + from the first token to the last)
    without it                (tokens - 1) / from the first token to the last

This file does not know what answers.
"""

from __future__ import annotations

from dataclasses import dataclass

from tllm.core.errors import EngineError
from tllm.lab.experiment import Column, Parameters
from tllm.lab.experiments.expected import Possible
from tllm.lab.forecast import Forecast
from tllm.lab.rig import Answer, Rig

STREAM_COLUMNS = (
    Column(metric="ttft_s", title="TTFT", unit="ms", better="lower", scale=1e3),
    Column(metric="tpot_s", title="TPOT", unit="ms", better="lower", scale=1e3),
    Column(metric="tokens_per_s", title="With the first token", unit="tokens/s", better="higher"),
    Column(metric="decode_tokens_per_s", title="Without the first token", unit="tokens/s", better="higher"),
    Column(metric="num_tokens", title="Tokens", unit=""),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Stream:
    """One request alone: a prompt of random tokens, and how long its answer is."""

    prompt_tokens: int
    tokens: int

    @property
    def words(self) -> str:
        return f"single request, exactly {self.tokens} new tokens, greedy"

    @property
    def context(self) -> float:
        """Positions before a decode step, in the middle of the answer."""
        return self.prompt_tokens + self.tokens / 2


def take_stream(parameters: Parameters) -> Stream:
    """`prompt_tokens` and `tokens` of an experiment with one stream."""
    return Stream(prompt_tokens=parameters.count("prompt_tokens", 128), tokens=parameters.count("tokens", 20, least=2))


def stream_metrics(*, ttft_s: float, decode_s: float, num_tokens: int) -> dict[str, float]:
    """`decode_s`: from the first token to the last. Raises EngineError where there are not two tokens."""
    if num_tokens < 2:
        raise EngineError(f"An answer has {num_tokens} tokens; no time between tokens can be told.")
    return {
        "ttft_s": ttft_s,
        "tpot_s": decode_s / (num_tokens - 1),
        "tokens_per_s": num_tokens / (ttft_s + decode_s),
        "decode_tokens_per_s": (num_tokens - 1) / decode_s,
        "num_tokens": num_tokens,
    }


def answer_metrics(answer: Answer) -> dict[str, float]:
    """Tokens are those that came."""
    if not answer.token_s:
        raise EngineError("A request ended without a token.")
    return stream_metrics(
        ttft_s=answer.ttft_s, decode_s=answer.token_s[-1] - answer.token_s[0], num_tokens=len(answer.tokens)
    )


def predicted_stream(forecast: Forecast, stream: Stream) -> dict[str, float]:
    """The same metrics, but for the number of tokens, which nobody predicts."""
    found = stream_metrics(
        ttft_s=forecast.ttft_s(stream.prompt_tokens),
        decode_s=(stream.tokens - 1) * forecast.decode_step_s(1, stream.context),
        num_tokens=stream.tokens,
    )
    return {name: value for name, value in found.items() if name != "num_tokens"}


def possible_stream(limit: Possible, stream: Stream) -> dict[str, float]:
    """What memory allows one stream; nothing where that is no limit."""
    tokens_per_s = limit.tokens_per_s(1, stream.context)
    return {} if tokens_per_s is None else {"decode_tokens_per_s": tokens_per_s, "tpot_s": 1 / tokens_per_s}


async def serve_stream(rig: Rig, stream: Stream, *, prefill_chunk: int | None = None) -> None:
    await rig.serve(max_sequences=1, max_model_len=stream.prompt_tokens + stream.tokens, prefill_chunk=prefill_chunk)
