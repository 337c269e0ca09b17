"""Who a process is in a cluster: the cluster's certificate authority, and the certificates that it gives.

    authority.pem    key and certificate of the authority: made on first use, then never changed
    head.pem         the head's key, kept so that join tokens can name it by its fingerprint, the pin

A certificate names its holder in its SAN (DNS), and in its subject (OU) the join token by which the holder came. Names
are node ids or "head". What counts is that the authority itself issued a certificate: a chain proves nothing here, see
docs/design/0005-trust.md.

This file does not know sockets, join tokens, or what the holder of a certificate may do.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import re
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.types import CertificatePublicKeyTypes
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from tllm.core.errors import ConfigError, FrameError, TransportError
from tllm.core.types import HEAD
from tllm.transport import wire_pb2 as pb

PIN_BYTES = 16
MAX_PEM_BYTES = 8192  # of anything that a peer sends to be parsed

_NAME = re.compile(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?")  # one DNS label
_TOKEN_ID = re.compile(r"[0-9a-f]{0,64}")
_AUTHORITY_LIFE = timedelta(days=3650)
_HEAD_LIFE = timedelta(days=1095)
_NODE_LIFE = timedelta(days=1095)  # a process keeps its identity while it runs; tokens are what is revoked
_SKEW = timedelta(days=1)  # that a machine's clock may be behind the head's


@dataclass(frozen=True, slots=True, kw_only=True)
class Identity:
    """What a process shows to its peers, and by what it judges theirs."""

    name: str  # node id, or "head"
    certificate: bytes = field(repr=False)  # PEM
    key: bytes = field(repr=False)  # PEM, PKCS8
    authority: bytes = field(repr=False)  # PEM: the certificate of the cluster's authority

    @property
    def expires(self) -> datetime:
        return read_certificate(self.certificate).not_valid_after_utc

    def to_message(self) -> pb.Identity:
        """With the key: for the pipe to one's own worker, and for nobody else."""
        return pb.Identity(name=self.name, certificate=self.certificate, key=self.key, authority=self.authority)

    @classmethod
    def from_message(cls, message: pb.Identity) -> Identity:
        """Raises FrameError when the certificate is not the authority's for that name and key."""
        try:
            member = read_member(message.certificate, read_certificate(message.authority))
            key = serialization.load_pem_private_key(message.key, None)
        except (TransportError, ValueError, TypeError, UnsupportedAlgorithm) as error:
            raise FrameError(f"not an identity: {error}") from error
        if member.name != message.name:
            raise FrameError(f"an identity of {message.name!r} with the certificate of {member.name!r}")
        if key.public_key() != member.public_key:
            raise FrameError(f"the identity of {message.name!r} has another key than its certificate")
        return cls(name=message.name, certificate=message.certificate, key=message.key, authority=message.authority)


@dataclass(frozen=True, slots=True, kw_only=True)
class Member:
    """The holder of a certificate that the cluster's authority issued itself."""

    name: str
    token_id: str  # by which it joined; empty: without one
    starts: datetime
    expires: datetime
    public_key: ec.EllipticCurvePublicKey = field(repr=False)


class Authority:
    """The cluster's certificate authority, in a directory that only this user can read. Whoever can read it can be
    anybody in the cluster; whoever deletes it makes another cluster, and every node needs a new token."""

    def __init__(self, directory: Path, key: ec.EllipticCurvePrivateKey, certificate: x509.Certificate) -> None:
        self.directory = directory
        self.certificate = to_pem(certificate)
        self._key = key
        self._issuer = certificate

    @classmethod
    def open(cls, directory: Path) -> Authority:
        """The one in this directory; makes it where there is none, whole before it has its name, so that two
        processes that start at once open the same. Raises ConfigError when it cannot be used."""
        try:
            directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            if directory.stat().st_uid != os.geteuid():
                raise ConfigError(f"{directory} belongs to another user; the keys of a cluster are its owner's alone.")
            directory.chmod(0o700)
            data = _keep(directory / "authority.pem", _make_authority)
        except OSError as error:
            raise ConfigError(f"the cluster's keys cannot be kept in {directory}: {error}") from error
        try:
            key, certificate = _read_key(data), x509.load_pem_x509_certificate(data)
            assert key.public_key() == certificate.public_key()
        except (ValueError, TypeError, AssertionError) as error:
            raise ConfigError(
                f"{directory / 'authority.pem'} is damaged. Restore it, or delete the directory: "
                "that makes a new cluster, and every node needs its new token."
            ) from error
        return cls(directory, key, certificate)

    @property
    def pin(self) -> bytes:
        """By which newcomers know the head before they know the authority."""
        return pin_of(self._head_key().public_key())

    def identity(self, name: str) -> Identity:
        """A new certificate for a fresh key; the head's key is always the same."""
        key, life = (self._head_key(), _HEAD_LIFE) if name == HEAD else (new_key(), _NODE_LIFE)
        certificate = self._issue(name, key.public_key(), life, token_id="")
        return Identity(name=name, certificate=certificate, key=key_to_pem(key), authority=self.certificate)

    def sign(self, name: str, signing_request: bytes, *, token_id: str = "") -> bytes:
        """The certificate of a node for the key in its request; what else the request asks for is not heeded.

        Raises FrameError for anything but a request that the holder of a P-256 key signed.
        """
        assert name != HEAD
        if len(signing_request) > MAX_PEM_BYTES:
            raise FrameError(f"a signing request of {len(signing_request)} bytes")
        try:
            request = x509.load_pem_x509_csr(signing_request)
            public_key, valid = request.public_key(), request.is_signature_valid
        except (ValueError, x509.InvalidVersion, UnsupportedAlgorithm, InvalidSignature) as error:
            raise FrameError("not a signing request") from error
        if not isinstance(public_key, ec.EllipticCurvePublicKey) or not isinstance(public_key.curve, ec.SECP256R1):
            raise FrameError("a signing request for another kind of key than ECDSA P-256")
        if not valid:
            raise FrameError("a signing request whose signature is wrong")
        return self._issue(name, public_key, _NODE_LIFE, token_id=token_id)

    def _issue(self, name: str, public_key: ec.EllipticCurvePublicKey, life: timedelta, *, token_id: str) -> bytes:
        now = datetime.now(UTC)
        return to_pem(
            issue(
                name,
                public_key,
                issuer=self._issuer.subject,
                issuer_key=self._key,
                starts=now - _SKEW,
                expires=min(now + life, self._issuer.not_valid_after_utc),
                token_id=token_id,
            )
        )

    def _head_key(self) -> ec.EllipticCurvePrivateKey:
        path = self.directory / "head.pem"
        try:
            return _read_key(_keep(path, lambda: key_to_pem(new_key())))
        except (ValueError, TypeError) as error:
            raise ConfigError(
                f"{path} is damaged. Restore it, or delete it: then join tokens must be made anew."
            ) from error


def issue(
    name: str,
    public_key: ec.EllipticCurvePublicKey,
    *,
    issuer: x509.Name,
    issuer_key: ec.EllipticCurvePrivateKey,
    starts: datetime,
    expires: datetime,
    token_id: str = "",
) -> x509.Certificate:
    """A certificate for client and server alike."""
    assert _NAME.fullmatch(name), name
    assert _TOKEN_ID.fullmatch(token_id), token_id
    subject = [x509.NameAttribute(NameOID.COMMON_NAME, name)]
    if token_id:
        subject.append(x509.NameAttribute(NameOID.ORGANIZATIONAL_UNIT_NAME, token_id))
    usages = [ExtendedKeyUsageOID.CLIENT_AUTH, ExtendedKeyUsageOID.SERVER_AUTH]
    return (
        _builder(x509.Name(subject), issuer, public_key, starts, expires)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(x509.SubjectAlternativeName([x509.DNSName(name)]), critical=False)
        .add_extension(_key_usage(signs_certificates=False), critical=True)
        .add_extension(x509.ExtendedKeyUsage(usages), critical=False)
        .add_extension(
            x509.AuthorityKeyIdentifier.from_issuer_public_key(issuer_key.public_key()),
            critical=False,
        )
        .sign(issuer_key, hashes.SHA256())
    )


def read_member(certificate: bytes, authority: x509.Certificate) -> Member:
    """Whom a peer's certificate names. Raises TransportError, with a reason for a person, unless the authority itself
    issued it and it is in force."""
    leaf = read_certificate(certificate)
    try:
        leaf.verify_directly_issued_by(authority)
        public_key = leaf.public_key()
    except (ValueError, TypeError, InvalidSignature, UnsupportedAlgorithm) as error:
        raise TransportError("its certificate was not issued by this cluster") from error
    assert isinstance(public_key, ec.EllipticCurvePublicKey)
    name, token_id = holder_of(leaf)
    member = Member(
        name=name,
        token_id=token_id,
        starts=leaf.not_valid_before_utc,
        expires=leaf.not_valid_after_utc,
        public_key=public_key,
    )
    check_in_force(member)
    return member


def holder_of(certificate: x509.Certificate) -> tuple[str, str]:
    """Name and token id that it states, whoever issued it. Raises TransportError when it states none."""
    try:
        alternatives = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        names = alternatives.get_values_for_type(x509.DNSName)
        units = certificate.subject.get_attributes_for_oid(NameOID.ORGANIZATIONAL_UNIT_NAME)
    except (ValueError, x509.ExtensionNotFound, x509.DuplicateExtension) as error:
        raise TransportError("its certificate has no name") from error
    if len(names) != 1 or not _NAME.fullmatch(names[0]) or len(units) > 1:
        raise TransportError("its certificate has no name")
    return names[0], "".join(str(unit.value) for unit in units)


def token_id_of(identity: Identity) -> str:
    """The join token by which its holder came; empty: without one."""
    return read_member(identity.certificate, read_certificate(identity.authority)).token_id


def check_in_force(member: Member) -> None:
    """Raise TransportError before and after the certificate's time."""
    now = datetime.now(UTC)
    if now > member.expires:
        raise TransportError(f"the certificate of {member.name} expired on {member.expires:%Y-%m-%d}")
    if now < member.starts:
        raise TransportError(
            f"the certificate of {member.name} starts on {member.starts:%Y-%m-%d}; compare the machines' clocks"
        )


def read_certificate(data: bytes) -> x509.Certificate:
    """Raises TransportError for anything but one PEM certificate."""
    if len(data) > MAX_PEM_BYTES:
        raise TransportError(f"a certificate of {len(data)} bytes")
    try:
        return x509.load_pem_x509_certificate(data)
    except (ValueError, x509.InvalidVersion) as error:
        raise TransportError("what should be a certificate is none") from error


def pin_of(public_key: CertificatePublicKeyTypes) -> bytes:
    """The fingerprint by which join tokens name a key."""
    encoded = public_key.public_bytes(serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)
    return hashlib.sha256(encoded).digest()[:PIN_BYTES]


def new_key() -> ec.EllipticCurvePrivateKey:
    return ec.generate_private_key(ec.SECP256R1())


def new_signing_request(key: ec.EllipticCurvePrivateKey) -> bytes:
    """It names nobody: names are the authority's to give."""
    builder = x509.CertificateSigningRequestBuilder().subject_name(x509.Name([]))
    return builder.sign(key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)


def to_pem(certificate: x509.Certificate) -> bytes:
    return certificate.public_bytes(serialization.Encoding.PEM)


def key_to_pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )


# ------------------------------------------------------------------------------------------ the enrolment identity

# gRPC in Python can demand a certificate of every caller or ask none for one, so whoever has none yet shows this one.
# Its key is public, hence it proves nothing: it only lets a caller in as far as `Enrolment`, whose token proves more.
ENROLMENT_NAME = "enrolment"
_P256_ORDER = 0xFFFFFFFF00000000FFFFFFFFFFFFFFFFBCE6FAADA7179E84F3B9CAC2FC632551


def enrolment_identity() -> Identity:
    """The same bytes everywhere, for a server trusts the certificate itself. Its own authority."""
    seed = hashlib.sha256(b"tllm enrolment: this key is public and proves nothing").digest()
    key = ec.derive_private_key(int.from_bytes(seed, "big") % (_P256_ORDER - 1) + 1, ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, ENROLMENT_NAME)])
    starts, expires = datetime(2020, 1, 1, tzinfo=UTC), datetime(2120, 1, 1, tzinfo=UTC)
    certificate = (
        _builder(name, name, key.public_key(), starts, expires, serial=1)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(x509.SubjectAlternativeName([x509.DNSName(ENROLMENT_NAME)]), critical=False)
        .sign(key, hashes.SHA256(), ecdsa_deterministic=True)
    )
    pem = to_pem(certificate)
    return Identity(name=ENROLMENT_NAME, certificate=pem, key=key_to_pem(key), authority=pem)


# ------------------------------------------------------------------------------------------ files of a cluster


@contextlib.contextmanager
def locked(directory: Path) -> Iterator[None]:
    """Against other processes that would change the files of this cluster at the same time."""
    lock = os.open(directory / ".lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
    finally:
        os.close(lock)


def write_private(path: Path, data: bytes) -> None:
    """Replace the file as a whole: another process, or a crash, sees the old one or the new one. Mode 0600."""
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)
        raise


def read_private(path: Path) -> bytes:
    """Raises ConfigError when others could have read it too, and OSError as reading does."""
    with path.open("rb") as file:
        if os.fstat(file.fileno()).st_mode & 0o077:
            raise ConfigError(
                f"{path} holds a secret and other users may read it. If none did: chmod 600 {path}; "
                f"otherwise delete {path.parent} and let every node join again."
            )
        return file.read()


def _keep(path: Path, make: Callable[[], bytes]) -> bytes:
    """What the file says; it is written first where there is none."""
    with locked(path.parent):
        if not path.exists():
            write_private(path, make())
        return read_private(path)


def _make_authority() -> bytes:
    key = new_key()
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, f"tllm cluster {os.urandom(4).hex()}")])
    now = datetime.now(UTC)
    certificate = (
        _builder(name, name, key.public_key(), now - _SKEW, now + _AUTHORITY_LIFE)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_key_usage(signs_certificates=True), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .sign(key, hashes.SHA256())
    )
    return key_to_pem(key) + to_pem(certificate)


def _read_key(data: bytes) -> ec.EllipticCurvePrivateKey:
    key = serialization.load_pem_private_key(data, None)
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise ValueError("a key of another kind")
    return key


def _builder(
    subject: x509.Name,
    issuer: x509.Name,
    public_key: ec.EllipticCurvePublicKey,
    starts: datetime,
    expires: datetime,
    *,
    serial: int | None = None,
) -> x509.CertificateBuilder:
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(public_key)
        .serial_number(serial or x509.random_serial_number())
        .not_valid_before(starts)
        .not_valid_after(expires)
    )


def _key_usage(*, signs_certificates: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not signs_certificates,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=signs_certificates,
        crl_sign=signs_certificates,
        encipher_only=False,
        decipher_only=False,
    )
