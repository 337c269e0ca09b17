"""Every `tllm estimate` of the guides runs, and prints what the guides say that it prints."""

from __future__ import annotations

import re
import shlex
from functools import cache
from itertools import pairwise
from pathlib import Path

import pytest
from typer.testing import CliRunner

from tllm.cli import app

GUIDES = Path(__file__).parents[2] / "docs" / "guides"
WALK = (GUIDES / "why-is-it-this-fast.md").read_text()
ERRATA = (GUIDES / "errata.md").read_text()
ELIDED = "..."


@cache
def output(command: str) -> str:
    tllm, *arguments = shlex.split(command)
    assert tllm == "tllm"
    result = CliRunner().invoke(app, arguments, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.stdout


def quoted_blocks() -> list[tuple[str, str]]:
    """Each block of output, with the command before it."""
    command, found = "", []
    for kind, content in re.findall(r"^```(\w*)\n(.*?)^```$", WALK, re.MULTILINE | re.DOTALL):
        if kind == "bash":
            command = content.strip()
        else:
            assert kind == "text", kind
            found.append((command, content))
    return found


def errata_rows() -> list[tuple[str, tuple[str, ...]]]:
    """Each command in a table, with what stands after it as its output."""
    found = []
    for row in ERRATA.splitlines():
        spans = re.findall(r"`([^`]*)`", row.rpartition(" | ")[2]) if row.startswith("|") else []
        starts = [at for at, span in enumerate(spans) if span.startswith("tllm estimate")]
        for start, stop in pairwise([*starts, len(spans)]):
            found.append((spans[start], tuple(spans[start + 1 : stop])))
    return found


def one_space(text: str) -> str:
    return " ".join(text.split())


@pytest.mark.parametrize(("command", "block"), quoted_blocks())
def test_the_guide_quotes_what_the_command_prints(command: str, block: str) -> None:
    rest = output(command).splitlines()
    for line in block.splitlines():
        if line not in ("", ELIDED):
            assert line in rest, f"`{command}` does not print, or not there: {line}"
            rest = rest[rest.index(line) + 1 :]


@pytest.mark.parametrize(("command", "fragments"), errata_rows())
def test_the_errata_quote_what_the_command_prints(command: str, fragments: tuple[str, ...]) -> None:
    assert fragments, f"{command} is not followed by what it prints"
    lines = [one_space(line) for line in output(command).splitlines()]
    for fragment in fragments:
        assert any(fragment in line for line in lines), f"`{command}` does not print: {fragment}"


def test_no_command_of_the_guides_is_left_out() -> None:
    walked = {command for command, _ in quoted_blocks()}
    assert set(re.findall(r"^tllm estimate .*$", WALK, re.MULTILINE)) == walked
    assert len(walked) >= 12
    assert set(re.findall(r"`(tllm estimate [^`]*-[^`]*)`", ERRATA)) == {command for command, _ in errata_rows()}
    assert len(errata_rows()) >= 20
