"""Where a server listens."""

from __future__ import annotations

import socket
from contextlib import closing

from tllm.cli.serving import _listen


def test_the_end_of_an_answer_does_not_wait_for_its_beginning_to_be_acknowledged() -> None:
    with closing(_listen("127.0.0.1", 0)) as listener, closing(socket.create_connection(listener.getsockname())):
        connection, _ = listener.accept()
        with closing(connection):
            assert connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
