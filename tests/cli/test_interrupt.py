"""Ctrl-C ends a verb at any time, and nothing that it started outlives it."""

from __future__ import annotations

import asyncio
import signal
import threading

import pytest

from tests.system.processes import alive, poll, tllm
from tllm.core.errors import ModelError
from tllm.models import repository


@pytest.mark.parametrize("verb", ["run", "demo"])
def test_ctrl_c_while_the_model_loads_ends_at_once_and_leaves_no_child(verb):
    with tllm(verb) as command:
        poll(lambda: len(command.workers()) > 0, deadline_s=30, what="a worker that loads")
        family = [process.pid for process in command.family()]
        command.process.send_signal(signal.SIGINT)
        assert command.process.wait(timeout=15) == 130, command.output
        poll(lambda: not alive(family), deadline_s=5, what="the end of every child")
        assert "Serving" not in command.output
        assert "Traceback" not in command.output


@pytest.mark.parametrize("verb", [["serve"], ["run"]])
def test_a_model_is_fetched_where_ctrl_c_still_ends_the_verb(verb, monkeypatch):
    """On the main thread, without a loop that could have taken the signal for itself."""
    from typer.testing import CliRunner

    from tllm.cli import app

    seen = []

    def fetch(name: str) -> None:
        with pytest.raises(RuntimeError):
            asyncio.get_running_loop()
        seen.append((name, threading.current_thread() is threading.main_thread(), signal.getsignal(signal.SIGINT)))
        raise ModelError("enough")

    monkeypatch.setattr(repository, "resolve_model", fetch)
    result = CliRunner().invoke(app, [*verb, "org/name"])
    assert isinstance(result.exception, ModelError)
    assert seen == [("org/name", True, signal.default_int_handler)]
