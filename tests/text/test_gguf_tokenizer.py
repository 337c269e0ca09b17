"""The tokenizer within a GGUF file: the same ids as the tokenizer.json that its values were taken from."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors, trainers
from tokenizers import Tokenizer as Backend

from tllm.core.errors import ModelError
from tllm.core.types import TokenId
from tllm.models.checkpoint import end_ids
from tllm.text.template import ChatTemplate
from tllm.text.tokenizer import Tokenizer

CORPUS = [
    "The quick brown fox doesn't jump over 1234 lazy dogs, we're told in 2024.\n\nWhy?\tBecause it's tired...",
    "Größe, naïve, café, e\u0301te\u0301; 中文字符 и кириллица 😀👩‍👩‍👧 don't DON'T 12 345 6789",
    "def f(x):\n    return x ** 2  # squared\r\n" * 3,
]
# As publishers write them in tokenizer.json.
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
QWEN2 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
TEMPLATE = "{{ bos_token }}{% for m in messages %}{{ m['content'] }}{{ eos_token }}{% endfor %}"


def published(pre: str) -> Backend:
    """A trained tokenizer of the kind that this pre-tokenizer stands for."""
    backend = Backend(models.BPE(ignore_merges=pre == "llama-bpe"))
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=pre in ("gpt-2", "smollm"))
    match pre:
        case "llama-bpe":
            before = [pre_tokenizers.Split(Regex(LLAMA3), behavior="isolated", invert=False)]
        case "qwen2":
            before = [pre_tokenizers.Split(Regex(QWEN2), behavior="isolated", invert=False)]
            backend.normalizer = normalizers.NFC()
        case "smollm":
            before = [pre_tokenizers.Digits(individual_digits=True)]
        case _:
            before = []
    backend.pre_tokenizer = pre_tokenizers.Sequence([*before, byte_level])
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, show_progress=False)
    backend.train_from_iterator(CORPUS, trainer)
    backend.add_tokens([AddedToken(text, special=True, normalized=False) for text in ("<|begin|>", "<|im_end|>")])
    backend.add_tokens([AddedToken("<tool_call>", special=False, normalized=False)])
    if pre == "llama-bpe":
        begin = ("<|begin|>", backend.token_to_id("<|begin|>"))
        backend.post_processor = processors.TemplateProcessing(
            single="<|begin|>:0 $A:0", pair="<|begin|>:0 $A:0 <|begin|>:1 $B:1", special_tokens=[begin]
        )
    return backend


def write(path: Path, backend: Backend, pre: str, **changes: Any) -> Path:
    """The values that a converter writes for a tokenizer; a change to None leaves one out."""
    from gguf import GGUFWriter

    content = json.loads(backend.to_str())
    vocab = backend.get_vocab(with_added_tokens=True)
    tokens = sorted(vocab, key=vocab.__getitem__)
    special = {entry["id"]: 3 if entry["special"] else 4 for entry in content["added_tokens"]}
    values = {
        "model": "gpt2",
        "pre": pre,
        "tokens": tokens,
        "token_type": [special.get(index, 1) for index in range(len(tokens))],
        "merges": [" ".join(pair) for pair in content["model"]["merges"]],
        "bos_token_id": vocab["<|begin|>"],
        "eos_token_id": vocab["<|im_end|>"],
    }
    writer = GGUFWriter(path, "llama")
    for key, value in (values | changes).items():
        match value:
            case None:
                pass
            case bool():
                writer.add_bool(f"tokenizer.ggml.{key}", value)
            case int():
                writer.add_uint32(f"tokenizer.ggml.{key}", value)
            case str():
                writer.add_string(f"tokenizer.ggml.{key}", value)
            case _:
                writer.add_array(f"tokenizer.ggml.{key}", value)
    writer.add_string("tokenizer.chat_template", TEMPLATE)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


PRES = ("llama-bpe", "qwen2", "gpt-2", "smollm")


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Tokenizer, Backend]]:
    directory = tmp_path_factory.mktemp("gguf")
    backends = {pre: published(pre) for pre in PRES}
    return {pre: (Tokenizer.load(write(directory / f"{pre}.gguf", b, pre)), b) for pre, b in backends.items()}


_TEXTS = st.lists(
    st.one_of(
        st.text(max_size=8),
        st.text("aeé\u0301 \n\r\t'1290中😀.,", max_size=10),
        st.sampled_from(["<|begin|>", "<|im_end|>", "<tool_call>", "don't", "  The", "quick", "12345", "\r\n\n"]),
    ),
    max_size=6,
).map("".join)


@settings(max_examples=150, deadline=None)
@example("")
@example("DON'T  12345\r\n\r\n e\u0301")
@given(_TEXTS)
def test_ids_are_those_of_the_published_tokenizer(pairs: dict[str, tuple[Tokenizer, Backend]], text: str) -> None:
    for pre, (ours, theirs) in pairs.items():
        for add in (False, True):
            ids = ours.encode(text, add_special_tokens=add)
            assert list(ids) == theirs.encode(text, add_special_tokens=add).ids, pre
            for skip in (False, True):
                assert ours.decode(ids, skip_special_tokens=skip) == theirs.decode(list(ids), skip_special_tokens=skip)


def test_special_tokens_and_template_are_the_files(pairs: dict[str, tuple[Tokenizer, Backend]]) -> None:
    ours, theirs = pairs["qwen2"]
    assert (ours.bos_token, ours.eos_token) == ("<|begin|>", "<|im_end|>")
    assert ours.special_ids == {ours.bos_id, ours.eos_id}
    assert ours.vocab_size == theirs.get_vocab_size()
    assert ours.chat_template == TEMPLATE
    text = ChatTemplate.of(ours).render([{"role": "user", "content": "hi"}])
    assert text == "<|begin|>hi<|im_end|>"


def test_what_is_added_is_what_the_file_says(tmp_path: Path) -> None:
    backend = published("qwen2")
    both = Tokenizer.load(write(tmp_path / "a.gguf", backend, "qwen2", add_bos_token=True, add_eos_token=True))
    inner = both.encode("hi", add_special_tokens=False)
    assert both.encode("hi", add_special_tokens=True) == (both.bos_id, *inner, both.eos_id)
    none = Tokenizer.load(write(tmp_path / "b.gguf", published("llama-bpe"), "llama-bpe", add_bos_token=False))
    assert none.encode("hi", add_special_tokens=True) == none.encode("hi", add_special_tokens=False)
    assert end_ids(tmp_path / "a.gguf") == (TokenId(backend.token_to_id("<|im_end|>")),)


def test_a_tokenizer_beside_the_file_goes_before_it(tmp_path: Path) -> None:
    write(tmp_path / "model.gguf", published("qwen2"), "mystery")
    published("gpt-2").save(str(tmp_path / "tokenizer.json"))
    beside = Tokenizer.load(tmp_path / "model.gguf")
    assert beside.encode("12 34", add_special_tokens=True) == tuple(published("gpt-2").encode("12 34").ids)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"model": "llama"},
            r"a tokenizer of the kind 'llama' is not supported, only gpt2. Put the model's own tokenizer",
        ),
        ({"pre": "mystery"}, r"the pre-tokenizer 'mystery' is not supported; there are llama-bpe"),
        ({"pre": None}, r"the pre-tokenizer None is not supported"),
        ({"tokens": None}, r"has 0 tokens of 403 types"),
        ({"token_type": [1, 2]}, r"has 403 tokens of 2 types"),
        ({"merges": ["ab"]}, r"'ab' is not a merge of two tokens"),
        ({"merges": ["zz\u0100 b"]}, r"its tokens and merges do not fit together"),
        ({"bos_token_id": 5000}, r"bos_token_id is 5000, but there are 403 tokens"),
    ],
)
def test_what_cannot_be_used_says_what_to_do(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    path = write(tmp_path / "model.gguf", published("qwen2"), **({"pre": "qwen2"} | changes))
    with pytest.raises(ModelError, match=message):
        Tokenizer.load(path)
