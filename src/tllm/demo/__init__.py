"""The embedded model: a small Llama checkpoint in Hugging Face layout, to try and test tllm without a download.

`scripts/train_demo_model.py` makes every other file of this directory from `scripts/demo_corpus`. `golden.json` pins
its greedy answers: whatever the engine, the dtype or the cut into stages, these tokens come out.

This package knows where the files are, not what reads them.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

__all__ = ["GoldenAnswer", "directory", "golden_answers"]


@dataclass(frozen=True, slots=True, kw_only=True)
class GoldenAnswer:
    """A question, asked as the only user turn, and the greedy answer to it.

    `prompt_tokens` are the ids after the chat template, generation prompt included; `tokens` are the ids the model then
    chooses, the end of turn last; `margin` is the least gap, in fp32 logits, between a chosen token and the next best.
    """

    question: str
    answer: str
    margin: float
    prompt_tokens: tuple[int, ...]
    tokens: tuple[int, ...]


def directory() -> Path:
    """The checkpoint's directory: config.json, model.safetensors, the tokenizer's files, golden.json."""
    return Path(__file__).resolve().parent


def golden_answers() -> tuple[GoldenAnswer, ...]:
    """The pinned answers in the file's order; "What is tllm?" is the first."""
    rows = json.loads((directory() / "golden.json").read_text(encoding="utf-8"))
    return tuple(
        GoldenAnswer(
            question=row["question"],
            answer=row["answer"],
            margin=row["margin"],
            prompt_tokens=tuple(row["prompt_tokens"]),
            tokens=tuple(row["tokens"]),
        )
        for row in rows
    )
