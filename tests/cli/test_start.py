"""The command answers at once and without what only some verbs need."""

from __future__ import annotations

import subprocess
import sys

import pytest

import tllm

_WITHOUT = """
import importlib.abc, sys

class Absent(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {absent!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

sys.meta_path.insert(0, Absent())
sys.argv = ["tllm", *{arguments!r}]
from tllm.cli import main
main()
"""


def without(absent: list[str], *arguments: str) -> subprocess.CompletedProcess[str]:
    """`tllm ARGUMENTS` where those packages cannot be imported."""
    program = _WITHOUT.format(absent=absent, arguments=list(arguments))
    return subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)


@pytest.mark.parametrize(
    "verb",
    [
        [],
        ["serve"],
        ["join"],
        ["run"],
        ["demo"],
        ["doctor"],
        ["version"],
        ["bench"],
        ["bench", "latency"],
        ["nodes"],
        ["drain"],
    ],
)
def test_help_of_every_verb_imports_neither_torch_nor_grpc_nor_the_web_framework(verb):
    shown = without(["torch", "grpc", "numpy", "fastapi", "uvicorn", "transformers", "rich"], *verb, "--help")
    assert shown.returncode == 0, shown.stderr
    assert "Usage: tllm" in shown.stdout


def test_version_works_without_torch():
    shown = without(["torch", "numpy", "grpc"], "version")
    assert shown.returncode == 0, shown.stderr
    assert shown.stdout.startswith(f"tllm {tllm.__version__}\n")
