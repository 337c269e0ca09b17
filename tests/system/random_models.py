"""Small models as they are served: their answers, what `transformers` answers on one machine, their speed.

By token ids and in float32: texts of a random model are mostly bytes that are no characters.
"""

from __future__ import annotations

from pathlib import Path

import httpx

from tests.system.processes import Server, repository
from tllm.cluster.speeds import SpeedCache, speed_key, to_message
from tllm.core.types import DType
from tllm.models.checkpoint import Checkpoint
from tllm.planner.profile import Speed

DEMO = repository() / "src/tllm/demo"  # served where no other model is named
PROMPT = tuple(b"uneven")
NUM_TOKENS = 24


def greedy(server: Server) -> list[int]:
    body = {"model": server.model, "prompt": PROMPT, "temperature": 0, "max_tokens": NUM_TOKENS, "ignore_eos": True}
    answer = httpx.post(f"{server.url}/v1/completions", json={**body, "return_token_ids": True}, timeout=60)
    assert answer.status_code == 200, answer.text
    ids: list[int] = answer.json()["choices"][0]["token_ids"]
    return ids


def expected(model: Path) -> list[int]:
    """By full forwards without a cache."""
    import torch
    from transformers import AutoModelForCausalLM

    oracle = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32, attn_implementation="eager")
    ids = list(PROMPT)
    for _ in range(NUM_TOKENS):
        with torch.inference_mode():
            logits = oracle(torch.tensor([ids])).logits[0, -1]
        best = logits.topk(2).values
        assert best[0] - best[1] > 1e-3, "a near tie proves nothing: choose another seed"
        ids.append(int(logits.argmax()))
    return ids[len(PROMPT) :]


def remember_speed(state: Path, model: Path, *, head_s: float = 1e-3) -> None:
    """Let the machine with that state directory have been measured before, with one thread: it saves every test some
    seconds of a worker, and a plan does not hang on chance."""
    key = speed_key(Checkpoint.open(model).config, DType.FLOAT32, None, "cpu", 1, "torch")
    speed = Speed(rows=(1, 64), layer_s=(1e-3, 1e-2), head_s=(head_s, 10 * head_s), step_s=1e-3)
    SpeedCache(state / "speeds").put(key, to_message(speed))
