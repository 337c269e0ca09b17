"""Tokenizers small enough to train in a test, saved as checkpoints save them, and the oracle's reading of each.

Knows no template.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import transformers
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors, trainers
from tokenizers import Tokenizer as Backend

from tllm.text.tokenizer import Tokenizer

_LINES = [
    "The quick brown fox jumps over the lazy dog, and the dog does not mind.",
    "Many machines hold one model; each holds a run of its layers.",
    "Viele Maschinen tragen ein Modell. Größe, Straße, übermäßig.",
    "多台机器共同运行一个模型。\t\n  spaces   and\n\nlines",
    "def f(x):\n    return x ** 2  # ça va? 😀 👩‍👩‍👧 é é",
] * 4
_SPECIAL = ["<unk>", "<s>", "</s>", "<|end|>"]


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    directory: Path
    ours: Tokenizer
    theirs: transformers.PreTrainedTokenizerBase


def byte_level() -> Backend:
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.train_from_iterator(
        _LINES,
        trainers.BpeTrainer(
            vocab_size=400,
            show_progress=False,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            special_tokens=_SPECIAL,
        ),
    )
    backend.add_tokens([AddedToken("<tool>", special=False), AddedToken("é", special=False)])
    return backend


def byte_level_with_bos() -> Backend:
    backend = byte_level()
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    backend.enable_truncation(max_length=4)
    backend.enable_padding(length=16)
    return backend


def byte_fallback() -> Backend:
    """As Llama's first tokenizers: BPE over metaspace, bytes for what the vocabulary lacks."""
    byte_tokens = [f"<0x{byte:02X}>" for byte in range(256)]
    trained = Backend(models.BPE(unk_token="<unk>"))
    trained.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    trained.train_from_iterator(
        _LINES[:2], trainers.BpeTrainer(vocab_size=420, show_progress=False, special_tokens=_SPECIAL + byte_tokens)
    )
    model = json.loads(trained.to_str())["model"]
    merges = [tuple(merge) for merge in model["merges"]]
    backend = Backend(
        models.BPE(vocab=model["vocab"], merges=merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    )
    backend.normalizer = trained.normalizer
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in _SPECIAL])
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return backend


def unigram() -> Backend:
    backend = Backend(models.Unigram())
    backend.normalizer = normalizers.NFKC()
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Metaspace()
    backend.train_from_iterator(
        _LINES,
        trainers.UnigramTrainer(
            vocab_size=300, show_progress=False, special_tokens=_SPECIAL, unk_token="<unk>", initial_alphabet=["▁"]
        ),
    )
    return backend


def words() -> Backend:
    vocab = {token: index for index, token in enumerate([*_SPECIAL, "one", "two", "three"])}
    backend = Backend(models.WordLevel(vocab=vocab, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.add_special_tokens(_SPECIAL)
    return backend


KINDS: dict[str, Callable[[], Backend]] = {
    "byte_level": byte_level,
    "byte_level_with_bos": byte_level_with_bos,
    "byte_fallback": byte_fallback,
    "unigram": unigram,
    "words": words,
}
CONFIG = {
    "tokenizer_class": "PreTrainedTokenizerFast",
    "bos_token": "<s>",
    "eos_token": {"__type": "AddedToken", "content": "</s>", "lstrip": False, "rstrip": False, "normalized": False},
    "unk_token": "<unk>",
    "model_max_length": 4096,
    "add_bos_token": False,
    "add_eos_token": True,
    "clean_up_tokenization_spaces": False,
}


@pytest.fixture(scope="session")
def save(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Save a backend, its config and other files as a checkpoint's directory."""

    def save_one(backend: Backend, config: object = CONFIG, **files: str) -> Path:
        directory = tmp_path_factory.mktemp("checkpoint")
        backend.save(str(directory / "tokenizer.json"))
        (directory / "tokenizer_config.json").write_text(json.dumps(config))
        for name, text in files.items():
            (directory / name.replace("__", ".")).write_text(text)
        return directory

    return save_one


@pytest.fixture(scope="session")
def read_by_both() -> Callable[[Path], Checkpoint]:
    def read(directory: Path) -> Checkpoint:
        theirs = transformers.AutoTokenizer.from_pretrained(directory)
        return Checkpoint(directory=directory, ours=Tokenizer.load(directory), theirs=theirs)

    return read


@pytest.fixture(scope="session")
def checkpoints(save: Callable[..., Path], read_by_both: Callable[[Path], Checkpoint]) -> dict[str, Checkpoint]:
    found = {name: read_by_both(save(build())) for name, build in KINDS.items()}
    demo = Path(__file__).parents[2] / "src" / "tllm" / "demo"
    if (demo / "tokenizer.json").is_file():
        found["demo"] = read_by_both(demo)
    return found


@pytest.fixture(scope="session")
def plain_checkpoint(checkpoints: dict[str, Checkpoint]) -> Checkpoint:
    return checkpoints["byte_level"]
