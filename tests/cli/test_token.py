"""`tllm token`, on a cluster of its own."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from typer.testing import CliRunner

from tllm.cli.token import app
from tllm.core.errors import ConfigError
from tllm.transport.tokens import JoinToken, TokenStore
from tllm.transport.trust import Authority


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> TokenStore:
    """Of a head on the same machine."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    return TokenStore(Authority.open(tmp_path / "tllm" / "cluster"))


def tllm_token(*arguments: str) -> str:
    return CliRunner().invoke(app, arguments, catch_exceptions=False).stdout


def test_a_token_is_made_listed_without_its_secret_and_revoked(store: TokenStore) -> None:
    text = tllm_token("new", "--label", "for ada", "--ttl", "12h").strip()
    token_id = JoinToken.parse(text).token_id
    (token,) = store.tokens()
    assert token.expires_s == pytest.approx(token.created_s + 12 * 3600)
    listed = tllm_token("ls")
    assert re.search(rf"{token_id}  valid  .*  for ada\n", listed)
    assert text not in listed
    assert token.secret not in listed
    tllm_token("revoke", token_id)
    assert store.is_revoked(token_id)
    assert "revoked" in tllm_token("ls")


@pytest.mark.parametrize("ttl", ["0h", "12", "-1d", "soon", "1.5h", ""])
def test_a_time_that_is_none_is_refused(store: TokenStore, ttl: str) -> None:
    with pytest.raises(ConfigError, match="such as 30m"):
        tllm_token("new", "--ttl", ttl)
    assert store.tokens() == ()


def test_a_token_that_does_not_exist_cannot_be_revoked(store: TokenStore) -> None:
    with pytest.raises(ConfigError, match="no token 'abc'"):
        tllm_token("revoke", "abc")
