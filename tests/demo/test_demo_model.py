"""The embedded model is small, complete, and answers as pinned; transformers is the oracle."""

from __future__ import annotations

import json
import math
import struct
import tomllib
from pathlib import Path
from typing import Any

import jinja2
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from tllm import demo

CORPUS = Path(__file__).resolve().parents[2] / "scripts" / "demo_corpus"
SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")


@pytest.fixture(scope="module")
def tokenizer() -> tokenizers.Tokenizer:
    return tokenizers.Tokenizer.from_file(str(demo.directory() / "tokenizer.json"))


def read_json(name: str) -> Any:
    return json.loads((demo.directory() / name).read_text(encoding="utf-8"))


def render(messages: list[dict[str, str]], *, add_generation_prompt: bool) -> str:
    template = jinja2.Environment(trim_blocks=True, lstrip_blocks=True).from_string(
        read_json("tokenizer_config.json")["chat_template"]
    )
    return template.render(messages=messages, add_generation_prompt=add_generation_prompt)


def corpus_rows(name: str) -> list[dict[str, Any]]:
    documents = (tomllib.loads(path.read_text(encoding="utf-8")) for path in sorted(CORPUS.glob("*.toml")))
    return [row for document in documents for row in document.get(name, ())]


def test_all_files_together_are_at_most_eight_megabytes() -> None:
    files = [path for path in demo.directory().iterdir() if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 8_000_000


def test_checkpoint_header_holds_bf16_tensors_of_the_configured_shapes() -> None:
    config = read_json("config.json")
    with (demo.directory() / "model.safetensors").open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        header = json.loads(file.read(length))
    header.pop("__metadata__")
    assert {tensor["dtype"] for tensor in header.values()} == {"BF16"}
    assert header["model.embed_tokens.weight"]["shape"] == [config["vocab_size"], config["hidden_size"]]
    assert config["tie_word_embeddings"]
    assert "lm_head.weight" not in header
    kv_size = config["num_key_value_heads"] * config["head_dim"]
    for layer in range(config["num_hidden_layers"]):
        assert header[f"model.layers.{layer}.self_attn.k_proj.weight"]["shape"] == [kv_size, config["hidden_size"]]
    assert f"model.layers.{config['num_hidden_layers']}.mlp.up_proj.weight" not in header


def test_end_of_turn_ends_generation(tokenizer: tokenizers.Tokenizer) -> None:
    end = tokenizer.token_to_id("<|im_end|>")
    assert end in read_json("generation_config.json")["eos_token_id"]
    assert read_json("config.json")["eos_token_id"] == end
    assert all(golden.tokens[-1] == end for golden in demo.golden_answers())


@settings(deadline=None, max_examples=200)
@given(text=st.text())
def test_tokenizer_gives_back_any_text(tokenizer: tokenizers.Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text, add_special_tokens=True).ids
    assert tokenizer.decode(ids, skip_special_tokens=False) == text
    assert all(0 <= token < tokenizer.get_vocab_size() for token in ids)


def test_special_tokens_are_single_ids_and_vanish_when_skipped(tokenizer: tokenizers.Tokenizer) -> None:
    for token in SPECIAL_TOKENS:
        assert len(tokenizer.encode(token).ids) == 1
    assert tokenizer.decode(tokenizer.encode("<|im_start|>hi<|im_end|>").ids) == "hi"


def test_chat_template_renders_every_role() -> None:
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Hello!"},
        {"role": "user", "content": "What is a stage?"},
    ]
    turns = "".join(f"<|im_start|>{message['role']}\n{message['content']}<|im_end|>\n" for message in messages)
    assert render(messages, add_generation_prompt=False) == turns
    assert render(messages, add_generation_prompt=True) == turns + "<|im_start|>assistant\n"


def test_corpus_has_enough_distinct_pairs_and_questions_to_decline() -> None:
    pairs = corpus_rows("pair")
    assert len({pair["answer"] for pair in pairs}) == len(pairs) >= 150
    assert len({ask.lower() for kind in corpus_rows("off_topic") for ask in kind["ask"]}) >= 150


def test_held_out_wordings_are_not_trained_on() -> None:
    rows = [*corpus_rows("pair"), *corpus_rows("off_topic")]
    trained = {ask.lower() for row in rows for ask in row["ask"]}
    assert not trained & {ask.lower() for row in rows for ask in row.get("held", ())}


def test_golden_answers_are_the_corpus_answers_and_some_decline() -> None:
    golden = demo.golden_answers()
    by_question = {row["ask"][0]: " ".join(row["answer"].split()) for row in corpus_rows("pair")}
    refusals = {" ".join(row["answer"].split()) for row in corpus_rows("off_topic")}
    assert golden[0].question == "What is tllm?"
    assert len({item.question for item in golden}) == len(golden) >= 20
    assert all(item.answer in refusals or item.answer == by_question[item.question] for item in golden)
    assert sum(item.answer in refusals for item in golden) >= 3


def test_golden_tokens_are_the_rendered_question_and_the_answer(tokenizer: tokenizers.Tokenizer) -> None:
    for golden in demo.golden_answers():
        prompt = render([{"role": "user", "content": golden.question}], add_generation_prompt=True)
        assert tokenizer.encode(prompt, add_special_tokens=False).ids == list(golden.prompt_tokens)
        assert tokenizer.decode(list(golden.tokens)) == golden.answer


def test_transformers_chooses_the_golden_tokens_with_the_stated_margin() -> None:
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    model = transformers.AutoModelForCausalLM.from_pretrained(demo.directory(), dtype=torch.float32).eval()
    for golden in demo.golden_answers():
        # Teacher forcing: if every argmax is the pinned token, then so is every greedy choice.
        ids = torch.tensor([[*golden.prompt_tokens, *golden.tokens]])
        with torch.inference_mode():
            logits = model(ids).logits[0, len(golden.prompt_tokens) - 1 : -1]
        best = logits.topk(2, dim=-1)
        assert best.indices[:, 0].tolist() == list(golden.tokens), golden.question
        margin = float((best.values[:, 0] - best.values[:, 1]).min())
        assert math.isclose(margin, golden.margin, abs_tol=0.01)
        assert margin > 0.05


def test_transformers_generates_a_golden_answer_and_stops() -> None:
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    golden = demo.golden_answers()[0]
    model = transformers.AutoModelForCausalLM.from_pretrained(demo.directory(), dtype=torch.float32).eval()
    made = model.generate(input_ids=torch.tensor([golden.prompt_tokens]), max_new_tokens=100)
    assert made[0, len(golden.prompt_tokens) :].tolist() == list(golden.tokens)
