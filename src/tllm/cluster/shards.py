"""The weights of a machine: where a shard's tensors are found, fetched if they have to be, and given to others.

    1. local files      what the head calls the model, if that is a checkpoint of the same fingerprint here
    2. the shard store  a manifest, and a blob for every tensor of the shard; one store per machine
    3. the cluster      what is missing, from the head and from peers at once
    4. the hub          what nobody in the cluster has, by byte ranges, when the model has a name there

Whatever is fetched is in the store afterwards, so that a second start moves no bytes. A machine gives what it has to
whoever is in the cluster: the checkpoints that it opened, and the store.

This file does not know sockets, workers, or who needs which shard.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import shutil
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Final

from tllm.cluster.shard_fetch import Connect, Fetch, FetchSource, Job
from tllm.cluster.shard_files import HashCache, StoreFiles, default_store, disk_error
from tllm.core.errors import EngineError, FrameError, ModelError, TransportError
from tllm.core.units import format_bytes
from tllm.models.checkpoint import Checkpoint
from tllm.models.config import Config
from tllm.models.headers import TensorInfo
from tllm.models.hub import HubCheckpoint, is_hub_name, open_on_hub
from tllm.models.manifest import Manifest, ManifestTensor, is_hash
from tllm.models.repository import find_local
from tllm.models.spec import Shard
from tllm.transport import wire_pb2 as pb
from tllm.transport.shards import Extent, ShardClient
from tllm.transport.trust import Identity

log = logging.getLogger(__name__)

_HUB: Final = "the hub"
_CONNECT_S: Final = 10.0  # to one source

Progress = Callable[[int, int], None]


class ShardStore:
    """One machine's store, and the `ShardProvider` of what is in it and of the checkpoints offered."""

    def __init__(self, directory: Path | None = None) -> None:
        self.files = StoreFiles(directory or default_store())
        self._hashes = HashCache(self.files.directory)
        self._offered: dict[str, Checkpoint] = {}
        # One thread: two would read the same disk, and whoever asks for the same tensor finds its hash known.
        self._hashing = ThreadPoolExecutor(max_workers=1, thread_name_prefix="hash")

    def offer(self, checkpoint: Checkpoint) -> None:
        """Give its tensors to peers from its own files, for as long as this store lives."""
        self._offered[checkpoint.fingerprint] = checkpoint

    def close(self) -> None:
        """Hash nothing more for others."""
        self._hashing.shutdown(wait=False, cancel_futures=True)

    # -------------------------------------------------------------------------------------------- to have

    async def provide(self, load: pb.Load, identity: Identity | None, progress: Progress) -> tuple[str, int]:
        """What `Checkpoint.open` takes to read the shard's weights, and how many bytes came over the network for it.

        `progress` gets the bytes on this machine and those that were missing, while something is fetched. Raises
        TransportError when no source has what is missing, EngineError when the disk refuses, ModelError for a model
        that tllm does not know. What was fetched until then is kept.
        """
        fingerprint = load.fingerprint
        if not is_hash(fingerprint):
            raise FrameError(f"{fingerprint[:80]!r} is not the fingerprint of a checkpoint")
        local = await asyncio.to_thread(self._local, load.model, fingerprint)
        if local is not None:
            return str(local), 0
        await asyncio.to_thread(self.files.prepare)
        async with self.files.filling():
            with contextlib.closing(_HubOnce(load.model, load.fingerprint)) as hub:
                return await self._from_store(load, identity, progress, hub)

    def _local(self, model: str, fingerprint: str) -> Path | None:
        """A checkpoint's own files. The name came from a peer, so it opens nothing but what the peer has too: what it
        leads to is used only with this very fingerprint, and nobody is told what else is there."""
        try:
            path = find_local(model)
            if path is None:
                return None
            checkpoint = Checkpoint.open(path)
            if checkpoint.fingerprint != fingerprint or not all(
                file.is_file() for file in {info.file for info in checkpoint.tensors.values()}
            ):
                return None
        except (ModelError, OSError, ValueError) as error:
            log.debug("there is no %s here: %s", model, error)
            return None
        self.offer(checkpoint)
        return path

    async def _from_store(
        self, load: pb.Load, identity: Identity | None, progress: Progress, hub: _HubOnce
    ) -> tuple[str, int]:
        sources = [_peer(source, load.fingerprint, identity) for source in load.sources]
        manifest = self.files.manifest(load.fingerprint)
        if manifest is None:
            manifest = await _describe(load, identity, hub)
            self.files.merge(manifest)
        path = self.files.manifest_path(load.fingerprint)
        checkpoint = Checkpoint.of_manifest(path, path.parent)
        shard = Shard(first_layer=load.first_layer, last_layer=load.last_layer, embed=load.embed, head=load.head)
        tensors = {name: manifest.tensors[name] for name in checkpoint.needed(shard)}
        missing = [
            Job(name=name, num_bytes=tensor.num_bytes, sha256=tensor.sha256)
            for name, tensor in tensors.items()
            if not self.files.holds(tensor.sha256, tensor.num_bytes)
        ]
        if not missing:
            self.files.merge(manifest)
            return str(path), 0
        self._check_space(missing)
        fetch = Fetch(self.files, load.fingerprint, sum(job.num_bytes for job in missing), progress)
        try:
            left = await fetch.from_peers(missing, sources, _asker(load, identity)) + fetch.unhashed
            if left and (source := await hub.source(fetch.reasons)) is not None:
                left = await fetch.from_one(left, source)
        finally:
            self.files.merge(replace(manifest, tensors=_with_hashes(manifest, fetch.hashes)))
        if left:
            raise TransportError(_nothing_left(load.model, left, tensors, fetch.reasons))
        return str(path), fetch.fetched_bytes

    def _check_space(self, missing: Iterable[Job]) -> None:
        jobs = list(missing)
        begun = sum(_size(self.files.part(job.sha256)) for job in jobs if job.sha256)
        wanted = sum(job.num_bytes for job in jobs) - begun
        try:
            free = shutil.disk_usage(self.files.directory).free
        except OSError as error:
            raise disk_error(self.files.directory, error) from error
        if wanted > free:
            raise EngineError(
                f"The shard takes {format_bytes(wanted)} more in the shard store at {self.files.directory}, where "
                f"{format_bytes(free)} are free. Make room (`tllm cache gc` shows what can go), or set XDG_STATE_HOME "
                "to another disk."
            )

    # ------------------------------------------------------------------------------------------- to give

    async def manifest(self, fingerprint: str) -> pb.Manifest | None:
        """As a `ShardProvider`."""
        if not is_hash(fingerprint):
            return None
        stored = self.files.manifest(fingerprint)
        if stored is None and (offered := self._offered.get(fingerprint)) is not None:
            stored = offered.manifest()
        return None if stored is None else _to_message(stored)

    async def hashes(self, fingerprint: str, names: Sequence[str]) -> Sequence[str]:
        """As a `ShardProvider`: from the manifest, else by reading the offered files once."""
        stored = self.files.manifest(fingerprint) if is_hash(fingerprint) else None
        offered = self._offered.get(fingerprint)
        found = []
        for name in names:
            known = stored.tensors.get(name) if stored is not None else None
            sha256 = known.sha256 if known is not None else ""
            if not sha256 and offered is not None and name in offered.tensors:
                sha256 = await self._hash(offered.tensors[name])
            found.append(sha256)
        return found

    async def locate(self, fingerprint: str, name: str) -> Extent | None:
        """As a `ShardProvider`: in the offered files, else in the store."""
        offered = self._offered.get(fingerprint)
        if offered is not None and (info := offered.tensors.get(name)) is not None and info.file.is_file():
            return Extent(file=info.file, offset=info.offset, num_bytes=info.num_bytes)
        stored = self.files.manifest(fingerprint) if is_hash(fingerprint) else None
        tensor = stored.tensors.get(name) if stored is not None else None
        if tensor is None or not self.files.holds(tensor.sha256, tensor.num_bytes):
            return None
        return Extent(file=self.files.blob(tensor.sha256), offset=0, num_bytes=tensor.num_bytes)

    async def _hash(self, info: TensorInfo) -> str:
        """Empty when the file cannot be read: then this machine does not have the tensor."""

        def read() -> str:
            self.files.prepare()
            return self._hashes.sha256(info)

        try:
            return await asyncio.get_running_loop().run_in_executor(self._hashing, read)
        except OSError as error:
            log.warning("%s cannot be given to others: %s", info.file, error)
            return ""


class _HubOnce:
    """The model on the hub, asked for at most once and only when something is wanted of it."""

    def __init__(self, model: str, fingerprint: str) -> None:
        self._model = model
        self._fingerprint = fingerprint
        self._opened: HubCheckpoint | None = None
        self._asked = False
        self.reason = ""

    async def open(self) -> HubCheckpoint | None:
        """None when it has no name there, is not there, or is another checkpoint there; `reason` says which."""
        if not self._asked:
            self._asked = True
            if is_hub_name(self._model):
                try:
                    opened = await asyncio.to_thread(open_on_hub, self._model)
                except ModelError as error:
                    self.reason = str(error)
                else:
                    if opened.checkpoint.fingerprint == self._fingerprint:
                        self._opened = opened
                    else:
                        self.reason = f"{self._model} is another checkpoint there now"
        return self._opened

    def close(self) -> None:
        if self._opened is not None:
            self._opened.repository.close()

    async def source(self, reasons: dict[str, str]) -> FetchSource | None:
        opened = await self.open()
        if opened is None:
            if self.reason:
                reasons[_HUB] = self.reason
            return None

        @contextlib.asynccontextmanager
        async def connect() -> AsyncIterator[_HubReader]:
            yield _HubReader(opened)

        return FetchSource(name=_HUB, connect=connect)


class _HubReader:
    def __init__(self, hub: HubCheckpoint) -> None:
        self._hub = hub

    async def read(self, name: str, offset: int) -> AsyncGenerator[bytes]:
        """Each piece is read in a thread; a reader that stops closes the response."""
        pieces = self._hub.read(name, offset)
        try:
            while (piece := await asyncio.to_thread(next, pieces, None)) is not None:
                yield piece
        except ModelError as error:
            raise TransportError(str(error)) from error
        finally:
            await asyncio.to_thread(pieces.close)


class _PeerReader:
    def __init__(self, client: ShardClient, fingerprint: str) -> None:
        self._client = client
        self._fingerprint = fingerprint

    def read(self, name: str, offset: int) -> AsyncGenerator[bytes]:
        return self._client.read(self._fingerprint, name, offset)


class _HeadAsker:
    """Questions for hashes, over a connection that is made for the first of them."""

    def __init__(self, source: pb.Source, fingerprint: str, identity: Identity | None) -> None:
        self._source = source
        self._fingerprint = fingerprint
        self._identity = identity

    async def hashes(self, names: Sequence[str]) -> Sequence[str]:
        async with _client(self._source, self._identity) as client:
            return await client.hashes(self._fingerprint, names)


def _client(source: pb.Source, identity: Identity | None) -> ShardClient:
    return ShardClient(source.addresses, identity=identity, peer=source.name, timeout_s=_CONNECT_S)


def _asker(load: pb.Load, identity: Identity | None) -> _HeadAsker | None:
    """The head is the first source."""
    return _HeadAsker(load.sources[0], load.fingerprint, identity) if load.sources else None


def _peer(source: pb.Source, fingerprint: str, identity: Identity | None) -> FetchSource:
    @contextlib.asynccontextmanager
    async def connect() -> AsyncIterator[_PeerReader]:
        async with _client(source, identity) as client:
            yield _PeerReader(client, fingerprint)

    made: Connect = connect
    return FetchSource(name=source.name or ", ".join(source.addresses), connect=made)


async def _describe(load: pb.Load, identity: Identity | None, hub: _HubOnce) -> Manifest:
    """The manifest from whoever has it, without hashes. Its fingerprint binds config and digest; the rest is checked
    like the headers of any file."""
    reasons: list[str] = []
    for source in load.sources:
        try:
            async with _client(source, identity) as client:
                message = await client.describe(load.fingerprint)
            manifest = _from_message(message, load.model)
            _check_manifest(manifest)
            return manifest
        except (TransportError, ModelError) as error:
            reasons.append(f"{source.name or 'a peer'}: {error}")
    if (opened := await hub.open()) is not None:
        return opened.checkpoint.manifest(model=load.model)
    if hub.reason:
        reasons.append(f"{_HUB}: {hub.reason}")
    raise TransportError(
        f"The checkpoint of {load.model} is not on this machine, and nobody could describe it"
        + (f" ({'; '.join(reasons)})." if reasons else ": the head named no source.")
    )


def _check_manifest(manifest: Manifest) -> None:
    """Raises ModelError unless it is a model that tllm knows, of the fingerprint it claims."""
    config = Config(path=f"the manifest of {manifest.model}", fields=manifest.config)
    checkpoint = Checkpoint.from_headers(Path("manifest"), config, manifest.stored(Path("store/manifests/peer")))
    if checkpoint.fingerprint != manifest.fingerprint:
        raise ModelError("a manifest whose fingerprint is not that of its content")


def _with_hashes(manifest: Manifest, hashes: dict[str, str]) -> dict[str, ManifestTensor]:
    return {
        name: replace(tensor, sha256=hashes[name]) if name in hashes else tensor
        for name, tensor in manifest.tensors.items()
    }


def _to_message(manifest: Manifest) -> pb.Manifest:
    return pb.Manifest(
        fingerprint=manifest.fingerprint,
        config=json.dumps(dict(manifest.config)),
        digest=manifest.digest,
        tensors=[
            pb.Tensor(name=name, dtype=tensor.dtype, shape=tensor.shape, sha256=tensor.sha256)
            for name, tensor in manifest.tensors.items()
        ],
    )


def _from_message(message: pb.Manifest, model: str) -> Manifest:
    """Without its hashes: those are asked of the head. Raises ModelError."""
    try:
        config = json.loads(message.config)
    except (ValueError, RecursionError) as error:
        raise ModelError("a manifest whose config is not JSON") from error
    if not isinstance(config, dict):
        raise ModelError("a manifest whose config is not a JSON object")
    return Manifest(
        fingerprint=message.fingerprint,
        config=config,
        digest=message.digest,
        tensors={
            tensor.name: ManifestTensor(dtype=tensor.dtype, shape=tuple(tensor.shape)) for tensor in message.tensors
        },
        model=model[:200],
    )


def _nothing_left(model: str, left: Sequence[Job], tensors: dict[str, ManifestTensor], reasons: dict[str, str]) -> str:
    why = "; ".join(f"{source}: {reason}" for source, reason in reasons.items())
    return (
        f"No source is left for {len(left)} of the {len(tensors)} tensors that this shard of {model} needs, such as "
        f"{left[0].name}" + (f" ({why})." if why else ".")
    )


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return 0
