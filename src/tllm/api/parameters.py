"""From a request's numbers to `SamplingParams`: defaults, limits, end-of-sequence ids, seeds.

A value that the request leaves out comes from the model's own generation defaults, then from OpenAI's.
This file does not know prompts' texts, nor how sampling is done.
"""

from __future__ import annotations

import random
from dataclasses import replace

from tllm.api.prompts import checked_ids
from tllm.api.schema import INT64, GenerationBody
from tllm.api.state import ApiState, Limits
from tllm.cluster.deployment import Deployment
from tllm.core.errors import RequestError
from tllm.core.types import SamplingParams, TokenId

SMALLEST_TOP_P = 1e-6  # 0 asks for the smallest nucleus there is, which is the best token alone


def stop_strings(body: GenerationBody, limits: Limits) -> tuple[str, ...]:
    """The strings that end an answer. Raises RequestError for too many, or for one that is everywhere."""
    stop = (body.stop,) if isinstance(body.stop, str) else tuple(body.stop or ())
    if len(stop) > limits.max_stop:
        raise RequestError(f"{len(stop)} stop strings were given; at most {limits.max_stop} are allowed.", param="stop")
    if (num_chars := sum(map(len, stop))) > limits.max_stop_chars:
        raise RequestError(
            f"The stop strings have {num_chars} characters together; at most {limits.max_stop_chars} are allowed.",
            param="stop",
        )
    if "" in stop:
        raise RequestError("A stop string is empty; leave it out or write at least one character.", param="stop")
    return stop


def sampling_params(
    body: GenerationBody,
    deployment: Deployment,
    state: ApiState,
    *,
    num_prompt_tokens: int,
    max_tokens: int | None,
    logprobs: int | None,
) -> SamplingParams:
    """The parameters of a request's first choice; `for_choice` makes the others'.

    `max_tokens` None fills the context; more than the context has left is cut to it. Raises RequestError.
    """
    room = deployment.max_model_len - num_prompt_tokens
    limit = room if max_tokens is None else min(max_tokens, room)
    min_tokens = body.min_tokens or 0
    if max_tokens is not None and min_tokens > max_tokens:
        raise RequestError(f"'min_tokens' is {min_tokens}, more than the limit of {max_tokens}.", param="min_tokens")
    ends = () if body.ignore_eos else deployment.end_ids
    _require_short(body, state.limits)
    asked = checked_ids(body.stop_token_ids or (), deployment.vocab_size, param="stop_token_ids")
    defaults = deployment.generation_defaults
    top_k = int(body.top_k if body.top_k is not None else defaults.get("top_k", 0))
    top_p = float(body.top_p if body.top_p is not None else defaults.get("top_p", 1.0))
    seed = body.seed if body.seed is not None else state.default_seed
    return SamplingParams(
        temperature=float(body.temperature if body.temperature is not None else defaults.get("temperature", 1.0)),
        top_k=max(0, top_k),
        top_p=max(SMALLEST_TOP_P, top_p),
        min_p=float(body.min_p if body.min_p is not None else defaults.get("min_p", 0.0)),
        presence_penalty=body.presence_penalty or 0.0,
        frequency_penalty=body.frequency_penalty or 0.0,
        repetition_penalty=float(
            body.repetition_penalty if body.repetition_penalty is not None else defaults.get("repetition_penalty", 1.0)
        ),
        logit_bias=_logit_bias(body, deployment.vocab_size),
        allowed_ids=_allowed_ids(body, deployment.vocab_size),
        seed=(random.getrandbits(63) if seed is None else seed) % INT64,
        max_tokens=limit,
        min_tokens=min(min_tokens, limit),
        stop_ids=tuple(dict.fromkeys((*ends, *asked))),
        logprobs=logprobs,
    )


def for_choice(params: SamplingParams, index: int) -> SamplingParams:
    """The same request's choice number `index`: the next seed, so that choices differ and can be had again."""
    return replace(params, seed=(params.seed + index) % INT64) if index else params


def _require_short(body: GenerationBody, limits: Limits) -> None:
    for name, given, allowed in (
        ("stop_token_ids", body.stop_token_ids, limits.max_stop_ids),
        ("logit_bias", body.logit_bias, limits.max_biases),
        ("allowed_token_ids", body.allowed_token_ids, limits.max_allowed_ids),
    ):
        if given is not None and len(given) > allowed:
            raise RequestError(f"'{name}' has {len(given)} entries; at most {allowed} are allowed.", param=name)


def _logit_bias(body: GenerationBody, vocab_size: int) -> tuple[tuple[TokenId, float], ...]:
    bias: dict[TokenId, float] = {}
    for key, value in (body.logit_bias or {}).items():
        if not (key.isascii() and key.isdigit() and len(key) <= 10 and int(key) < vocab_size):
            raise RequestError(
                f"'logit_bias' has the key {key!r:.40}; keys are token ids from 0 to {vocab_size - 1}.",
                param="logit_bias",
            )
        bias[TokenId(int(key))] = value
    return tuple(bias.items())


def _allowed_ids(body: GenerationBody, vocab_size: int) -> tuple[TokenId, ...] | None:
    if body.allowed_token_ids is None:
        return None
    if not body.allowed_token_ids:
        raise RequestError("'allowed_token_ids' is empty, which allows nothing.", param="allowed_token_ids")
    return tuple(dict.fromkeys(checked_ids(body.allowed_token_ids, vocab_size, param="allowed_token_ids")))
