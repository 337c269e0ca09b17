"""The files of a machine's shard store: blobs named by their content, manifests that name blobs, locks, and garbage.

    blobs/<sha256>                  a whole tensor's bytes
    blobs/<sha256>.part             the beginning of one; locked by whoever writes it
    manifests/<fingerprint>.json    a checkpoint without its weights (models/manifest.py); its mtime is its last use
    hashes/<key>.jsonl              hashes of tensors in files elsewhere on this machine
    lock                            shared by whoever fills the store, exclusive to whoever removes from it

Rules:
    A name never comes from a peer: only 64 hex digits become names of files.
    A blob has its name only once its bytes were hashed. Nothing is synced to disk: after a power cut a blob may be
    shorter than its tensor, and so only one of the full length counts as there. The length is on disk no sooner than
    the bytes are (ext4's ordered mode, and XFS, APFS and btrfs alike), and whoever lost it fetches it again.

This file does not know networks, nor who needs which tensor.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import hashlib
import json
import os
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

from tllm.core.config import state_directory
from tllm.core.errors import EngineError, ModelError
from tllm.models.headers import TensorInfo
from tllm.models.manifest import BLOBS, MANIFESTS, Manifest, is_hash

PART_SUFFIX: Final = ".part"
POLL_S: Final = 0.05  # between two looks at a lock: locks between processes cannot be awaited

_HASHES: Final = "hashes"
_READ_BYTES: Final = 1 << 20
_FRESH_S: Final = 24 * 3600.0  # that garbage is left alone: a part may be resumed, a new blob yet be named


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredCheckpoint:
    """What the store holds of one checkpoint."""

    fingerprint: str
    model: str
    held_bytes: int
    total_bytes: int
    used: float  # seconds since the epoch, at the last use


@dataclass(frozen=True, slots=True, kw_only=True)
class Garbage:
    """What may go, and what that frees."""

    files: tuple[Path, ...]
    num_bytes: int


def default_store() -> Path:
    """One for all clusters and agents of this user on this machine."""
    return state_directory() / "shards"


class StoreFiles:
    """One store. Safe for several processes and tasks at once; methods that are not async touch the disk briefly."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._manifests: dict[str, tuple[tuple[int, int, int], Manifest]] = {}

    def prepare(self) -> None:
        """Make the directories. Raises EngineError when that is impossible."""
        try:
            for path in (self.directory, *(self.directory / name for name in (BLOBS, MANIFESTS, _HASHES))):
                path.mkdir(parents=True, exist_ok=True, mode=0o700)
        except OSError as error:
            raise disk_error(self.directory, error) from error

    def blob(self, sha256: str) -> Path:
        assert is_hash(sha256)
        return self.directory / BLOBS / sha256

    def part(self, sha256: str) -> Path:
        assert is_hash(sha256)
        return self.directory / BLOBS / f"{sha256}{PART_SUFFIX}"

    def holds(self, sha256: str, num_bytes: int) -> bool:
        """Whether the whole blob is there."""
        try:
            return bool(sha256) and self.blob(sha256).stat().st_size == num_bytes
        except OSError:
            return False

    # ------------------------------------------------------------------------------------------- manifests

    def manifest_path(self, fingerprint: str) -> Path:
        assert is_hash(fingerprint)
        return self.directory / MANIFESTS / f"{fingerprint}.json"

    def manifest(self, fingerprint: str) -> Manifest | None:
        """None when there is none, or one that cannot be read: it is only a record of what can be asked again."""
        path = self.manifest_path(fingerprint)
        try:
            status = path.stat()
            key = (status.st_mtime_ns, status.st_ino, status.st_size)
            known = self._manifests.get(fingerprint)
            if known is None or known[0] != key:
                known = self._manifests[fingerprint] = (key, Manifest.read(path))
        except (OSError, ModelError):
            return None
        return known[1] if known[1].fingerprint == fingerprint else None

    def merge(self, manifest: Manifest) -> None:
        """Keep the manifest and the hashes in it beside those that are known already; that is its last use.

        Raises EngineError when the disk refuses.
        """
        path = self.manifest_path(manifest.fingerprint)
        try:
            with _locked(self.directory / MANIFESTS / "lock", fcntl.LOCK_EX):
                old = self.manifest(manifest.fingerprint)
                tensors = {
                    name: tensor if tensor.sha256 or old is None else replace(tensor, sha256=_known(old, name))
                    for name, tensor in manifest.tensors.items()
                }
                new = replace(manifest, tensors=tensors)
                if new == old:
                    os.utime(path)
                    return
                temporary = path.with_suffix(f".{os.getpid()}.new")
                temporary.write_bytes(new.to_bytes())
                os.replace(temporary, path)
        except OSError as error:
            raise disk_error(self.directory, error) from error

    # ---------------------------------------------------------------------------------------------- locks

    @contextlib.asynccontextmanager
    async def filling(self) -> AsyncIterator[None]:
        """While it lasts nothing is removed from the store."""
        descriptor = os.open(self.directory / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            while not _try_lock(descriptor, fcntl.LOCK_SH):  # noqa: ASYNC110  (the lock is between processes)
                await asyncio.sleep(POLL_S)
            yield
        finally:
            os.close(descriptor)

    def open_part(self, path: Path) -> int | None:
        """A descriptor of the part, made where there is none, locked until it is closed; None while another has it.

        Raises EngineError when the disk refuses.
        """
        while True:
            try:
                descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            except OSError as error:
                raise disk_error(path.parent, error) from error
            if not _try_lock(descriptor, fcntl.LOCK_EX):
                os.close(descriptor)
                return None
            # Whoever had it before may have finished: then this descriptor is of a file that has its name no more.
            with contextlib.suppress(OSError):
                if os.fstat(descriptor).st_ino == path.stat().st_ino:
                    return descriptor
            os.close(descriptor)

    # -------------------------------------------------------------------------------------------- garbage

    def checkpoints(self) -> tuple[StoredCheckpoint, ...]:
        """What the store holds, last used first."""
        found = []
        for path in self._files(MANIFESTS, ".json"):
            manifest = self.manifest(path.stem) if is_hash(path.stem) else None
            if manifest is None:
                continue
            blobs = {tensor.sha256: tensor.num_bytes for tensor in manifest.tensors.values() if tensor.sha256}
            found.append(
                StoredCheckpoint(
                    fingerprint=manifest.fingerprint,
                    model=manifest.model,
                    held_bytes=sum(size for sha256, size in blobs.items() if self.holds(sha256, size)),
                    total_bytes=sum(tensor.num_bytes for tensor in manifest.tensors.values()),
                    used=path.stat().st_mtime,
                )
            )
        return tuple(sorted(found, key=lambda kept: -kept.used))

    def garbage(self, *, now: float, older_than_s: float | None = None, everything: bool = False) -> Garbage:
        """What nobody needs: parts and unnamed blobs of more than a day, hashes of files that are gone or changed;
        checkpoints not used for `older_than_s` with the blobs that they alone name; or all there is."""
        manifests = {path: self.manifest(path.stem) for path in self._files(MANIFESTS, ".json") if is_hash(path.stem)}
        kept = {
            path: manifest
            for path, manifest in manifests.items()
            if manifest is not None
            and not everything
            and (older_than_s is None or now - path.stat().st_mtime <= older_than_s)
        }
        named = {tensor.sha256 for manifest in kept.values() for tensor in manifest.tensors.values()}
        dropped = {
            tensor.sha256
            for path, manifest in manifests.items()
            if manifest is not None and path not in kept
            for tensor in manifest.tensors.values()
        }
        gone = [path for path in manifests if path not in kept]
        for path in self._files(BLOBS, ""):
            if path.name in named:
                continue
            if everything or path.name in dropped or now - path.stat().st_mtime > _FRESH_S:
                gone.append(path)
        gone += [path for path in self._files(_HASHES, ".jsonl") if everything or not _still_true(path)]
        return Garbage(files=tuple(gone), num_bytes=sum(path.stat().st_size for path in gone))

    def remove(self, garbage: Garbage) -> None:
        """Raises EngineError when the store is being filled, and then removes nothing."""
        if not garbage.files:
            return
        with contextlib.ExitStack() as stack:
            descriptor = os.open(self.directory / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            stack.callback(os.close, descriptor)
            if not _try_lock(descriptor, fcntl.LOCK_EX):
                raise EngineError("Weights are being fetched into the shard store; try again when that is done.")
            for path in garbage.files:
                path.unlink(missing_ok=True)

    def _files(self, folder: str, suffix: str) -> list[Path]:
        directory = self.directory / folder
        return sorted(path for path in directory.glob(f"*{suffix}") if path.is_file()) if directory.is_dir() else []


class HashCache:
    """SHA-256 of tensors wherever their files lie, read once for as long as a file stays as it is. Blocking."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory / _HASHES

    def sha256(self, info: TensorInfo) -> str:
        """Raises OSError when the file cannot be read, or ends too soon."""
        path = self._path(info.file)
        place = f"{info.offset}+{info.num_bytes}"
        if (known := self._read(path).get(place)) is not None:
            return known
        found = hash_extent(info)
        if path != self._path(info.file):
            raise OSError(0, "it changed while it was read", str(info.file))
        line = json.dumps({"place": place, "sha256": found})
        head = "" if path.exists() else json.dumps({"file": str(info.file)}) + "\n"
        with path.open("a") as file:  # one write of one line: several processes may append
            file.write(f"{head}{line}\n")
        return found

    def _path(self, file: Path) -> Path:
        return self._directory / f"{_file_key(file)}.jsonl"

    def _read(self, path: Path) -> dict[str, str]:
        known: dict[str, str] = {}
        with contextlib.suppress(OSError):
            for line in path.read_text().splitlines():
                with contextlib.suppress(ValueError):  # a line cut by a crash
                    match json.loads(line):
                        case {"place": str(place), "sha256": str(sha256)} if is_hash(sha256):
                            known[place] = sha256
        return known


def hash_extent(info: TensorInfo) -> str:
    """Raises OSError when the file cannot be read, or ends too soon."""
    hash_ = hashlib.sha256()
    with info.file.open("rb", buffering=0) as file:
        position, end = info.offset, info.offset + info.num_bytes
        while position < end:
            data = os.pread(file.fileno(), min(_READ_BYTES, end - position), position)
            if not data:
                raise OSError(0, "it is too short", str(info.file))
            hash_.update(data)
            position += len(data)
    return hash_.hexdigest()


def disk_error(path: Path, error: OSError) -> EngineError:
    """In words for a person; what was fetched so far is kept."""
    return EngineError(
        f"The shard store at {path} cannot be written: {error.strerror or error}. What was fetched is kept; make room "
        "(`tllm cache gc` shows what can go) or set XDG_STATE_HOME to another disk, and start again."
    )


def _file_key(file: Path) -> str:
    status = file.stat()
    return hashlib.sha256(
        f"{file.resolve()}\0{status.st_size}\0{status.st_mtime_ns}\0{status.st_ino}".encode()
    ).hexdigest()


def _still_true(path: Path) -> bool:
    """Whether the file that these hashes are of is still the same."""
    try:
        with path.open() as file:
            match json.loads(file.readline()):
                case {"file": str(name)}:
                    return _file_key(Path(name)) == path.stem
    except (OSError, ValueError):
        pass
    return False


def _known(manifest: Manifest, name: str) -> str:
    tensor = manifest.tensors.get(name)
    return tensor.sha256 if tensor is not None else ""


def _try_lock(descriptor: int, operation: int) -> bool:
    try:
        fcntl.flock(descriptor, operation | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


@contextlib.contextmanager
def _locked(path: Path, operation: int) -> Iterator[None]:
    """For a moment: whoever holds it does nothing that waits."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(descriptor, operation)
        yield
    finally:
        os.close(descriptor)
