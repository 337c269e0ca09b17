"""A checkpoint's tokenizer: strings to ids and back, the special tokens, the chat templates it carries.

Read from the checkpoint's directory, as transformers reads it:

* tokenizer.json (required) is followed to the letter, whatever class the config names: some of transformers' classes
  (LlamaTokenizer with `legacy`, say) rebuild a part of it. Its post-processor alone decides what `add_special_tokens`
  adds; `add_bos_token` and `add_eos_token` of tokenizer_config.json do not count beside it. Truncation and padding
  stored in it are switched off.
* tokenizer_config.json: the named special tokens (`bos_token`, ...), `added_tokens_decoder`, extra special tokens,
  `chat_template`. Special tokens that tokenizer.json lacks are added to it. special_tokens_map.json is read if
  the config has no `added_tokens_decoder`.
* chat_template.jinja and additional_chat_templates/*.jinja replace the config's templates; chat_template.json is read
  where there is no other.

A GGUF file has a tokenizer of its own (`gguf_tokenizer.py`); a tokenizer.json beside it goes before that.

This file does not know how a template is rendered, nor what a model is.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Final

import tokenizers

from tllm.core.errors import ModelError, RequestError
from tllm.core.types import TokenId
from tllm.models.gguf_file import find_gguf
from tllm.text.gguf_tokenizer import read_gguf_tokenizer
from tllm.text.spelling import Spelling

_NAMED_TOKENS: Final = (
    "bos_token",
    "eos_token",
    "unk_token",
    "sep_token",
    "pad_token",
    "cls_token",
    "mask_token",
)
_DEFAULT_TEMPLATE: Final = "default"
_TOOL_TEMPLATE: Final = "tool_use"
# Of no use to a client, and either long or about the machine the checkpoint was made on.
_PRIVATE_FIELDS: Final = frozenset({"added_tokens_decoder", "name_or_path", "auto_map", "init_inputs"})


class Tokenizer:
    """Strings to ids and back. Immutable, except for caches; may be used from several threads.

    `special_tokens` maps names (`bos_token`, ...) to their text, as templates see them. `bos_id` and `eos_id` are the
    ids of the first two, None where the checkpoint names none. `vocab_size` is one more than the greatest id.
    """

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        *,
        config: Mapping[str, object],
        special_tokens: Mapping[str, str],
        templates: Mapping[str, str],
    ) -> None:
        """`backend` belongs to the tokenizer from now on. Raises ModelError for a decoder that is not supported."""
        backend.no_truncation()
        backend.no_padding()
        self._backend = backend
        self._config = config
        self.spelling = Spelling(backend)
        self.special_tokens = dict(special_tokens)
        self.special_ids: frozenset[TokenId] = self.spelling.special_ids
        self.vocab_size = max(backend.get_vocab(with_added_tokens=True).values(), default=-1) + 1
        self.bos_token = special_tokens.get("bos_token")
        self.eos_token = special_tokens.get("eos_token")
        self.bos_id = self._id(self.bos_token)
        self.eos_id = self._id(self.eos_token)
        self.chat_template = templates.get(_DEFAULT_TEMPLATE)
        self.tool_template = templates.get(_TOOL_TEMPLATE)  # used instead when a request has tools

    @classmethod
    def load(cls, directory: Path) -> Tokenizer:
        """Read the tokenizer of a checkpoint's directory or GGUF file.

        Raises ModelError naming the file that is missing or wrong.
        """
        if (gguf := find_gguf(directory)) is not None:
            if not (gguf.parent / "tokenizer.json").is_file():
                made = read_gguf_tokenizer(gguf)
                return cls(
                    made.backend, config=made.config, special_tokens=made.special_tokens, templates=made.templates
                )
            directory = gguf.parent
        path = directory / "tokenizer.json"
        if not path.is_file():
            has_sentencepiece = (directory / "tokenizer.model").is_file()
            raise ModelError(
                f"{path} does not exist."
                + (" Only a SentencePiece tokenizer.model is there;" if has_sentencepiece else "")
                + " Save the tokenizer as tokenizer.json (transformers: AutoTokenizer.from_pretrained(...)"
                ".save_pretrained(...))."
            )
        backend = _backend(path)
        config = _object(directory / "tokenizer_config.json")
        if "added_tokens_decoder" not in config:
            config |= _object(directory / "special_tokens_map.json")
        try:
            special_tokens = _add_tokens(backend, config)
        except (TypeError, ValueError) as error:
            raise ModelError(f"{directory / 'tokenizer_config.json'}: a special token is malformed: {error}") from error
        return cls(backend, config=config, special_tokens=special_tokens, templates=_templates(directory, config))

    def encode(self, text: str, *, add_special_tokens: bool) -> tuple[TokenId, ...]:
        """Ids of `text`. The text of a special token within it becomes that token.

        `add_special_tokens` adds what the checkpoint's post-processor adds (begin of sequence, usually). A rendered
        chat template already holds them. Raises RequestError for text that is not Unicode (an unpaired surrogate).
        """
        try:
            return tuple(map(TokenId, self._backend.encode(text, add_special_tokens=add_special_tokens).ids))
        except (TypeError, UnicodeEncodeError) as error:
            bad = next((index for index, char in enumerate(text) if "\ud800" <= char <= "\udfff"), None)
            if bad is None:
                raise
            raise RequestError(
                f"The text has an unpaired surrogate, \\u{ord(text[bad]):04x}, at character {bad}: half of a character "
                "that was cut in two. Send whole Unicode characters.",
                code="invalid_unicode",
            ) from error

    def decode(self, ids: Iterable[TokenId], *, skip_special_tokens: bool) -> str:
        """The text of `ids`; see `spelling.py` for bytes that are not UTF-8. Ids without a token have no text.

        Spaces are never "cleaned up", whatever `clean_up_tokenization_spaces` says.
        """
        return self.spelling.text(map(self._checked, ids), skip_special_tokens=skip_special_tokens)

    def token_bytes(self, token: TokenId) -> bytes:
        """The bytes that `token`, special or not, adds to a text: maybe a part of a character, maybe none."""
        return self.spelling.token_bytes(self._checked(token))

    def token_text(self, token: TokenId) -> str:
        r"""`token_bytes` for people and for log-probabilities: text, or `bytes:\xe2\x80` where they are not UTF-8.

        So different tokens have different texts, and can be keys of one JSON object, except where a vocabulary spells
        one text in two ways.
        """
        data = self.token_bytes(token)
        try:
            return data.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)

    def token_id(self, piece: str) -> TokenId | None:
        """The id of a vocabulary entry (`"<|im_end|>"`), or None."""
        return self._id(piece)

    def info(self) -> dict[str, object]:
        """The tokenizer as JSON for clients: tokenizer_config.json with special tokens as plain strings."""
        kept = {key: value for key, value in self._config.items() if key not in _PRIVATE_FIELDS}
        return {
            **kept,
            "bos_token": None,
            "eos_token": None,
            **self.special_tokens,
            "bos_token_id": self.bos_id,
            "eos_token_id": self.eos_id,
            "tokenizer_class": self._config.get("tokenizer_class", "PreTrainedTokenizerFast"),
            "model_max_length": self._config.get("model_max_length"),
            "chat_template": self.chat_template,
            "vocab_size": self.vocab_size,
        }

    def _id(self, piece: str | None) -> TokenId | None:
        token = None if piece is None else self._backend.token_to_id(piece)
        return None if token is None else TokenId(token)

    def _checked(self, token: TokenId) -> TokenId:
        if not 0 <= token < 2**32:  # what the backend's id type can hold
            raise RequestError(f"{token} is not a token id; ids are 0 to {self.vocab_size - 1}.", param="tokens")
        return token


def _backend(path: Path) -> tokenizers.Tokenizer:
    text = _read(path)
    try:
        return tokenizers.Tokenizer.from_str(text)
    except Exception as error:
        # The library raises Exception itself for whatever it cannot parse, and nothing narrower.
        if type(error) is not Exception:
            raise
        raise ModelError(f"{path} is not a tokenizer: {error}") from error


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ModelError(f"{path} cannot be read: {error}") from error


def _object(path: Path) -> dict[str, object]:
    """The JSON object in `path`; empty if there is no such file."""
    if not path.is_file():
        return {}
    try:
        value = json.loads(_read(path))
    except ValueError as error:
        raise ModelError(f"{path} is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise ModelError(f"{path} holds a JSON {type(value).__name__}, an object is needed.")
    return value


def _added_token(value: object) -> tokenizers.AddedToken | None:
    """A special token as configs spell it: a string, or an object with `content` and flags; None for neither."""
    match value:
        case str():
            return tokenizers.AddedToken(value, special=True)
        case {"content": str(content), **flags}:
            known = {name: bool(flags[name]) for name in ("single_word", "lstrip", "rstrip") if name in flags}
            special = bool(flags.get("special", True))
            normalized = bool(flags.get("normalized", not special))
            return tokenizers.AddedToken(content, special=special, normalized=normalized, **known)
        case _:
            return None


def _add_tokens(backend: tokenizers.Tokenizer, config: Mapping[str, object]) -> dict[str, str]:
    """Add the config's tokens that `backend` lacks, in transformers' order. Returns the named ones, name to text."""
    named: dict[str, tokenizers.AddedToken] = {}
    extra: list[tokenizers.AddedToken] = []
    specific = [name for name in config if name.endswith("_token") and name not in _NAMED_TOKENS]
    for name in (*_NAMED_TOKENS, *specific):
        if token := _added_token(config.get(name)):
            named[name] = token
    if backend.padding is not None and "pad_token" not in config:
        named["pad_token"] = tokenizers.AddedToken(backend.padding["pad_token"], special=True)
    match config.get("extra_special_tokens") or config.get("additional_special_tokens"):
        case dict(by_name):
            named |= {name: token for name, value in by_name.items() if (token := _added_token(value))}
        case list(values):
            extra = [token for value in values if (token := _added_token(value))]

    present = backend.get_added_tokens_decoder().values()
    known = {repr(token) for token in present}
    missing: list[tokenizers.AddedToken] = []
    match config.get("added_tokens_decoder"):
        case dict(by_id):
            tokens = [(int(index), _added_token(value)) for index, value in by_id.items()]
            missing = [
                token for _, token in sorted(tokens, key=lambda pair: pair[0]) if token and repr(token) not in known
            ]
    contents = {token.content for token in (*present, *missing)}
    for token in (*named.values(), *extra):
        if token.content not in contents:
            token.special = True
            missing.append(token)
            contents.add(token.content)
    if missing:
        backend.add_tokens(missing)
    return {name: token.content for name, token in named.items()}


def _templates(directory: Path, config: Mapping[str, object]) -> dict[str, str]:
    """The checkpoint's chat templates by name."""
    files = {path.stem: _read(path) for path in sorted((directory / "additional_chat_templates").glob("*.jinja"))}
    default = directory / "chat_template.jinja"
    if default.is_file():
        files[_DEFAULT_TEMPLATE] = _read(default)
    if files:
        return files
    source = directory / "tokenizer_config.json"
    value = config.get("chat_template")
    if value is None:
        source = directory / "chat_template.json"
        value = _object(source).get("chat_template")
    match value:
        case None:
            return {}
        case str():
            return {_DEFAULT_TEMPLATE: value}
        case list():
            pairs = [(entry.get("name"), entry.get("template")) for entry in value if isinstance(entry, dict)]
        case dict():
            pairs = list(value.items())
        case _:
            pairs = [(None, None)]
    templates = {name: text for name, text in pairs if isinstance(name, str) and isinstance(text, str)}
    if len(templates) != len(pairs):
        raise ModelError(f"{source}: chat_template must be a string or a list of objects with name and template.")
    return templates
