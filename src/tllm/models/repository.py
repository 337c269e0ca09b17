"""From what a user calls a model to the directory that holds it.

A name is, in this order: `embedded`, the small model that comes with tllm; a directory or a GGUF file; `org/name` on
the Hugging Face hub, fetched into its cache when the `hub` extra is installed. No code of a repository is ever run or
fetched.

    resolve_model      all of it, fetched first if it has to be
    resolve_headers    all but the weights, for a head that computes nothing
    find_local         what is on this machine already

This file does not know what is in the directory.
"""

from __future__ import annotations

import contextlib
import importlib.resources
import os
from pathlib import Path, PurePath
from types import ModuleType
from typing import Final

from tllm.core.errors import ModelError
from tllm.models.hub import SMALL_FILES, fetch_headers, is_hub_name, is_offline

EMBEDDED: Final = "embedded"

# Everything that tllm reads.
HUB_FILES: Final = ("*.json", "*.safetensors", *(name for name in SMALL_FILES if name != "*.json"))


def resolve_model(name: str) -> Path:
    """The directory of a model, or its GGUF file, fetched first if it has to be.

    TLLM_OFFLINE=1 or HF_HUB_OFFLINE=1 keep it from the network: a hub model must then be in the cache. Raises
    ModelError saying what was given and what to do.
    """
    if name == EMBEDDED:
        return _embedded()
    path = Path(name).expanduser()
    if name and _is_model(path):  # the empty path would be the current directory
        return path.resolve()
    if name and path.exists():
        raise ModelError(f"{name} is a file; give the directory that holds the model's config.json, or a GGUF file.")
    if not is_hub_name(name):
        raise ModelError(
            f"There is no model {name!r}: it is neither {EMBEDDED!r}, nor an existing directory, nor a name on the hub "
            "such as Qwen/Qwen3-0.6B."
        )
    return _from_hub(name)


def resolve_headers(name: str) -> Path:
    """The directory of a model for whoever describes it and computes nothing: of a hub model only config, tokenizer
    and a manifest in the place of the weights are fetched, with or without the `hub` extra.

    Raises ModelError as `resolve_model` does.
    """
    if (local := find_local(name)) is not None:
        return local
    if not is_hub_name(name) or Path(name).expanduser().exists():
        return resolve_model(name)  # which says what is wrong with the name
    return fetch_headers(name)


def find_local(name: str) -> Path | None:
    """The directory that holds all of a model's files on this machine, the hub's cache included; None: there is none.

    Nothing is fetched and nothing raised for a name that leads nowhere.
    """
    if name == EMBEDDED:
        return _embedded()
    with contextlib.suppress(OSError, ValueError, RuntimeError):  # too long, with a NUL, of a user that is not
        path = Path(name).expanduser()
        if name and _is_model(path):
            return path.resolve()
    return _in_hub_cache(name) if is_hub_name(name) else None


def _is_model(path: Path) -> bool:
    return path.is_dir() or (path.suffix == ".gguf" and path.is_file())


def _in_hub_cache(name: str) -> Path | None:
    """The snapshot that the hub's own library keeps of the model's main revision."""
    home = os.environ.get("HF_HOME") or str(Path.home() / ".cache" / "huggingface")
    cache = Path(os.environ.get("HF_HUB_CACHE") or str(Path(home) / "hub"))
    model = cache / f"models--{name.replace('/', '--')}"
    try:
        commit = (model / "refs" / "main").read_text().strip()
    except (OSError, ValueError):
        return None
    snapshot = model / "snapshots" / commit
    return snapshot if commit and PurePath(commit).name == commit and snapshot.is_dir() else None


def _embedded() -> Path:
    try:
        directory = Path(str(importlib.resources.files("tllm.demo")))
    except ModuleNotFoundError as error:
        raise ModelError("This installation of tllm has no embedded model; give a directory or a hub name.") from error
    if not (directory / "config.json").is_file():
        raise ModelError(f"The embedded model is missing from {directory}; install tllm again.")
    return directory


def _from_hub(name: str) -> Path:
    try:
        import huggingface_hub
        from huggingface_hub import errors
    except ImportError as error:
        raise ModelError(
            f"There is no directory {name!r}. To fetch the model {name} from the Hugging Face hub, install "
            "the extra: pip install 'tllm[hub]'."
        ) from error
    offline = is_offline()
    try:
        found = huggingface_hub.snapshot_download(name, allow_patterns=list(HUB_FILES), local_files_only=offline)
    except errors.GatedRepoError as error:
        raise ModelError(
            f"The model {name} asks for its license to be accepted: do so at https://huggingface.co/{name}, then "
            "log in with `hf auth login`."
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise ModelError(
            f"There is neither a directory {name!r} nor a model of that name on the hub (or it is private: log in with "
            "`hf auth login`)."
        ) from error
    except errors.LocalEntryNotFoundError as error:
        why = "and this process is offline" if offline else "and the hub cannot be reached"
        raise ModelError(f"There is no directory {name!r}; the hub's cache does not have the model {why}.") from error
    except (_http_error(errors), errors.HFValidationError, OSError) as error:
        raise ModelError(f"The model {name} could not be fetched from the hub: {error}") from error
    return Path(found)


def _http_error(errors: ModuleType) -> type[Exception]:
    """The root of the errors of the client that the hub's library uses, which has been another one before."""
    root: type[Exception] = errors.HTTPError
    return root
