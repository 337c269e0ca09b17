"""Whatever bytes a peer sends, what comes of them is a valid message or an error of ours, and no memory beyond bounds.

Valid encodings are mutated: bits flipped, bytes set, inserted, deleted, doubled, the end cut off, two encodings
spliced, lengths made huge. Each mutant is drawn from its own seed (target and number), so that a failure comes again,
except that keys and certificates are new each time; it shows the bytes. TLLM_MUTATIONS says how many there are in all,
and a long run is

    TLLM_MUTATIONS=100000 python -m pytest tests/properties/test_wire_mutations.py

This file does not know what is right about a message that is let through: tests/properties/test_wire.py does.
"""

from __future__ import annotations

import asyncio
import os
import random
import struct
import tracemalloc
from base64 import b64encode
from collections.abc import Callable, Coroutine, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding
from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

import tllm.demo
from tllm.cluster import shards as cluster_shards
from tllm.cluster import speeds
from tllm.core.errors import ConfigError, FrameError, ModelError, TllmError, TransportError
from tllm.core.types import DType, Epoch
from tllm.models.checkpoint import Checkpoint
from tllm.models.manifest import Manifest
from tllm.testing.identities import members
from tllm.testing.strategies import limited_messages
from tllm.transport import codecs, control, enrolment, link_bench, pipe, shards, trust, wire
from tllm.transport import wire_pb2 as pb
from tllm.transport.base import FRAME_HEADER_BYTES, FrameLimits
from tllm.transport.checks import check
from tllm.transport.tokens import JoinToken

NUM_MUTATIONS = int(os.environ.get("TLLM_MUTATIONS", "10000"))
SLACK_BYTES = 1 << 20  # a mutant has some kilobytes at most; what it claims may be billions

T = TypeVar("T")
Parse = Callable[[bytes], object]


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """One place where bytes of a peer become values: encodings that it takes, each with how it is read, and the errors
    by which it may refuse."""

    name: str
    samples: Sequence[tuple[bytes, Parse]]
    refusals: tuple[type[TllmError], ...] = (FrameError,)
    kinds: tuple[type[Message], ...] = ()  # of wire.proto, that are read here


# Mutations.


def flip(data: bytearray, rng: random.Random, _other: bytes) -> None:
    data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)


def put(data: bytearray, rng: random.Random, _other: bytes) -> None:
    data[rng.randrange(len(data))] = rng.choice((0, 1, 0x7F, 0x80, 0xFF, rng.randrange(256)))


def insert(data: bytearray, rng: random.Random, _other: bytes) -> None:
    place = rng.randrange(len(data) + 1)
    data[place:place] = rng.randbytes(rng.randint(1, 8))


def delete(data: bytearray, rng: random.Random, _other: bytes) -> None:
    place = rng.randrange(len(data))
    del data[place : place + rng.randint(1, 8)]


def double(data: bytearray, rng: random.Random, _other: bytes) -> None:
    start = rng.randrange(len(data))
    run = data[start : start + rng.randint(1, 64)]
    place = rng.randrange(len(data) + 1)
    data[place:place] = run * rng.choice((1, 1, 2, 50))


def truncate(data: bytearray, rng: random.Random, _other: bytes) -> None:
    del data[rng.randrange(len(data)) :]


def splice(data: bytearray, rng: random.Random, other: bytes) -> None:
    data[rng.randrange(len(data)) :] = other[rng.randrange(len(other) + 1) :]


def exaggerate(data: bytearray, rng: random.Random, _other: bytes) -> None:
    """A length somewhere becomes huge, as a fixed-size number or as protobuf's varint."""
    place = rng.randrange(len(data))
    huge = rng.choice((b"\xff" * 4, b"\xff" * 8, b"\xff\xff\xff\x7f", b"\xff\xff\xff\xff\x0f", b"\xff" * 9 + b"\x01"))
    data[place : place + rng.choice((1, len(huge)))] = huge


MUTATIONS = (flip, flip, put, insert, delete, double, truncate, splice, exaggerate)


def mutant(target: Target, number: int) -> tuple[bytes, Parse]:
    rng = random.Random(f"{target.name} {number}")
    encoding, parse = rng.choice(target.samples)
    data = bytearray(encoding)
    for _ in range(rng.choice((1, 1, 1, 2, 3, 6))):
        if data:
            rng.choice(MUTATIONS)(data, rng, rng.choice(target.samples)[0])
    return bytes(data), parse


# Valid encodings.


def drawn(strategy: st.SearchStrategy[T], number: int) -> list[T]:
    """Always the same values of the strategy."""
    values: list[T] = []

    @seed(0)
    @settings(
        max_examples=number,
        database=None,
        deadline=None,
        phases=(Phase.generate,),
        suppress_health_check=list(HealthCheck),
    )
    @given(strategy)
    def collect(value: T) -> None:
        values.append(value)

    collect()
    return values


def fill(message: Message, rng: random.Random) -> None:
    """Set about half of the fields, at any depth, and one of every oneof."""
    chosen = {oneof.name: rng.choice(oneof.fields) for oneof in message.DESCRIPTOR.oneofs}
    for field in message.DESCRIPTOR.fields:
        oneof = field.containing_oneof
        if chosen[oneof.name] is not field if oneof else rng.random() < 0.5:
            continue
        if field.message_type is not None:
            place = getattr(message, field.name)
            if field.is_repeated:
                for _ in range(rng.randint(0, 2)):
                    fill(place.add(), rng)
            else:
                place.SetInParent()
                fill(place, rng)
        elif field.is_repeated:
            getattr(message, field.name).extend([value(field, rng) for _ in range(rng.randint(0, 3))])
        else:
            setattr(message, field.name, value(field, rng))


def value(field: FieldDescriptor, rng: random.Random) -> object:
    match field.cpp_type:
        case FieldDescriptor.CPPTYPE_BOOL:
            return rng.random() < 0.5
        case FieldDescriptor.CPPTYPE_DOUBLE:
            return rng.choice((0.0, 0.5, -1e300, float("nan"), float("inf")))
        case FieldDescriptor.CPPTYPE_STRING if field.type == FieldDescriptor.TYPE_BYTES:
            return rng.randbytes(rng.randint(0, 12))
        case FieldDescriptor.CPPTYPE_STRING:
            return rng.choice(("", "float32", "n-3fa4c1d2", "127.0.0.1:1", "ключ", "../../x"))
        case FieldDescriptor.CPPTYPE_INT32:
            return rng.randint(-5, 5)
        case _:
            return rng.choice((0, 1, 2, 3, 2**32 - 1))


def filled(kind: type[Message], number: int = 40) -> list[bytes]:
    encodings = []
    for index in range(number):
        message = kind()
        fill(message, random.Random(f"{kind.__name__} {index}"))
        encodings.append(message.SerializeToString())
    return [encoding for encoding in encodings if encoding]


# Where bytes become values.


def framed(limits: FrameLimits, body: bytes, metadata: bytes) -> bytes:
    return struct.pack("<QII", limits.epoch, len(body), len(metadata)) + body + metadata


def decode(data: bytes, limits: FrameLimits) -> None:
    """What is let through keeps the rules and can be sent on."""
    message = wire.decode(data, limits)
    check(message, limits)
    assert wire.decode(wire.encode(message), limits) == message


def targets_of_the_data_plane() -> Iterator[Target]:
    whole: list[tuple[bytes, Parse]] = []
    inner: list[tuple[bytes, Parse]] = []
    states: list[tuple[bytes, Parse]] = []
    hellos: list[tuple[bytes, Parse]] = []
    for limits, message in drawn(limited_messages(), 80):
        limits = replace(limits, epoch=Epoch(7))  # else a spliced frame is refused for its epoch
        data = wire.encode(with_epoch(message, limits.epoch))
        _, num_body_bytes, _ = struct.unpack_from("<QII", data)
        body_end = FRAME_HEADER_BYTES + num_body_bytes
        body, metadata = data[FRAME_HEADER_BYTES:body_end], data[body_end:]
        whole.append((data, lambda data, limits=limits: decode(data, limits)))
        inner.append((metadata, lambda data, limits=limits, body=body: decode(framed(limits, body, data), limits)))
        hellos.append((wire.encode_hello(limits), wire.decode_hello))
        frame = pb.Frame.FromString(metadata)
        for index, state in enumerate(frame.step.samplings):

            def parse(
                data: bytes, limits: FrameLimits = limits, body: bytes = body, frame: pb.Frame = frame, at: int = index
            ) -> None:
                changed = pb.Frame()
                changed.CopyFrom(frame)
                changed.step.samplings[at] = data
                decode(framed(limits, body, changed.SerializeToString()), limits)

            states.append((state, parse))
            states.append(
                (pb.SamplingState.FromString(state).params, lambda data, parse=parse: parse(with_params(data)))
            )
    yield Target(name="frame", samples=whole, kinds=(pb.Frame,))
    yield Target(name="metadata of a frame", samples=inner)
    yield Target(name="sampling state", samples=states)
    yield Target(name="hello", samples=hellos, kinds=(pb.Hello,))


def with_epoch(message: Any, epoch: Epoch) -> Any:
    if hasattr(message, "step") and hasattr(message.step, "epoch"):
        return replace(message, step=replace(message.step, epoch=epoch))
    return replace(message, epoch=epoch)


def with_params(params: bytes) -> bytes:
    return pb.SamplingState(params=params).SerializeToString()


def targets_of_the_control_plane() -> Iterator[Target]:
    def said(data: bytes) -> None:
        message = control._decode(data, pb.AgentMessage)
        speeds.from_message(message.measured.speed)

    def ordered(data: bytes) -> None:
        message = control._decode(data, pb.HeadMessage)
        wire.unpack_limits(message.worker.start.limits)
        trust.Identity.from_message(message.worker.load.identity)

    yield Target(
        name="agent", samples=[(data, said) for data in filled(pb.AgentMessage, 200)], kinds=(pb.AgentMessage,)
    )
    yield Target(
        name="head", samples=[(data, ordered) for data in filled(pb.HeadMessage, 200)], kinds=(pb.HeadMessage,)
    )
    yield Target(name="speed", samples=[(speed().SerializeToString(), read_speed)])
    for kind in (pb.WorkerOrder, pb.WorkerEvent):
        samples = [
            (struct.pack("<I", len(data)) + data, lambda data, kind=kind: read_pipe(data, kind))
            for data in filled(kind)
        ]
        yield Target(name=f"pipe of {kind.__name__}", samples=samples)


def speed() -> pb.Speed:
    return pb.Speed(rows=[1, 4, 16], layer_s=[0.1, 0.2, 0.3], head_s=[0.1, 0.1, 0.1], step_s=0.01)


def read_speed(data: bytes) -> None:
    speeds.from_message(shards._decode(data, pb.Speed))


def read_pipe(data: bytes, kind: type[Message]) -> None:
    async def read() -> None:
        stream = asyncio.StreamReader()
        stream.feed_data(data)
        stream.feed_eof()
        while await pipe.read_message(stream, kind) is not None:
            pass

    run(read())


def targets_of_trust(directory: Path) -> Iterator[Target]:
    for kind, parts in ((pb.EnrolRequest, ("hello", "proof")), (pb.EnrolAnswer, ("challenge", "enrolled"))):

        def parse(data: bytes, kind: Any = kind, parts: tuple[str, ...] = parts) -> None:
            try:
                enrolment._decode(data, kind, parts[0])
            except FrameError:
                enrolment._decode(data, kind, parts[1])

        samples: list[tuple[bytes, Parse]] = [(data, parse) for data in filled(kind)]
        yield Target(name=kind.__name__, samples=samples, kinds=(kind,))
    authority = trust.Authority.open(directory)
    (identity,) = members(directory, "n-1")
    request = trust.new_signing_request(trust.new_key())
    issuer = trust.read_certificate(authority.certificate)
    requests = x509.load_pem_x509_csr(request).public_bytes(Encoding.DER)
    certificates = trust.read_certificate(identity.certificate).public_bytes(Encoding.DER)

    def sign(data: bytes) -> None:
        authority.sign("n-2", data)

    def member(data: bytes) -> None:
        trust.read_member(data, issuer)

    def holder(data: bytes) -> None:
        trust.holder_of(trust.read_certificate(data))

    yield Target(
        name="signing request",
        samples=[(request, sign), (requests, lambda data: sign(pem(data, "CERTIFICATE REQUEST")))],
    )
    yield Target(
        name="certificate",
        samples=[
            (identity.certificate, member),
            (certificates, lambda data: member(pem(data, "CERTIFICATE"))),
            (certificates, lambda data: holder(pem(data, "CERTIFICATE"))),
        ],
        refusals=(TransportError,),
    )
    yield Target(
        name="identity",
        samples=[
            (
                identity.to_message().SerializeToString(),
                lambda data: trust.Identity.from_message(shards._decode(data, pb.Identity)),
            )
        ],
    )
    token = JoinToken(token_id="01020304", secret=bytes(16), pin=bytes(16)).text.encode()
    yield Target(
        name="join token",
        samples=[(token, lambda data: JoinToken.parse(data.decode("utf-8", "surrogateescape")))],
        refusals=(ConfigError,),
    )


def pem(data: bytes, label: str) -> bytes:
    return b"-----BEGIN %b-----\n%b\n-----END %b-----\n" % (label.encode(), b64encode(data), label.encode())


class AbortedError(TransportError):
    """The service refused a call with a status."""


class Caller:
    """What a service sees of a call: here, only how to end it."""

    async def abort(self, _code: object, details: str = "") -> NoReturn:
        raise AbortedError(details)


class Shelf:
    """Has one checkpoint and one tensor."""

    def __init__(self, file: Path) -> None:
        self._file = file

    async def manifest(self, fingerprint: str) -> pb.Manifest | None:
        return pb.Manifest(fingerprint=fingerprint) if fingerprint == "float32" else None

    async def hashes(self, _fingerprint: str, names: Sequence[str]) -> Sequence[str]:
        return ["" for _ in names]

    async def locate(self, _fingerprint: str, name: str) -> shards.Extent | None:
        return shards.Extent(file=self._file, offset=1, num_bytes=3) if name == "float32" else None


def targets_of_shards(directory: Path) -> Iterator[Target]:
    file = directory / "tensor"
    file.write_bytes(bytes(4))
    service: Any = shards.ShardService(Shelf(file))
    for kind, method in (
        (pb.DescribeRequest, service._describe),
        (pb.HashesRequest, service._hashes),
        (pb.ReadRequest, service._read),
        (pb.EchoRequest, service._echo),
    ):

        def ask(data: bytes, method: Any = method) -> None:
            async def call() -> None:
                answer = method(data, Caller())
                if asyncio.iscoroutine(answer):
                    await answer
                    return
                async for _ in answer:
                    pass

            run(call())

        samples: list[tuple[bytes, Parse]] = [(data, ask) for data in filled(kind)]
        yield Target(name=kind.__name__, samples=samples, refusals=(AbortedError,), kinds=(kind,))
    for answer in (pb.Piece, pb.HashesAnswer, pb.EchoAnswer):
        encodings = filled(answer) or filled(pb.EchoRequest)  # where nothing is known, fields that are not
        samples = [(data, lambda data, answer=answer: shards._decode(data, answer)) for data in encodings]
        yield Target(name=answer.__name__, samples=samples, kinds=(answer,))


def targets_of_link_benchmarks() -> Iterator[Target]:
    content = bytes(range(64)) * 4  # as bfloat16 all of it is finite
    shape = codecs.MatrixShape(rows=4, columns=32, dtype=DType.BFLOAT16)
    columns = {name: codecs.make_codec(name) for name in codecs.CodecName}

    def read_matrix(data: bytes) -> None:
        """As its receiver does, for matrices of one piece."""
        claimed, name, num_bytes = link_bench._parse_header(data)
        body = memoryview(data)[link_bench._HEADER.size :]
        if num_bytes != len(body):
            raise FrameError("a matrix whose pieces do not make up its length")
        columns[name].decode(body, claimed)

    def matrix(number: int, name: codecs.CodecName) -> bytes:
        encoded = columns[name].encode(content, shape)
        return link_bench._HEADER.pack(shape.rows, shape.columns, len(encoded), number, 1) + encoded

    yield Target(
        name="matrix",
        samples=[(matrix(number, name), read_matrix) for number, name in enumerate(codecs.CodecName)],
        kinds=(pb.Matrix,),
    )
    yield Target(
        name="matrix received",
        samples=[(data, link_bench._parse_answer) for data in filled(pb.MatrixReceived)],
        kinds=(pb.MatrixReceived,),
    )


def targets_of_manifests(directory: Path) -> Iterator[Target]:
    manifest = Checkpoint.open(Path(tllm.demo.__file__).parent).manifest(model="embedded")
    message = cluster_shards._to_message(manifest)

    def read_message(data: bytes) -> None:
        received = shards._decode(data, pb.Manifest)
        cluster_shards._check_manifest(cluster_shards._from_message(received, "embedded"))

    def read_config(data: bytes) -> None:
        changed = pb.Manifest()
        changed.CopyFrom(message)
        changed.config = data.decode("utf-8", "replace")
        cluster_shards._check_manifest(cluster_shards._from_message(changed, "embedded"))

    def read_file(data: bytes) -> None:
        path = directory / "manifest.json"
        path.write_bytes(data)
        Manifest.read(path)

    yield Target(
        name="manifest",
        samples=[(message.SerializeToString(), read_message), (message.config.encode(), read_config)],
        refusals=(FrameError, ModelError),
    )
    yield Target(name="manifest file", samples=[(manifest.to_bytes(), read_file)], refusals=(ModelError,))


LOOP = asyncio.Runner()


def run(work: Coroutine[Any, Any, None]) -> None:
    LOOP.run(work)


@pytest.fixture(scope="module")
def targets(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[Target]]:
    directory = tmp_path_factory.mktemp("mutations")
    with LOOP:
        yield [
            *targets_of_the_data_plane(),
            *targets_of_the_control_plane(),
            *targets_of_trust(directory / "trust"),
            *targets_of_shards(directory),
            *targets_of_link_benchmarks(),
            *targets_of_manifests(directory),
        ]


def is_refused(target: Target, number: int) -> bool:
    data, parse = mutant(target, number)
    try:
        parse(data)
    except target.refusals:
        return True
    except Exception as error:
        raise AssertionError(f"{target.name}, mutant {number}, {data!r}: {type(error).__name__}: {error}") from error
    return False


@pytest.mark.filterwarnings("ignore::cryptography.utils.CryptographyDeprecationWarning")
def test_every_mutant_is_a_valid_message_or_refused(targets: list[Target]) -> None:
    num_refused = 0
    failures = []
    for target in targets:
        for number in range(NUM_MUTATIONS // len(targets) + 1):
            try:
                num_refused += is_refused(target, number)
            except AssertionError as error:
                failures.append(str(error))
                break
    assert not failures, "\n".join(failures)
    assert 0.1 * NUM_MUTATIONS < num_refused < 0.99 * NUM_MUTATIONS  # else it tests nothing


@pytest.mark.filterwarnings("ignore::cryptography.utils.CryptographyDeprecationWarning")
def test_no_mutant_takes_memory_for_what_it_only_claims(targets: list[Target]) -> None:
    tracemalloc.start()
    try:
        for target in targets:
            for number in range(NUM_MUTATIONS // (10 * len(targets)) + 5):
                tracemalloc.reset_peak()
                before, _ = tracemalloc.get_traced_memory()
                is_refused(target, number)
                _, peak = tracemalloc.get_traced_memory()
                assert peak - before < SLACK_BYTES, f"{target.name}, mutant {number}"
    finally:
        tracemalloc.stop()


def test_everything_that_a_service_takes_or_gives_is_mutated(targets: list[Target]) -> None:
    covered = {kind.DESCRIPTOR.name for target in targets for kind in target.kinds}
    spoken = {
        kind.name
        for service in pb.DESCRIPTOR.services_by_name.values()
        for method in service.methods
        for kind in (method.input_type, method.output_type)
    }
    assert spoken - covered == {"Flow"}  # whose coming is all that it says: nobody reads it


def test_a_signing_request_of_an_unknown_version_is_refused(tmp_path: Path) -> None:
    request = x509.load_pem_x509_csr(trust.new_signing_request(trust.new_key())).public_bytes(Encoding.DER)
    assert request.count(b"\x02\x01\x000\x00") == 1  # version 0, then an empty subject
    with pytest.raises(FrameError):
        trust.Authority.open(tmp_path).sign(
            "n-2", pem(request.replace(b"\x02\x01\x00", b"\x02\x01\x08", 1), "CERTIFICATE REQUEST")
        )


def test_a_certificate_of_an_unknown_version_is_refused(tmp_path: Path) -> None:
    (identity,) = members(tmp_path, "n-1")
    certificate = trust.read_certificate(identity.certificate).public_bytes(Encoding.DER)
    assert certificate.count(b"\xa0\x03\x02\x01\x02") == 1  # version 3, which is written as 2
    with pytest.raises(TransportError):
        trust.read_certificate(
            pem(certificate.replace(b"\xa0\x03\x02\x01\x02", b"\xa0\x03\x02\x01\x06"), "CERTIFICATE")
        )


def test_a_manifest_without_tensors_is_refused() -> None:
    manifest = Checkpoint.open(Path(tllm.demo.__file__).parent).manifest()
    with pytest.raises(ModelError):
        cluster_shards._check_manifest(replace(manifest, tensors={}))
