"""What the documents tell a reader to type works as written."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys

import pytest

from tests.api.node_client import observe
from tests.system.processes import repository

READMES = ["README.md", "README.zh.md"]
GOLDEN = json.loads((repository() / "src/tllm/demo/golden.json").read_text())


def blocks(readme: str, language: str = "") -> list[str]:
    """Contents of the fenced blocks of that language; "" are those without a label."""
    text = (repository() / readme).read_text()
    fenced = re.findall(r"^```(\w*)\n(.*?)^```$", text, flags=re.MULTILINE | re.DOTALL)
    return [content for label, content in fenced if label == language]


def commands(readme: str, program: str) -> list[list[str]]:
    """Command lines of that program in a document, comments dropped."""
    lines = [line for block in blocks(readme) for line in block.replace("\\\n", " ").splitlines()]
    words = [shlex.split(line, comments=True) for line in lines if line.startswith((program, f".venv/bin/{program}"))]
    return [line for line in words if line]


@pytest.mark.parametrize("readme", READMES)
def test_every_flag_and_verb_in_the_readme_exists(readme):
    found = commands(readme, "tllm")
    assert len(found) >= 5
    for _, verb, *rest in found:
        shown = subprocess.run(
            [sys.executable, "-m", "tllm", verb, "--help"], capture_output=True, text=True, check=True
        )
        for flag in (word for word in rest if word.startswith("--")):
            assert flag in shown.stdout, f"{verb} has no {flag}"


@pytest.mark.parametrize("readme", READMES)
def test_the_curl_command_answers(readme, server):
    (command,) = commands(readme, "curl")
    line = [word.replace("http://127.0.0.1:8022", server.url) for word in command]
    answer = json.loads(subprocess.run([*line, "--silent"], capture_output=True, check=True).stdout)
    assert answer["choices"][0]["message"]["content"] == GOLDEN[0]["answer"]


@pytest.mark.parametrize("readme", READMES)
def test_the_python_program_prints_the_answer(readme, server):
    (program,) = blocks(readme, "python")
    assert "http://127.0.0.1:8022" in program
    program = program.replace("http://127.0.0.1:8022", server.url)
    printed = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    assert printed.strip() == GOLDEN[0]["answer"]


@pytest.mark.parametrize("readme", READMES)
def test_the_make_targets_of_the_readme_exist(readme):
    targets = {line[1] for line in commands(readme, "make")}
    assert {"demo", "test"} <= targets
    makefile = (repository() / "Makefile").read_text()
    for target in targets:
        assert re.search(rf"^{target}:", makefile, flags=re.MULTILINE)


@pytest.mark.parametrize("readme", READMES)
def test_links_between_documents_lead_somewhere(readme):
    for target in re.findall(r"\]\(([^)#:]+)\)", (repository() / readme).read_text()):
        assert (repository() / target).exists(), target


def test_the_npm_client_reads_answers_streams_and_errors_of_the_live_server(server):
    seen = observe(f"{server.url}/v1", "any", server.model)
    assert seen["whole"]["text"] == seen["streamed"]["text"] == seen["withUsage"]["text"]
    assert seen["whole"]["finish"] == "stop"
    assert seen["withUsage"]["usage"]["completion_tokens"] == seen["whole"]["usage"]["completion_tokens"]
    assert seen["models"] == [server.model]
    errors = seen["errors"]
    assert (errors["model"]["kind"], errors["model"]["code"]) == ("NotFoundError", "model_not_found")
    assert (errors["parameter"]["kind"], errors["parameter"]["param"]) == ("BadRequestError", "temperature")
    assert (errors["context"]["kind"], errors["context"]["code"]) == ("BadRequestError", "context_length_exceeded")
