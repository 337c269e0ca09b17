"""The hub by parts, against a server on this machine that counts what it sends."""

from __future__ import annotations

import json
import re
import shutil
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.models.test_quantized import read_piece, stored_name
from tllm.cluster.shards import ShardStore
from tllm.core.errors import ModelError, TransportError
from tllm.models.checkpoint import Checkpoint
from tllm.models.headers import TensorInfo, sample_ranges
from tllm.models.hub import _cut, _runs, open_on_hub
from tllm.models.repository import find_local, resolve_headers
from tllm.models.spec import Shard
from tllm.testing.checkpoints import tiny_checkpoint
from tllm.testing.quantized import quantized_checkpoint
from tllm.text.tokenizer import Tokenizer
from tllm.transport import wire_pb2 as pb

DATA = bytes(range(251)) * 17_000
COMMIT = "c0ffee" * 6 + "abcd"


class QuietServer(ThreadingHTTPServer):
    def handle_error(self, request: object, client_address: object) -> None:
        """A client that closes its connections is no error."""


class Hub:
    """One repository, `org/name`, as the hub serves it: small files itself, weights from a second address."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.commit = COMMIT
        self.ranges = True
        self.short_by = 0
        self.token = ""
        self.sent: dict[str, int] = {}
        self.tokens_elsewhere: list[str] = []
        self.num_resolved = 0
        self._lock = threading.Lock()
        self._servers = [QuietServer(("127.0.0.1", 0), self._handler(place)) for place in ("hub", "elsewhere")]
        self._threads = [threading.Thread(target=server.serve_forever, args=(0.01,)) for server in self._servers]
        for thread in self._threads:
            thread.start()

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self._servers[0].server_port}"

    @property
    def weights_sent(self) -> int:
        return sum(size for name, size in self.sent.items() if name.endswith(".safetensors"))

    def close(self) -> None:
        for server in self._servers:
            server.shutdown()
            server.server_close()
        for thread in self._threads:
            thread.join()

    def _handler(self, place: str) -> type[BaseHTTPRequestHandler]:
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                token = self.headers.get("Authorization", "")
                if place == "elsewhere":
                    hub.tokens_elsewhere.append(token)
                elif hub.token and token != f"Bearer {hub.token}":
                    self.answer(401, b"")
                    return
                if self.path == "/api/models/org/name/revision/main":
                    siblings = [{"rfilename": path.name} for path in hub.directory.iterdir()]
                    siblings += [{"rfilename": "../../evil.json"}, {"rfilename": "sub/config.json"}]
                    self.answer(200, json.dumps({"sha": hub.commit, "siblings": siblings}).encode())
                    return
                match = re.fullmatch(rf"/org/name/resolve/{hub.commit}/([\w.-]+)", self.path)
                if match is None or not (hub.directory / match[1]).is_file():
                    self.answer(404, b"")
                elif place == "hub" and match[1].endswith(".safetensors"):
                    with hub._lock:
                        hub.num_resolved += 1
                    there = f"http://localhost:{hub._servers[1].server_port}{self.path}"
                    self.answer(302, b"", {"Location": there})
                else:
                    self.send_file(match[1], (hub.directory / match[1]).read_bytes())

            def send_file(self, name: str, data: bytes) -> None:
                part = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
                if part is None or not hub.ranges:
                    self.answer(200, data, count=name)
                    return
                begin, end = int(part[1]), min(int(part[2]) + 1, len(data))
                headers = {"Content-Range": f"bytes {begin}-{end - 1}/{len(data)}"}
                self.answer(206, data[begin : max(begin, end - hub.short_by)], headers, count=name)

            def answer(self, status: int, body: bytes, headers: dict[str, str] | None = None, count: str = "") -> None:
                with hub._lock:
                    hub.sent[count] = hub.sent.get(count, 0) + len(body)
                try:
                    self.send_response(status)
                    for name, value in (headers or {}).items():
                        self.send_header(name, value)
                    self.send_header("Content-Length", str(len(body)))
                    self.end_headers()
                    self.wfile.write(body)
                except ConnectionError:
                    self.close_connection = True

            def log_message(self, format: str, *args: object) -> None:
                pass

        return Handler


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    hub = Hub(tiny_checkpoint(tmp_path / "repository", layers=6, hidden_size=128))
    monkeypatch.setenv("HF_ENDPOINT", hub.endpoint)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    for variable in ("HF_TOKEN", "HF_HUB_CACHE", "TLLM_OFFLINE", "HF_HUB_OFFLINE", "HTTP_PROXY", "http_proxy"):
        monkeypatch.delenv(variable, raising=False)
    yield hub
    hub.close()


def load_of(checkpoint: Checkpoint, layers: tuple[int, int]) -> pb.Load:
    return pb.Load(
        model="org/name",
        fingerprint=checkpoint.fingerprint,
        first_layer=layers[0],
        last_layer=layers[1],
        dtype="float32",
    )


def test_a_model_on_the_hub_is_the_one_in_a_directory(hub: Hub) -> None:
    local = Checkpoint.open(hub.directory)
    opened = open_on_hub("org/name").checkpoint
    assert opened.fingerprint == local.fingerprint
    assert opened.spec == local.spec
    headers = sum(8 + int.from_bytes(path.read_bytes()[:8], "little") for path in hub.directory.glob("*.safetensors"))
    assert hub.weights_sent < headers + 64 * 1024 * len(local.tensors)
    assert hub.num_resolved <= 16 + 3  # addresses are remembered, though the first requests come at once


async def test_only_the_bytes_of_the_shard_come_from_the_hub(hub: Hub, tmp_path: Path) -> None:
    local = Checkpoint.open(hub.directory)
    open_on_hub("org/name")
    looking = hub.weights_sent
    hub.sent.clear()
    store = ShardStore(tmp_path / "store")
    load = load_of(local, (2, 4))
    path, fetched = await store.provide(load, None, lambda done, total: None)
    needed = local.needed(Shard(first_layer=2, last_layer=4, embed=False, head=False))
    size = sum(local.tensors[name].num_bytes for name in needed)
    assert fetched == size
    assert hub.weights_sent <= looking + size
    opened = Checkpoint.open(Path(path))
    for name in needed:
        ours, theirs = opened.tensors[name], local.tensors[name]
        expected = theirs.file.read_bytes()[theirs.offset : theirs.offset + theirs.num_bytes]
        assert ours.file.read_bytes() == expected
    hub.sent.clear()
    assert await store.provide(load, None, lambda done, total: None) == (path, 0)
    assert not hub.sent


async def test_of_a_quantized_weight_all_tensors_come(hub: Hub, tmp_path: Path) -> None:
    hub.directory = tmp_path / "awq"
    weights = quantized_checkpoint(hub.directory, "awq", layers=2, hidden_size=64, intermediate_size=128)
    load = load_of(Checkpoint.open(hub.directory), (1, 2))
    path, fetched = await ShardStore(tmp_path / "store").provide(load, None, lambda done, total: None)
    opened = Checkpoint.open(Path(path))
    pieces = opened.slices(Shard(first_layer=1, last_layer=2, embed=False, head=False))
    assert fetched == sum(piece.num_bytes for piece in pieces)
    for piece in pieces:
        expected = weights[stored_name(piece.target)]
        np.testing.assert_allclose(read_piece(opened, piece), expected, rtol=1e-6, atol=1e-6)


async def test_a_model_that_changed_on_the_hub_is_not_mixed_with_what_is_served(hub: Hub, tmp_path: Path) -> None:
    served = Checkpoint.open(hub.directory)
    hub.directory = tiny_checkpoint(tmp_path / "finetune", layers=6, hidden_size=128, seed=1)
    store = ShardStore(tmp_path / "store")
    with pytest.raises(TransportError, match="the hub: org/name is another checkpoint there now"):
        await store.provide(load_of(served, (0, 1)), None, lambda done, total: None)


def test_a_head_that_computes_nothing_gets_all_but_the_weights(hub: Hub, tmp_path: Path) -> None:
    directory = resolve_headers("org/name")
    assert directory == tmp_path / "state" / "tllm" / "hub" / "org--name" / COMMIT
    assert Checkpoint.open(directory).fingerprint == Checkpoint.open(hub.directory).fingerprint
    tokenizer = Tokenizer.load(directory)
    assert tokenizer.encode("ab", add_special_tokens=False) == Tokenizer.load(hub.directory).encode(
        "ab", add_special_tokens=False
    )
    names = {path.name for path in directory.iterdir()}
    assert {"config.json", "tokenizer.json"} <= names
    assert not any(".safetensors" in name for name in names)
    assert not list(tmp_path.rglob("evil.json"))


def test_when_the_hub_is_gone_the_last_headers_do(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setenv("TLLM_OFFLINE", "1")
        with pytest.raises(ModelError, match="this process is offline"):
            resolve_headers("org/name")
        assert not hub.sent
    directory = resolve_headers("org/name")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    hub.sent.clear()
    assert resolve_headers("org/name") == directory
    assert not hub.sent


def test_a_server_that_ignores_ranges_is_noticed_before_its_body_is_read(hub: Hub) -> None:
    hub.ranges = False
    with pytest.raises(ModelError, match=r"does not serve parts of files.*pip install 'tllm\[hub\]'"):
        open_on_hub("org/name")


def test_a_short_answer_is_no_answer(hub: Hub) -> None:
    opened = open_on_hub("org/name")
    hub.short_by = 1
    with pytest.raises(ModelError, match=r"1 bytes of .* too few"):
        list(opened.read(next(iter(opened.checkpoint.tensors)), 0))


def test_a_token_goes_to_the_hub_and_nowhere_else(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.token = "secret"
    with pytest.raises(ModelError, match="set HF_TOKEN"):
        open_on_hub("org/name")
    monkeypatch.setenv("HF_TOKEN", "secret")
    open_on_hub("org/name")
    assert set(hub.tokens_elsewhere) == {""}


def test_an_unknown_model_is_said_to_be(hub: Hub) -> None:
    with pytest.raises(ModelError, match="neither a directory 'org/other' nor a model of that name on the hub"):
        open_on_hub("org/other")


def test_a_repository_of_gguf_files_is_said_to_be_one(hub: Hub, tmp_path: Path) -> None:
    hub.directory = tmp_path / "gguf"
    hub.directory.mkdir()
    (hub.directory / "model-Q4_K_M.gguf").write_bytes(b"GGUF")
    with pytest.raises(ModelError, match=r"download one of them \(model-Q4_K_M.gguf\) and give its path"):
        open_on_hub("org/name")


def test_a_hub_that_is_not_there_is_said_not_to_be(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(ModelError, match=r"could not be fetched from http://127\.0\.0\.1:9"):
        open_on_hub("org/name")


def test_the_hubs_own_cache_is_found_without_its_library(hub: Hub, tmp_path: Path) -> None:
    assert find_local("org/name") is None
    model = tmp_path / "cache" / "hub" / "models--org--name"
    (model / "refs").mkdir(parents=True)
    (model / "refs" / "main").write_text(COMMIT)
    shutil.copytree(hub.directory, model / "snapshots" / COMMIT)
    assert find_local("org/name") == model / "snapshots" / COMMIT
    assert resolve_headers("org/name") == model / "snapshots" / COMMIT
    (model / "refs" / "main").write_text("../../..")
    assert find_local("org/name") is None
    assert not hub.sent


@given(st.lists(st.tuples(st.integers(0, 100_000), st.integers(0, 100_000)), max_size=20))
def test_samples_are_found_again_in_the_runs_they_are_fetched_in(layout: list[tuple[int, int]]) -> None:
    infos, position = [], 100
    for gap, size in layout:
        infos.append(TensorInfo(file=Path("f"), dtype="U8", shape=(size,), offset=position + gap, num_bytes=size))
        position += gap + size
    ranges = sample_ranges(infos)
    for info in infos:
        own = [part for part in ranges if info.offset <= part.start and part.stop <= info.offset + info.num_bytes]
        assert info.num_bytes == 0 or any(part.start == info.offset for part in own)
        assert info.num_bytes == 0 or any(part.stop == info.offset + info.num_bytes for part in own)
    runs = {run: DATA[run.start : run.stop] for run in _runs(ranges)}
    assert len(runs) <= max(1, len(ranges))
    assert [_cut(runs, part) for part in ranges] == [DATA[part.start : part.stop] for part in ranges]
