"""Runs openai-node against a server and returns what it saw; any test that has a server can use it.

It does not know what the server should say.
"""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path

import pytest

DIRECTORY = Path(__file__).parents[1] / "system" / "node"
MIN_NODE = 20


def observe(base_url: str, api_key: str, model: str, *, timeout_s: float = 60.0) -> dict:
    """The observations of `client.mjs`. Skips the test where there is no node; installs the locked client once."""
    node, npm = shutil.which("node"), shutil.which("npm")
    if node is None or npm is None:
        pytest.skip(f"node {MIN_NODE} or later and npm are needed to run the openai-node client; they are not on PATH")
    version = subprocess.run([node, "--version"], capture_output=True, text=True, check=True).stdout.strip()
    if int(version.removeprefix("v").split(".")[0]) < MIN_NODE:
        pytest.skip(f"node {MIN_NODE} or later is needed to run the openai-node client; this is {version}")
    if not (DIRECTORY / "node_modules" / ".package-lock.json").is_file():
        subprocess.run([npm, "ci", "--ignore-scripts"], cwd=DIRECTORY, check=True, timeout=100, capture_output=True)
    result = subprocess.run(
        [node, "client.mjs", base_url, api_key, model],
        cwd=DIRECTORY,
        capture_output=True,
        text=True,
        timeout=timeout_s,
    )
    assert result.returncode == 0, result.stderr
    observed = json.loads(result.stdout)
    assert isinstance(observed, dict)
    return observed
