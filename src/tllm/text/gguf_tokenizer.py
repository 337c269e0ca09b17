"""The tokenizer in a GGUF file's values, as a backend of the tokenizers library.

    tokenizer.ggml.model        gpt2: byte-level BPE. Others are refused: they need what the file does not hold
    tokenizer.ggml.pre          how text is divided before merging: one of a list of names, each a regular expression
    tokenizer.ggml.tokens, token_type, merges; *_token_id; add_bos_token, add_eos_token
    tokenizer.chat_template, and tokenizer.chat_template.NAME for others

Token types: 1 normal, 3 control (special), 4 defined by the user (found in text before it is divided), 5 unused.

This file does not know how weights are stored, nor what a tokenizer is used for.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors

from tllm.core.errors import ModelError
from tllm.models.gguf_file import GgufHeader, read_header

_PREFIX: Final = "tokenizer.ggml."
_TEMPLATE: Final = "tokenizer.chat_template"
_CONTROL, _USER_DEFINED = 3, 4
_NAMED: Final = {
    "bos": "bos_token",
    "eos": "eos_token",
    "unknown": "unk_token",
    "seperator": "sep_token",  # so spelled
    "padding": "pad_token",
}


def _words(digits: str) -> str:
    """The expression of GPT-4's family, with so many digits at a time."""
    return (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
        + digits
        + r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Division:
    """How text is divided; `regex` empty: as GPT-2 does."""

    regex: str = ""
    single_digits: bool = False
    normal_form: bool = False  # NFC
    whole_words: bool = False  # a word that is a token is not merged from parts
    begins: bool = False  # begin of sequence is added when the file does not say


_LLAMA3: Final = _Division(regex=_words(r"\p{N}{1,3}"), whole_words=True, begins=True)
_QWEN2: Final = _Division(regex=_words(r"\p{N}"), normal_form=True)
_GPT2: Final = _Division()
_DIGITS: Final = _Division(single_digits=True)
_DIVISIONS: Final[Mapping[str, _Division]] = {
    "llama-bpe": _LLAMA3, "llama3": _LLAMA3, "llama-v3": _LLAMA3,
    "qwen2": _QWEN2, "deepseek-r1-qwen": _QWEN2,
    "gpt-2": _GPT2, "olmo": _GPT2, "phi-2": _GPT2,
    "smollm": _DIGITS, "starcoder": _DIGITS,
}  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class GgufTokenizer:
    """What `Tokenizer` is made from."""

    backend: tokenizers.Tokenizer
    config: Mapping[str, object]
    special_tokens: Mapping[str, str]
    templates: Mapping[str, str]


def read_gguf_tokenizer(path: Path) -> GgufTokenizer:
    """Raises ModelError naming what the file lacks or tllm does not support, and what to do."""
    header = read_header(path)
    tokens, merges = header.texts(_PREFIX + "tokens"), header.texts(_PREFIX + "merges")
    kinds = header.sizes(_PREFIX + "token_type")
    division = _division(header)
    if not tokens or (kinds and len(kinds) != len(tokens)):
        raise ModelError(f"{path} has {len(tokens)} tokens of {len(kinds)} types. {_ADVICE}")
    backend = _backend(header, tokens, merges, division)
    added = [
        AddedToken(token, special=kind == _CONTROL, normalized=False)
        for token, kind in zip(tokens, kinds, strict=False)
        if kind in (_CONTROL, _USER_DEFINED)
    ]
    if added:
        backend.add_tokens(added)
    named = {
        name: _token(header, tokens, key) for key, name in _NAMED.items() if f"{_PREFIX}{key}_token_id" in header.values
    }
    ends = {
        "bos": header.flag(_PREFIX + "add_bos_token", default=division.begins),
        "eos": header.flag(_PREFIX + "add_eos_token", default=False),
    }
    around = {key: named[_NAMED[key]] for key, adds in ends.items() if adds and _NAMED[key] in named}
    if around:
        backend.post_processor = _adding(backend, around)
    return GgufTokenizer(
        backend=backend,
        config={"tokenizer_class": "PreTrainedTokenizerFast"},
        special_tokens=named,
        templates=_templates(header),
    )


_ADVICE: Final = "Put the model's own tokenizer.json (and tokenizer_config.json) beside the file."


def _division(header: GgufHeader) -> _Division:
    model, pre = header.text(_PREFIX + "model"), header.text(_PREFIX + "pre")
    if model != "gpt2":
        raise ModelError(f"{header.path}: a tokenizer of the kind {model!r} is not supported, only gpt2. {_ADVICE}")
    if pre is None or pre not in _DIVISIONS:
        raise ModelError(
            f"{header.path}: the pre-tokenizer {pre!r} is not supported; there are {', '.join(_DIVISIONS)}. {_ADVICE}"
        )
    return _DIVISIONS[pre]


def _backend(header: GgufHeader, tokens: list[str], merges: list[str], division: _Division) -> tokenizers.Tokenizer:
    pairs = []
    for merge in merges:
        first, _, second = merge.partition(" ")
        if not first or not second:
            raise ModelError(f"{header.path}: {merge[:80]!r} is not a merge of two tokens.")
        pairs.append((first, second))
    vocab = {token: index for index, token in enumerate(tokens)}
    try:
        model = models.BPE(vocab=vocab, merges=pairs, ignore_merges=division.whole_words)
    except Exception as error:
        # The library raises Exception itself for merges of unknown tokens.
        if type(error) is not Exception:
            raise
        raise ModelError(f"{header.path}: its tokens and merges do not fit together: {error}") from error
    backend = tokenizers.Tokenizer(model)
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=not division.regex)
    before: list[pre_tokenizers.PreTokenizer] = []
    if division.regex:
        before.append(pre_tokenizers.Split(Regex(division.regex), behavior="isolated", invert=False))
    if division.single_digits:
        before.append(pre_tokenizers.Digits(individual_digits=True))
    backend.pre_tokenizer = pre_tokenizers.Sequence([*before, byte_level])
    if division.normal_form:
        backend.normalizer = normalizers.NFC()
    backend.decoder = decoders.ByteLevel()
    return backend


def _token(header: GgufHeader, tokens: list[str], key: str) -> str:
    index = header.size(f"{_PREFIX}{key}_token_id")
    if index >= len(tokens):
        raise ModelError(f"{header.path}: {_PREFIX}{key}_token_id is {index}, but there are {len(tokens)} tokens.")
    return tokens[index]


def _adding(backend: tokenizers.Tokenizer, around: Mapping[str, str]) -> processors.TemplateProcessing:
    """What `add_special_tokens` adds."""
    begin = f"{around['bos']}:0 " if "bos" in around else ""
    end = f" {around['eos']}:0" if "eos" in around else ""
    special = [(token, backend.token_to_id(token)) for token in around.values()]
    pair = f"{begin}$A:0{end} {begin.replace(':0', ':1')}$B:1{end.replace(':0', ':1')}"
    return processors.TemplateProcessing(single=f"{begin}$A:0{end}", pair=pair, special_tokens=special)


def _templates(header: GgufHeader) -> dict[str, str]:
    found = {}
    for key in header.values:
        name = "default" if key == _TEMPLATE else key.removeprefix(_TEMPLATE + ".")
        if key == _TEMPLATE or name != key:
            found[name] = header.text(key) or ""
    return {name: text for name, text in found.items() if text}
