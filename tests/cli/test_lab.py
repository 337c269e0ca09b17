"""Measurements are of whole answers, and waiting for a server ends."""

from __future__ import annotations

import subprocess
import sys
import textwrap

import pytest

from tests.cli.http_server import answering
from tllm.core.errors import TransportError, UnavailableError
from tllm.lab import server
from tllm.lab.latency import _stream, stream_rate


def frame(*ids: int) -> str:
    return f'data: {{"choices": [{{"index": 0, "text": "", "token_ids": {list(ids)}}}]}}\n\n'


DONE = "data: [DONE]\n\n"


def test_a_whole_stream_is_measured():
    with answering(frame(1) + frame(2) + frame(3) + frame() + DONE) as url:
        stream = _stream(url, "any", [1], 3)
        assert stream.asked_s < stream.first_s < stream.last_s
        assert stream_rate(url, "any", prompt=[1], num_tokens=3) > 0


def test_an_error_frame_is_not_a_token():
    with (
        answering(frame(1) + 'data: {"error": {"message": "out of nodes"}}\n\n') as url,
        pytest.raises(UnavailableError, match="out of nodes"),
    ):
        _stream(url, "any", [1], 2)


@pytest.mark.parametrize("ids", [[], [1], [1, 2, 3]])
def test_fewer_or_more_tokens_than_asked_for_are_an_error(ids):
    with (
        answering("".join(map(frame, ids)) + DONE) as url,
        pytest.raises(UnavailableError, match=f"{len(ids)} tokens instead of 2"),
    ):
        _stream(url, "any", [1], 2)


def test_a_refusal_and_a_dropped_connection_are_errors():
    with answering("no such model", status=404) as url, pytest.raises(UnavailableError, match="404: no such model"):
        _stream(url, "any", [1], 2)
    with answering(frame(1) + frame(2), missing=10) as url, pytest.raises(TransportError, match="broke"):
        _stream(url, "any", [1], 2)


def started(program: str) -> subprocess.Popen[bytes]:
    return subprocess.Popen([sys.executable, "-c", textwrap.dedent(program)], stdout=subprocess.PIPE)


def test_a_server_that_says_nothing_is_given_up(monkeypatch):
    monkeypatch.setattr(server, "_READY_S", 0.2)
    with started("print('Loading', flush=True); import signal; signal.pause()") as process:
        with pytest.raises(UnavailableError, match="not ready after"):
            server._ready(process)
        process.kill()


def test_a_server_that_ends_is_quoted():
    with (
        started("print('tllm: no port is free')") as process,
        pytest.raises(UnavailableError, match="ended before it was ready:\ntllm: no port is free"),
    ):
        server._ready(process)


def test_a_server_is_found_by_its_line_however_it_arrives():
    with started(
        """
        import sys
        for piece in ("Loading\\n\\nAPI   http://[fd00", "::5]:1/v1   model /a b", "/[c]\\n\\ncurl ..."):
            sys.stdout.write(piece)
            sys.stdout.flush()
        """
    ) as process:
        assert server._ready(process) == server.Server(url="http://[fd00::5]:1", model="/a b/[c]")
