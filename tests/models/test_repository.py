"""Names of models: the embedded one, directories, and the hub."""

from __future__ import annotations

import sys
from fnmatch import fnmatch
from pathlib import Path

import pytest

from tllm.core.errors import ModelError
from tllm.models import repository
from tllm.models.repository import resolve_model


def put_in_cache(home: Path, name: str) -> Path:
    """A model as the hub's library keeps it."""
    root = home / "hub" / f"models--{name.replace('/', '--')}"
    snapshot = root / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    (root / "refs").mkdir()
    (root / "refs" / "main").write_text("0" * 40)
    (snapshot / "config.json").write_text("{}")
    return snapshot


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache of the hub, and no network."""
    from huggingface_hub import constants

    monkeypatch.setenv("TLLM_OFFLINE", "1")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path


def test_a_directory_is_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "org" / "name").mkdir(parents=True)
    assert resolve_model(str(tmp_path)) == tmp_path
    monkeypatch.chdir(tmp_path)
    assert resolve_model("org/name") == tmp_path / "org" / "name"
    monkeypatch.setenv("HOME", str(tmp_path))
    assert resolve_model("~/org") == tmp_path / "org"


def test_embedded_is_the_directory_of_the_data_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(repository.importlib.resources, "files", lambda package: {"tllm.demo": tmp_path}[package])
    with pytest.raises(ModelError, match=r"embedded model is missing from .*; install tllm again"):
        resolve_model("embedded")
    (tmp_path / "config.json").write_text("{}")
    assert resolve_model("embedded") == tmp_path


def test_a_file_is_refused_with_what_to_give_instead(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(ModelError, match="is a file; give the directory"):
        resolve_model(str(tmp_path / "model.safetensors"))


@pytest.mark.parametrize(
    "name", ["", "nowhere", "/no/where", "./org/name", "a/b/c", "https://huggingface.co/a/b", "../x"]
)
def test_what_is_neither_a_directory_nor_a_name_says_what_would_be(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ModelError, match=r"There is no model .*: it is neither 'embedded', nor an existing directory"):
        resolve_model(name)


def test_a_model_in_the_hubs_cache_is_found_offline(hub: Path) -> None:
    snapshot = put_in_cache(hub, "org/name")
    assert resolve_model("org/name") == snapshot


@pytest.mark.parametrize("variable", ["TLLM_OFFLINE", "HF_HUB_OFFLINE"])
def test_a_model_that_is_not_in_the_cache_is_not_sought_offline(
    variable: str, hub: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("TLLM_OFFLINE")
    monkeypatch.setenv(variable, "1")
    with pytest.raises(ModelError, match="cache does not have the model and this process is offline"):
        resolve_model("org/name")


@pytest.mark.parametrize(("offline", "expected"), [("1", True), ("0", False), ("", False)])
def test_only_data_is_asked_of_the_hub_and_nothing_when_offline(
    offline: str, expected: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[str, dict[str, object]]] = []

    def snapshot_download(name: str, **options: object) -> str:
        asked.append((name, options))
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    monkeypatch.setenv("TLLM_OFFLINE", offline)
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    assert resolve_model("org/name-1.5") == tmp_path
    [(name, options)] = asked
    assert name == "org/name-1.5"
    assert options == {"allow_patterns": list(repository.HUB_FILES), "local_files_only": expected}
    patterns = repository.HUB_FILES
    assert not any(fnmatch(file, pattern) for pattern in patterns for file in ("modeling.py", "model.bin", "a.pt"))


@pytest.mark.parametrize(
    ("error", "message"),
    [
        ("GatedRepoError", "asks for its license to be accepted: do so at https://huggingface.co/org/name"),
        ("RepositoryNotFoundError", "neither a directory 'org/name' nor a model of that name on the hub"),
        ("HfHubHTTPError", "org/name could not be fetched from the hub: broken"),
    ],
)
def test_what_the_hub_refuses_is_said_in_our_words(error: str, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import errors

    def snapshot_download(name: str, **options: object) -> str:
        kind = getattr(errors, error)
        # Made without its constructor, which wants the response of the HTTP client of the day.
        raised = kind.__new__(kind, "broken")
        raised.args = ("broken",)
        raised.server_message = None
        raise raised

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    with pytest.raises(ModelError) as caught:
        resolve_model("org/name")
    assert message in str(caught.value)


def test_without_the_extra_a_hub_name_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ModelError, match=r"no directory 'org/name'.*pip install 'tllm\[hub\]'"):
        resolve_model("org/name")
