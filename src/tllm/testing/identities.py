"""Members of a throw-away cluster, and impostors: certificates that look like a member's and are not.

This file does not know what is done with them.
"""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from tllm.transport.trust import Authority, Identity, enrolment_identity, issue, key_to_pem, new_key, to_pem


def members(directory: Path, *names: str) -> tuple[Identity, ...]:
    """An identity for each name, of the one cluster whose authority lies in the directory."""
    authority = Authority.open(directory)
    return tuple(authority.identity(name) for name in names)


def expired(directory: Path, name: str) -> Identity:
    """What a member of that cluster was until an hour ago."""
    authority = Authority.open(directory)
    data = (directory / "authority.pem").read_bytes()
    now = datetime.now(UTC)
    return _issued(
        name, data, data, authority.certificate, starts=now - timedelta(days=2), expires=now - timedelta(hours=1)
    )


def forged(name: str, real: Identity) -> Identity:
    """A certificate for any name, signed with the enrolment identity's key, which everybody has; believes what `real`
    believes."""
    enrolment = enrolment_identity()
    now = datetime.now(UTC)
    return _issued(
        name,
        enrolment.key,
        enrolment.certificate,
        real.authority,
        starts=now - timedelta(days=1),
        expires=now + timedelta(days=1),
    )


def _issued(
    name: str, issuer_key: bytes, issuer: bytes, authority: bytes, *, starts: datetime, expires: datetime
) -> Identity:
    signing_key = serialization.load_pem_private_key(issuer_key, None)
    assert isinstance(signing_key, ec.EllipticCurvePrivateKey)
    key = new_key()
    certificate = issue(
        name,
        key.public_key(),
        issuer=x509.load_pem_x509_certificate(issuer).subject,
        issuer_key=signing_key,
        starts=starts,
        expires=expires,
    )
    return Identity(name=name, certificate=to_pem(certificate), key=key_to_pem(key), authority=authority)
