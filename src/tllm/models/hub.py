"""Models on the Hugging Face hub by parts: headers, small files, and the byte ranges of single tensors.

    GET {HF_ENDPOINT}/api/models/{name}/revision/main        the commit and its files
    GET {HF_ENDPOINT}/{name}/resolve/{commit}/{file}         a file, or with `Range: bytes=a-b` a part of one (206)

What was opened stays at one commit. A large file's address redirects to another server; its address is remembered,
for a checkpoint is read in thousands of parts. HF_TOKEN goes to the hub alone, never along a redirect. TLLM_OFFLINE=1
or HF_HUB_OFFLINE=1 keep everything here from the network.

All of it blocks; a `HubCheckpoint` may be used from several threads.

This file does not know the hub's cache, nor who needs which tensor.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import tempfile
from collections.abc import Generator, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from fnmatch import fnmatch
from itertools import pairwise
from pathlib import Path, PurePosixPath
from typing import Final

import httpx

from tllm.core.config import state_directory
from tllm.core.errors import ModelError
from tllm.models.checkpoint import Checkpoint
from tllm.models.config import Config
from tllm.models.headers import (
    INDEX_FILE,
    SINGLE_FILE,
    HeaderFile,
    header_length,
    parse_header,
    parse_index,
    store_tensors,
)
from tllm.models.manifest import MANIFEST_FILE

DEFAULT_ENDPOINT: Final = "https://huggingface.co"

# Config and tokenizer: *.json, and the older forms.
SMALL_FILES: Final = ("*.json", "tokenizer.model", "merges.txt", "vocab.txt", "chat_template.jinja")
_NOT_KEPT: Final = ("*.safetensors.index.json", MANIFEST_FILE)

_HUB_NAME: Final = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_COMMIT: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
_MAX_SMALL_BYTES: Final = 64 << 20
_PIECE_BYTES: Final = 256 << 10
_NEAR_BYTES: Final = 32 << 10  # two ranges no further apart are cheaper as one request
_NUM_REQUESTS: Final = 16  # at once, of samples
_TIMEOUT_S: Final = 30.0


@dataclass(frozen=True, slots=True, kw_only=True)
class HubCheckpoint:
    """A checkpoint at one commit of the hub, of which only the headers and some samples were read.

    The tensors' `file` is the name of a file of the repository, not a path of this machine.
    """

    checkpoint: Checkpoint
    repository: HubRepository

    def read(self, name: str, offset: int) -> Generator[bytes]:
        """The tensor's bytes from `offset` on. Raises ModelError when the hub does not deliver them."""
        info = self.checkpoint.tensors[name]
        begin, end = info.offset + offset, info.offset + info.num_bytes
        if begin < end:
            yield from self.repository.read(info.file.name, range(begin, end))


class HubRepository:
    """One model's files at one commit."""

    def __init__(self, name: str) -> None:
        """Ask which files there are. Raises ModelError when there is no such model, or this process is offline."""
        if is_offline():
            raise ModelError(f"The model {name} would have to be fetched from the hub, and this process is offline.")
        self.name = name
        self._endpoint = (os.environ.get("HF_ENDPOINT") or DEFAULT_ENDPOINT).rstrip("/")
        token = os.environ.get("HF_TOKEN")
        self._headers = {"Authorization": f"Bearer {token}"} if token else {}
        self._places: dict[str, str] = {}  # of files whose address redirects elsewhere
        self._client = httpx.Client(
            follow_redirects=True,
            timeout=_TIMEOUT_S,
            limits=httpx.Limits(max_connections=2 * _NUM_REQUESTS),
        )
        try:
            content = json.loads(self._get_small(f"{self._endpoint}/api/models/{name}/revision/main"))
        except ValueError as error:
            raise ModelError(f"{self._endpoint} does not answer like a hub when asked for {name}.") from error
        match content:
            case {"sha": str(commit), "siblings": [*siblings]} if _COMMIT.fullmatch(commit):
                self.commit = commit
            case _:
                raise ModelError(f"{self._endpoint} does not say which files {name} has.")
        self.files = frozenset(
            file["rfilename"]
            for file in siblings
            # A hub is a stranger: it may name plain files, which become names of files here, and nothing else.
            if isinstance(file, dict)
            and isinstance(file.get("rfilename"), str)
            and PurePosixPath(file["rfilename"]).name == file["rfilename"]
        )

    def close(self) -> None:
        """Let go of the connections."""
        self._client.close()

    def get(self, file: str) -> bytes:
        """A small file as a whole. Raises ModelError."""
        return self._get_small(self._address(file))

    def size(self, file: str) -> int:
        """Of a file, from the answer to a request for its first byte. Raises ModelError."""
        with self._stream(file, range(1)) as response:
            return _total_size(response)

    def read(self, file: str, part: range) -> Iterator[bytes]:
        """The bytes `part` of a file, in pieces. Raises ModelError when the hub does not deliver exactly those."""
        left = len(part)
        try:
            with self._stream(file, part) as response:
                for piece in response.iter_raw(_PIECE_BYTES):
                    left -= len(piece)
                    if left < 0:
                        raise ModelError(f"The hub sent more of {self.name}/{file} than was asked for.")
                    yield piece
        except httpx.HTTPError as error:
            raise ModelError(self._broken(file, error)) from error
        if left:
            raise ModelError(f"The hub sent {left} bytes of {self.name}/{file} too few.")

    @contextlib.contextmanager
    def _stream(self, file: str, part: range) -> Iterator[httpx.Response]:
        """The answer to a request for part of a file, before its body is read."""
        response = self._request(file, part)
        try:
            if response.status_code == 200:
                raise ModelError(
                    f"{self._endpoint} does not serve parts of files, so that all of {self.name} would have to be "
                    "fetched. Install the extra and serve it from there: pip install 'tllm[hub]'."
                )
            if response.status_code != 206:
                raise ModelError(self._refused(response.status_code))
            if not response.headers.get("content-range", "").startswith(f"bytes {part.start}-{part.stop - 1}/"):
                raise ModelError(f"The hub sent another part of {self.name}/{file} than was asked for.")
            yield response
        finally:
            response.close()

    def _request(self, file: str, part: range) -> httpx.Response:
        asked = {"Range": f"bytes={part.start}-{part.stop - 1}", "Accept-Encoding": "identity"}
        try:
            if (place := self._places.get(file)) is not None:
                response = self._client.send(self._client.build_request("GET", place, headers=asked), stream=True)
                if response.status_code == 206:
                    return response
                response.close()  # such addresses are signed, and expire
            request = self._client.build_request("GET", self._address(file), headers=asked | self._headers)
            response = self._client.send(request, stream=True)
        except httpx.HTTPError as error:
            raise ModelError(self._broken(file, error)) from error
        if response.history:
            self._places[file] = str(response.url)
        return response

    def _get_small(self, address: str) -> bytes:
        data = bytearray()
        try:
            with self._client.stream("GET", address, headers=self._headers) as response:
                if response.status_code != 200:
                    raise ModelError(self._refused(response.status_code))
                for piece in response.iter_bytes():
                    data += piece
                    if len(data) > _MAX_SMALL_BYTES:
                        raise ModelError(f"{address} is larger than {_MAX_SMALL_BYTES} bytes.")
        except httpx.HTTPError as error:
            raise ModelError(self._broken(PurePosixPath(address).name, error)) from error
        return bytes(data)

    def _address(self, file: str) -> str:
        return f"{self._endpoint}/{self.name}/resolve/{self.commit}/{file}"

    def _refused(self, status: int) -> str:
        match status:
            case 401 | 403:
                return (
                    f"The hub does not give {self.name} to this user: accept its license at "
                    f"{self._endpoint}/{self.name} and set HF_TOKEN, or it does not exist."
                )
            case 404:
                return f"There is neither a directory {self.name!r} nor a model of that name on the hub."
            case _:
                return f"The model {self.name} could not be fetched from the hub: it answered {status}."

    def _broken(self, file: str, error: httpx.HTTPError) -> str:
        return f"{file} of the model {self.name} could not be fetched from {self._endpoint}: {error}"


def is_hub_name(name: str) -> bool:
    """Whether it looks like `org/name`."""
    return _HUB_NAME.fullmatch(name) is not None


def is_offline() -> bool:
    return any(os.environ.get(variable, "") not in ("", "0") for variable in ("TLLM_OFFLINE", "HF_HUB_OFFLINE"))


def open_on_hub(name: str) -> HubCheckpoint:
    """Read a hub model's config, headers and samples. The fingerprint is that of the same files in a directory.

    Raises ModelError when the model, the hub or the network does not have it.
    """
    repository = HubRepository(name)
    place = Path(name)
    gguf = sorted(file for file in repository.files if file.endswith(".gguf"))
    if gguf and not {SINGLE_FILE, INDEX_FILE} & repository.files:
        raise ModelError(f"{name} is GGUF files on the hub: download one of them ({gguf[0]}) and give its path.")
    if "config.json" not in repository.files:
        raise ModelError(f"{name} has no config.json on the hub, so it is not a model in the Hugging Face layout.")
    config = Config(path=f"{name}/config.json", fields=_json_object(name, repository.get("config.json")))
    placed: Mapping[str, str] = {}
    if SINGLE_FILE not in repository.files:
        if INDEX_FILE not in repository.files:
            raise ModelError(f"{name} has no safetensors on the hub; tllm reads no other format from there.")
        placed = parse_index(place / INDEX_FILE, repository.get(INDEX_FILE))
    names = sorted(set(placed.values())) or [SINGLE_FILE]
    files = [_header(repository, place / file) for file in names]
    with ThreadPoolExecutor(_NUM_REQUESTS, thread_name_prefix="hub") as requests:

        def read_samples(path: Path, ranges: list[range]) -> bytes:
            runs = list(_runs(ranges))
            bodies = requests.map(lambda run: b"".join(repository.read(path.name, run)), runs)
            found = dict(zip(runs, bodies, strict=True))
            return b"".join(_cut(found, part) for part in ranges)

        stored = store_tensors(place, placed, files, read_samples)
    return HubCheckpoint(checkpoint=Checkpoint.from_headers(place, config, stored), repository=repository)


def fetch_headers(name: str) -> Path:
    """A directory with a hub model's small files and a manifest in the place of its weights; fetched unless the same
    commit is there already. When the hub cannot be reached, the last one that was fetched does.

    Raises ModelError when there is none.
    """
    home = state_directory() / "hub" / name.replace("/", "--")
    try:
        opened = open_on_hub(name)
    except ModelError:
        with contextlib.suppress(OSError):
            commit = (home / "main").read_text().strip()
            if _COMMIT.fullmatch(commit) and (home / commit / MANIFEST_FILE).is_file():
                return home / commit
        raise
    repository = opened.repository
    target = home / repository.commit
    with contextlib.closing(repository):
        if not (target / MANIFEST_FILE).is_file():
            target.mkdir(parents=True, exist_ok=True)
            for file in sorted(repository.files):
                kept = any(fnmatch(file, pattern) for pattern in SMALL_FILES)
                if kept and not any(fnmatch(file, pattern) for pattern in _NOT_KEPT):
                    _write(target / file, repository.get(file))
            _write(target / MANIFEST_FILE, opened.checkpoint.manifest(model=name).to_bytes())  # all else is there
    _write(home / "main", repository.commit.encode())
    return target


def _header(repository: HubRepository, path: Path) -> HeaderFile:
    size = repository.size(path.name)
    start = b"".join(repository.read(path.name, range(min(8, size)))) if size else b""
    length = header_length(path, start, size)
    header = b"".join(repository.read(path.name, range(8, 8 + length))) if length else b""
    return HeaderFile(path=path, num_bytes=size, header=header, tensors=parse_header(path, header, size))


def _runs(ranges: list[range]) -> Iterator[range]:
    """Ranges that touch or nearly do, as one. They come ascending."""
    if not ranges:
        return
    start = ranges[0].start
    for part, following in pairwise(ranges):
        if following.start - part.stop > _NEAR_BYTES:
            yield range(start, part.stop)
            start = following.start
    yield range(start, ranges[-1].stop)


def _cut(found: Mapping[range, bytes], part: range) -> bytes:
    run = next(run for run in found if run.start <= part.start and part.stop <= run.stop)
    return found[run][part.start - run.start : part.stop - run.start]


def _total_size(response: httpx.Response) -> int:
    total = response.headers.get("content-range", "").rpartition("/")[2]
    if not total.isdecimal():
        raise ModelError(f"{response.url.host} does not say how large {PurePosixPath(response.url.path).name} is.")
    return int(total)


def _json_object(name: str, data: bytes) -> dict[str, object]:
    try:
        content = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise ModelError(f"{name}/config.json is not JSON: {error}.") from error
    if not isinstance(content, dict):
        raise ModelError(f"{name}/config.json is not a JSON object.")
    return content


def _write(path: Path, data: bytes) -> None:
    """Whole or not at all."""
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    with os.fdopen(descriptor, "wb") as file:
        file.write(data)
    os.replace(temporary, path)
