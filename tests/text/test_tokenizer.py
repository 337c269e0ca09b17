"""The tokenizer against transformers, and against broken checkpoints."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, decoders, models
from tokenizers import Tokenizer as Backend

from tllm.core.errors import ModelError, RequestError
from tllm.core.types import TokenId
from tllm.text.tokenizer import Tokenizer

_TEXTS = st.lists(
    st.one_of(
        st.text(max_size=8),
        st.text("aeé́ ▁\n中😀👩‍<>s/|", max_size=8),
        st.sampled_from(["<s>", "</s>", "<|end|>", "<tool>", " <s> ", "é", "The quick", "<0x41>", "👩‍👩‍👧", "  "]),
    ),
    max_size=6,
).map("".join)


@settings(max_examples=100, deadline=None)
@example("")
@example(" ")
@example(" a  b ")
@given(_TEXTS)
def test_encode_and_decode_are_those_of_transformers(checkpoints: dict[str, Any], text: str) -> None:
    for name, both in checkpoints.items():
        for add in (False, True):
            ids = both.ours.encode(text, add_special_tokens=add)
            assert list(ids) == both.theirs.encode(text, add_special_tokens=add), name
            for skip in (False, True):
                decoded = both.theirs.decode(list(ids), skip_special_tokens=skip)
                assert both.ours.decode(ids, skip_special_tokens=skip) == decoded, name


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_decode_of_any_ids_is_that_of_transformers(checkpoints: dict[str, Any], data: st.DataObject) -> None:
    for name, both in checkpoints.items():
        if name == "byte_fallback":
            continue  # differs for broken bytes: the next test
        ids = data.draw(st.lists(st.integers(0, both.ours.vocab_size + 2), max_size=12))
        for skip in (False, True):
            expected = both.theirs.decode(ids, skip_special_tokens=skip)
            assert both.ours.decode(ids, skip_special_tokens=skip) == expected, name


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_decode_of_byte_tokens_is_that_of_transformers_where_they_are_utf8(
    checkpoints: dict[str, Any], data: st.DataObject
) -> None:
    both = checkpoints["byte_fallback"]
    characters = st.characters(exclude_categories=["Cs"]).map(
        lambda char: [both.ours.token_id(f"<0x{byte:02X}>") for byte in char.encode()]
    )
    pieces = st.one_of(characters, st.integers(0, both.ours.vocab_size + 2).map(lambda token: [token]))
    ids = [token for piece in data.draw(st.lists(pieces, max_size=8)) for token in piece]
    for skip in (False, True):
        expected = both.theirs.decode(ids, skip_special_tokens=skip)
        if "�" not in expected:
            assert both.ours.decode(ids, skip_special_tokens=skip) == expected


def test_broken_byte_tokens_leave_their_neighbours_whole(checkpoints: dict[str, Any]) -> None:
    tokenizer = checkpoints["byte_fallback"].ours
    ids = [tokenizer.token_id(piece) for piece in ("<0x41>", "<0xF0>", "<0x9F>", "<0x42>")]
    assert tokenizer.decode(ids, skip_special_tokens=True) == "A�B"


def test_special_tokens_are_those_of_transformers(checkpoints: dict[str, Any]) -> None:
    for name, both in checkpoints.items():
        ours, theirs = both.ours, both.theirs
        assert ours.special_tokens == theirs.special_tokens_map, name
        assert (ours.bos_token, ours.bos_id) == (theirs.bos_token, theirs.bos_token_id), name
        assert (ours.eos_token, ours.eos_id) == (theirs.eos_token, theirs.eos_token_id), name
        assert ours.special_ids == {index for index, token in theirs.added_tokens_decoder.items() if token.special}
        assert ours.vocab_size == len(theirs), name


def test_truncation_and_padding_of_the_file_are_off(checkpoints: dict[str, Any]) -> None:
    tokenizer = checkpoints["byte_level_with_bos"].ours
    assert len(tokenizer.encode("x", add_special_tokens=True)) == 3
    assert len(tokenizer.encode("one two three four five six", add_special_tokens=False)) > 4


def test_special_tokens_that_only_the_config_knows_are_added_as_transformers_adds_them(
    save: Callable[..., Path], read_by_both: Callable[[Path], Any], checkpoints: dict[str, Any]
) -> None:
    backend = Backend.from_file(str(checkpoints["byte_level"].directory / "tokenizer.json"))
    known = backend.get_vocab_size()
    both = read_by_both(
        save(
            backend,
            {
                "tokenizer_class": "PreTrainedTokenizerFast",
                "bos_token": "<begin>",
                "eos_token": "the",  # an ordinary entry of the vocabulary, promoted
                "image_token": "<image>",
                "extra_special_tokens": ["<x1>", "<x2>"],
                "added_tokens_decoder": {
                    str(known): AddedToken("<late>", special=False, lstrip=True).__getstate__(),
                    "1": AddedToken("<s>", special=True, normalized=False).__getstate__(),
                },
            },
        )
    )
    text = "a <late> the <begin><image> <x1>the"
    ids = both.ours.encode(text, add_special_tokens=False)
    assert list(ids) == both.theirs.encode(text, add_special_tokens=False)
    assert both.ours.decode(ids, skip_special_tokens=True) == both.theirs.decode(ids, skip_special_tokens=True)
    assert both.ours.special_tokens == both.theirs.special_tokens_map
    assert both.ours.token_id("<late>") == known
    assert both.ours.bos_id == both.theirs.bos_token_id


@pytest.mark.parametrize(
    ("kind", "tokenizer_class"),
    [
        ("byte_level", "GPT2Tokenizer"),
        ("byte_level", "Qwen2Tokenizer"),
        ("byte_level_with_bos", "LlamaTokenizerFast"),  # a class that does not fit the file
        ("byte_level", "LlamaTokenizerFast"),
        ("byte_fallback", "LlamaTokenizer"),
        ("byte_fallback", "LlamaTokenizerFast"),
    ],
)
@pytest.mark.parametrize("adds", [True, False])
def test_the_post_processor_alone_decides_what_is_added_whatever_the_config_says(
    save: Callable[..., Path],
    read_by_both: Callable[[Path], Any],
    checkpoints: dict[str, Any],
    kind: str,
    tokenizer_class: str,
    adds: bool,
) -> None:
    backend = Backend.from_file(str(checkpoints[kind].directory / "tokenizer.json"))
    names = {"bos_token": "<s>", "eos_token": "</s>", "tokenizer_class": tokenizer_class}
    both = read_by_both(save(backend, names | {"add_bos_token": adds, "add_eos_token": adds}))
    for text in ("The fox", "a  b", ""):
        assert list(both.ours.encode(text, add_special_tokens=True)) == both.theirs.encode(text)


def test_special_tokens_map_is_read_where_the_config_has_no_added_tokens(
    save: Callable[..., Path], read_by_both: Callable[[Path], Any], checkpoints: dict[str, Any]
) -> None:
    backend = Backend.from_file(str(checkpoints["byte_level"].directory / "tokenizer.json"))
    names = {"bos_token": "<s>", "eos_token": {"content": "<|end|>", "lstrip": False}, "pad_token": "<pad>"}
    both = read_by_both(
        save(backend, {"tokenizer_class": "PreTrainedTokenizerFast"}, special_tokens_map__json=json.dumps(names))
    )
    assert both.ours.special_tokens == both.theirs.special_tokens_map
    assert both.ours.eos_token == "<|end|>"
    assert list(both.ours.encode("a<pad>b", add_special_tokens=False)) == both.theirs.encode("a<pad>b")


def test_tokenizer_json_alone_is_enough(tmp_path: Path, checkpoints: dict[str, Any]) -> None:
    source = checkpoints["byte_level"].directory / "tokenizer.json"
    (tmp_path / "tokenizer.json").write_bytes(source.read_bytes())
    tokenizer = Tokenizer.load(tmp_path)
    assert tokenizer.bos_token is None
    assert tokenizer.eos_id is None
    assert tokenizer.chat_template is None
    assert tokenizer.decode(tokenizer.encode("hello", add_special_tokens=True), skip_special_tokens=True) == "hello"


@settings(max_examples=100, deadline=None)
@given(_TEXTS.filter(lambda text: "é" not in text))  # an added token spelled in the byte alphabet: see below
def test_token_bytes_concatenate_to_the_text(checkpoints: dict[str, Any], text: str) -> None:
    tokenizer = checkpoints["byte_level"].ours
    ids = tokenizer.encode(text, add_special_tokens=False)
    assert b"".join(map(tokenizer.token_bytes, ids)) == text.encode()


def test_token_bytes_follow_the_decoder(checkpoints: dict[str, Any]) -> None:
    fallback, metaspace, words = (checkpoints[name].ours for name in ("byte_fallback", "unigram", "words"))
    assert fallback.token_bytes(fallback.token_id("<0xE4>")) == b"\xe4"
    assert fallback.token_text(fallback.token_id("<0xE4>")) == "bytes:\\xe4"
    assert fallback.token_bytes(fallback.token_id("▁")) == b" "
    assert fallback.token_text(fallback.token_id("</s>")) == "</s>"
    assert metaspace.token_text(metaspace.token_id("▁")) == " "
    assert words.token_text(words.token_id("one")) == " one"
    # What the library's own byte-level decoder makes of an added token spelled in the byte alphabet.
    byte_level = checkpoints["byte_level"].ours
    assert byte_level.token_bytes(byte_level.token_id("é")) == b"\xe9"


def test_ids_without_a_token_have_no_text(checkpoints: dict[str, Any]) -> None:
    tokenizer = checkpoints["byte_fallback"].ours
    beyond = TokenId(tokenizer.vocab_size + 7)
    assert tokenizer.token_bytes(beyond) == b""
    assert tokenizer.decode([beyond], skip_special_tokens=False) == ""
    for wrong in (-1, 2**32):
        with pytest.raises(RequestError, match="not a token id") as caught:
            tokenizer.decode([TokenId(wrong)], skip_special_tokens=False)
        assert caught.value.param == "tokens"


def test_half_a_character_from_a_client_is_refused_with_its_place(checkpoints: dict[str, Any]) -> None:
    with pytest.raises(RequestError, match=r"\\ud83d, at character 3"):
        checkpoints["byte_level"].ours.encode("abc\ud83d", add_special_tokens=False)


def test_info_is_json_with_plain_special_tokens_and_nothing_of_the_makers_machine(
    save: Callable[..., Path], checkpoints: dict[str, Any]
) -> None:
    backend = Backend.from_file(str(checkpoints["byte_level"].directory / "tokenizer.json"))
    directory = save(
        backend,
        {
            "eos_token": {"content": "</s>"},
            "model_max_length": 77,
            "chat_template": "x",
            "name_or_path": "/home/someone/model",
            "tokenizer_class": "GPT2Tokenizer",
        },
    )
    info = Tokenizer.load(directory).info()
    assert json.loads(json.dumps(info)) == info
    assert info == {
        "bos_token": None,
        "eos_token": "</s>",
        "bos_token_id": None,
        "eos_token_id": 2,
        "model_max_length": 77,
        "chat_template": "x",
        "tokenizer_class": "GPT2Tokenizer",
        "vocab_size": backend.get_vocab_size(),
    }


def test_chat_templates_are_found_where_transformers_finds_them(
    save: Callable[..., Path], checkpoints: dict[str, Any]
) -> None:
    backend = Backend.from_file(str(checkpoints["byte_level"].directory / "tokenizer.json"))
    named = [{"name": "default", "template": "from list"}, {"name": "tool_use", "template": "with tools"}]
    from_list = Tokenizer.load(save(backend, {"chat_template": named}))
    assert (from_list.chat_template, from_list.tool_template) == ("from list", "with tools")
    from_file = Tokenizer.load(save(backend, {"chat_template": named}, chat_template__jinja="from file"))
    assert (from_file.chat_template, from_file.tool_template) == ("from file", None)
    from_json = Tokenizer.load(save(backend, {}, chat_template__json='{"chat_template": "from json"}'))
    assert from_json.chat_template == "from json"
    directory = save(backend, {"chat_template": "from config"}, chat_template__jinja="from file")
    (directory / "additional_chat_templates").mkdir()
    (directory / "additional_chat_templates" / "tool_use.jinja").write_text("tools from file")
    assert Tokenizer.load(directory).tool_template == "tools from file"


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("tokenizer.json", "{", "tokenizer.json is not a tokenizer"),
        ("tokenizer.json", '{"model": 1}', "tokenizer.json is not a tokenizer"),
        ("tokenizer_config.json", "{", "tokenizer_config.json is not JSON"),
        ("tokenizer_config.json", "[]", "tokenizer_config.json holds a JSON list"),
        ("tokenizer_config.json", '{"chat_template": [{"name": 1}]}', "tokenizer_config.json: chat_template must be"),
        ("tokenizer_config.json", '{"chat_template": 7}', "tokenizer_config.json: chat_template must be"),
        ("tokenizer_config.json", '{"added_tokens_decoder": {"x": "y"}}', "a special token is malformed"),
        ("special_tokens_map.json", "nonsense", "special_tokens_map.json is not JSON"),
    ],
)
def test_a_broken_file_is_named(
    tmp_path: Path, checkpoints: dict[str, Any], name: str, content: str, words: str
) -> None:
    source = checkpoints["byte_level"].directory / "tokenizer.json"
    (tmp_path / "tokenizer.json").write_bytes(source.read_bytes())
    (tmp_path / name).write_text(content)
    with pytest.raises(ModelError, match=words):
        Tokenizer.load(tmp_path)


def test_files_that_are_not_text_are_named(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_bytes(b"\xff\xfe")
    with pytest.raises(ModelError, match=r"tokenizer\.json cannot be read"):
        Tokenizer.load(tmp_path)


def test_a_missing_tokenizer_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"tokenizer\.json does not exist\. Save the tokenizer"):
        Tokenizer.load(tmp_path)
    (tmp_path / "tokenizer.model").write_bytes(b"")
    with pytest.raises(ModelError, match=r"Only a SentencePiece tokenizer\.model is there"):
        Tokenizer.load(tmp_path)


@pytest.mark.parametrize(
    "decoder",
    [
        decoders.WordPiece(),
        decoders.BPEDecoder(),
        decoders.CTC(),
        decoders.Sequence([decoders.Strip(" ", 1, 0), decoders.Fuse()]),
        decoders.Sequence([decoders.Fuse(), decoders.Strip(" ", 0, 1)]),
        decoders.Replace(Regex("a+"), "b"),
    ],
    ids=repr,
)
def test_a_decoder_that_bytes_cannot_express_is_refused(save: Callable[..., Path], decoder: decoders.Decoder) -> None:
    backend = Backend(models.BPE())
    backend.decoder = decoder
    with pytest.raises(ModelError, match=r"decoder step .* is not supported"):
        Tokenizer.load(save(backend))
