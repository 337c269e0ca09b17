"""Authorities, identities and join tokens: what lies on disk, what is signed, what is refused."""

from __future__ import annotations

import os
import stat
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.x509.oid import NameOID
from hypothesis import given
from hypothesis import strategies as st

from tllm.core.errors import ConfigError, FrameError, TransportError
from tllm.testing.identities import expired, forged, members
from tllm.transport.tokens import DEFAULT_LABEL, JoinToken, TokenStore
from tllm.transport.trust import (
    Authority,
    Identity,
    check_in_force,
    enrolment_identity,
    new_key,
    new_signing_request,
    read_certificate,
    read_member,
)


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    return Authority.open(tmp_path / "cluster")


def files(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def test_an_authority_is_made_once_and_only_its_owner_can_read_it(tmp_path: Path) -> None:
    directory = tmp_path / "state" / "cluster"
    first = Authority.open(directory)
    pin = first.pin
    TokenStore(first).default()
    kept = files(directory)
    again = Authority.open(directory)
    assert (again.certificate, again.pin) == (first.certificate, pin)
    assert files(directory) == kept
    assert stat.S_IMODE(directory.stat().st_mode) == 0o700
    assert {stat.S_IMODE(path.stat().st_mode) for path in directory.iterdir()} == {0o600}
    assert {"authority.pem", "head.pem", "tokens.json"} <= kept.keys()


def test_those_who_open_at_the_same_time_get_the_same_authority_and_token(tmp_path: Path) -> None:
    def open_(_number: int) -> tuple[bytes, bytes, str]:
        authority = Authority.open(tmp_path / "cluster")
        return authority.certificate, authority.pin, TokenStore(authority).default()

    with ThreadPoolExecutor(8) as threads:
        assert len(set(threads.map(open_, range(16)))) == 1


def test_an_identity_is_its_names_for_its_time(authority: Authority) -> None:
    now = datetime.now(UTC)
    node, head = authority.identity("n-1"), authority.identity("head")
    for identity, days in ((node, 1095), (head, 1095)):
        member = read_member(identity.certificate, read_certificate(authority.certificate))
        assert (member.name, member.token_id) == (identity.name, "")
        assert abs(identity.expires - now - timedelta(days=days)) < timedelta(minutes=1)
        assert now - member.starts >= timedelta(days=1) - timedelta(minutes=1)  # a clock that is behind
    assert authority.identity("n-1").key != node.key
    assert authority.identity("head").key == head.key


def test_an_identity_crosses_a_pipe_and_never_shows_its_key(authority: Authority) -> None:
    identity = authority.identity("n-1")
    assert Identity.from_message(identity.to_message()) == identity
    assert "BEGIN" not in repr(identity)


@pytest.mark.parametrize("field", ["name", "certificate", "key", "authority"])
def test_a_message_that_is_put_together_from_two_identities_is_none(tmp_path: Path, field: str) -> None:
    (ours,), (theirs,) = members(tmp_path / "a", "n-1"), members(tmp_path / "b", "n-2")
    mixed = replace(ours, **{field: getattr(theirs, field)})
    with pytest.raises(FrameError):
        Identity.from_message(mixed.to_message())
    with pytest.raises(FrameError):
        Identity.from_message(replace(ours, **{field: "n-3" if field == "name" else b"nonsense"}).to_message())


def test_a_signing_request_gets_the_name_that_the_authority_gives(authority: Authority) -> None:
    key = new_key()
    wish = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "head")])
    request = (
        x509.CertificateSigningRequestBuilder()
        .subject_name(wish)
        .add_extension(x509.SubjectAlternativeName([x509.DNSName("head")]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    pem = authority.sign("n-1", request.public_bytes(serialization.Encoding.PEM), token_id="0badcafe")
    member = read_member(pem, read_certificate(authority.certificate))
    assert (member.name, member.token_id, member.public_key) == ("n-1", "0badcafe", key.public_key())
    constraints = read_certificate(pem).extensions.get_extension_for_class(x509.BasicConstraints).value
    assert not constraints.ca


def rsa_request() -> bytes:
    key = rsa.generate_private_key(65537, 2048)
    builder = x509.CertificateSigningRequestBuilder().subject_name(x509.Name([]))
    return builder.sign(key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)


def other_curve_request() -> bytes:
    builder = x509.CertificateSigningRequestBuilder().subject_name(x509.Name([]))
    key = ec.generate_private_key(ec.SECP384R1())
    return builder.sign(key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)


def tampered_request() -> bytes:
    """Somebody else's public key under one's own signature."""
    request = x509.load_pem_x509_csr(new_signing_request(new_key()))
    encoded = bytearray(request.public_bytes(serialization.Encoding.DER))
    encoded[-1] ^= 1
    return x509.load_der_x509_csr(bytes(encoded)).public_bytes(serialization.Encoding.PEM)


@pytest.mark.parametrize(
    "request_",
    [b"", b"nonsense", b"x" * 100_000, rsa_request(), other_curve_request(), tampered_request()],
    ids=["empty", "nonsense", "oversized", "rsa", "other curve", "tampered"],
)
def test_what_is_no_signing_request_for_a_p256_key_is_refused(authority: Authority, request_: bytes) -> None:
    with pytest.raises(FrameError):
        authority.sign("n-1", request_)


@given(data=st.binary(max_size=300))
def test_any_bytes_are_a_certificate_or_a_transport_error(data: bytes) -> None:
    with pytest.raises(TransportError):
        read_certificate(data)


def test_nobody_but_the_authority_makes_members(tmp_path: Path) -> None:
    ours, other = members(tmp_path / "a", "n-1")[0], members(tmp_path / "b", "n-1")[0]
    authority = read_certificate(ours.authority)
    for impostor in (other, forged("n-1", ours), forged("head", ours), enrolment_identity()):
        with pytest.raises(TransportError, match="not issued by this cluster"):
            read_member(impostor.certificate, authority)
    with pytest.raises(TransportError, match="expired"):
        read_member(expired(tmp_path / "a", "n-1").certificate, authority)
    with pytest.raises(TransportError, match="no name"):
        read_member(ours.authority, authority)  # it issued itself


def test_a_member_is_none_before_and_after_its_time(authority: Authority) -> None:
    member = read_member(authority.identity("n-1").certificate, read_certificate(authority.certificate))
    hour = timedelta(hours=1)
    with pytest.raises(TransportError, match="expired"):
        check_in_force(replace(member, expires=datetime.now(UTC) - hour))
    with pytest.raises(TransportError, match="clocks"):
        check_in_force(replace(member, starts=datetime.now(UTC) + hour))


def test_the_enrolment_identity_is_the_same_everywhere() -> None:
    assert enrolment_identity() == enrolment_identity()


@pytest.mark.parametrize("name", ["authority.pem", "head.pem", "tokens.json"])
def test_a_damaged_or_readable_file_is_an_error_that_names_it(tmp_path: Path, name: str) -> None:
    authority = Authority.open(tmp_path)
    TokenStore(authority).default()
    for spoil in (lambda path: path.write_bytes(path.read_bytes()[:40]), lambda path: path.chmod(0o644)):
        spoil(tmp_path / name)
        with pytest.raises(ConfigError, match=name):
            TokenStore(Authority.open(tmp_path)).tokens()


# ---------------------------------------------------------------------------------------------------- join tokens

JOIN_TOKENS = st.builds(
    JoinToken,
    token_id=st.binary(min_size=4, max_size=4).map(bytes.hex),
    secret=st.binary(min_size=16, max_size=16),
    pin=st.binary(min_size=16, max_size=16),
)


@given(token=JOIN_TOKENS)
def test_a_join_token_is_its_text(token: JoinToken) -> None:
    assert JoinToken.parse(f" {token.text}\n") == token
    assert "secret" not in repr(token)


@given(token=JOIN_TOKENS, data=st.data())
def test_a_damaged_token_is_an_error_that_does_not_repeat_it(token: JoinToken, data: st.DataObject) -> None:
    cut = data.draw(st.integers(1, 53))
    damaged = data.draw(
        st.sampled_from([token.text[:cut], token.text + "A", token.text[1:], token.text[:cut] + "!" + token.text[cut:]])
    )
    with pytest.raises(ConfigError) as raised:
        JoinToken.parse(damaged)
    assert token.text[6:20] not in str(raised.value)


@given(text=st.text(max_size=80))
def test_any_text_is_a_token_or_a_config_error(text: str) -> None:
    with pytest.raises(ConfigError):
        JoinToken.parse(text)


def test_the_default_token_stays_until_it_is_revoked(authority: Authority) -> None:
    store = TokenStore(authority)
    text = store.default()
    assert store.default() == TokenStore(authority).default() == text
    assert JoinToken.parse(text).pin == authority.pin
    store.revoke(JoinToken.parse(text).token_id)
    assert store.default() != text
    assert [(token.label, token.revoked) for token in store.tokens()] == [(DEFAULT_LABEL, True), (DEFAULT_LABEL, False)]


def test_a_store_sees_at_once_what_another_process_did(authority: Authority) -> None:
    head, command_line = TokenStore(authority), TokenStore(authority)
    token_id = JoinToken.parse(command_line.new("for ada")).token_id
    assert [token.id for token in head.tokens()] == [token_id]
    assert not head.is_revoked(token_id)
    command_line.revoke(token_id)
    assert head.is_revoked(token_id)
    os.unlink(authority.directory / "tokens.json")
    assert head.is_revoked(token_id)
    assert not head.is_revoked("")  # came over a Unix socket


def test_tokens_that_are_made_at_the_same_time_are_all_kept(authority: Authority) -> None:
    with ThreadPoolExecutor(8) as threads:
        texts = list(threads.map(lambda number: TokenStore(authority).new(str(number)), range(24)))
    store = TokenStore(authority)
    assert {store.text(token) for token in store.tokens()} == set(texts)
    assert len(set(texts)) == 24


def test_a_token_that_does_not_exist_cannot_be_revoked_nor_one_without_time_be_made(authority: Authority) -> None:
    with pytest.raises(ConfigError, match="tllm token ls"):
        TokenStore(authority).revoke("00000000")
    for ttl_s in (0.0, -1.0, float("inf"), float("nan")):
        with pytest.raises(ConfigError):
            TokenStore(authority).new(ttl_s=ttl_s)


def test_a_token_expires_for_newcomers_only(authority: Authority) -> None:
    store = TokenStore(authority, clock=lambda: 1000.0)
    token_id = JoinToken.parse(store.new(ttl_s=60)).token_id
    (token,) = store.tokens()
    assert [token.state(now_s) for now_s in (1000.0, 1059.0, 1060.0)] == ["valid", "valid", "expired"]
    assert not store.is_revoked(token_id)
