"""What the documents tell a reader to type works as written."""

from __future__ import annotations

import functools
import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.api.node_client import observe
from tests.system.processes import Server, Tllm, repository, serve, tllm

READMES = ["README.md", "README.zh.md"]
GUIDES = sorted(str(path.relative_to(repository())) for path in (repository() / "docs").rglob("*.md"))
GROUPS = ("token", "cache", "bench", "estimate", "lab")  # verbs of verbs
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
    found = commands(readme, "tllm ")
    assert {line[1] for line in found} >= {"serve", "run", "join", "nodes", "drain", "plan", "token", "cache", "doctor"}
    for _, verb, *rest in found:
        words = (verb, rest[0]) if verb in GROUPS else (verb,)
        for flag in (word for word in rest if word.startswith("--")):
            assert flag in help_of(*words), f"{words} has no {flag}"


@functools.cache
def help_of(*words: str) -> str:
    return run(*words, "--help")


def test_the_calculator_answers_what_the_readme_asks():
    asked = [line[1:] for line in commands("README.md", "tllm ") if line[1] == "estimate"]
    model, network = (run(*words) for words in asked)
    assert re.search(r"tokens per second +7\.\d+ tokens/s", model)
    assert "impossible" in network or "Mb/s" in network


def test_both_readmes_tell_a_reader_to_type_the_same():
    for program in ("tllm", "make", "curl"):
        assert commands("README.md", program) == commands("README.zh.md", program)
    assert blocks("README.md", "python") == blocks("README.zh.md", "python")


def run(*words: str, environment: dict[str, str] | None = None) -> str:
    """What `tllm WORDS` prints; it must end well."""
    done = subprocess.run(
        [sys.executable, "-m", "tllm", *words],
        capture_output=True,
        text=True,
        env={**os.environ, "COLUMNS": "160", **(environment or {})},
        timeout=60,
    )
    assert done.returncode == 0, f"tllm {shlex.join(words)}: {done.stdout}{done.stderr}"
    return done.stdout


@dataclass(kw_only=True)
class TwoMachines:
    """The README's two machines: the same lines, with addresses and names that exist here."""

    head: Server
    laptop: Tllm
    state: str  # of the head's machine
    names: dict[str, str]  # in the README -> here

    def line(self, *words: str) -> list[str]:
        """The README's command that begins with these words, as it is typed here."""
        (found,) = [line[1:] for line in commands("README.md", "tllm ") if line[1 : len(words) + 1] == list(words)]
        return [self.names.get(word, word) for word in found]

    def type(self, *words: str) -> str:
        return run(*self.line(*words), environment={"XDG_STATE_HOME": self.state})


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TwoMachines]:
    desk, laptop = (str(tmp_path_factory.mktemp(name)) for name in ("desk", "laptop"))
    lines = commands("README.md", "tllm ")
    (serving,) = [line for line in lines if line[1] == "serve" and "--host" in line]
    (joining,) = [line for line in lines if line[1] == "join" and len(line) == 5]
    assert serving[2:] == ["MODEL", "--host", "192.168.1.10", "--api-key", "KEY"]
    with serve("--host", "127.0.0.1", "--api-key", "KEY", "--name", "desk", XDG_STATE_HOME=desk) as head:
        address = head.wait_for(r"tllm join (\S+)")[1]
        names = {
            "http://192.168.1.10:8022": head.url,
            "192.168.1.10:25001": address,
            "MODEL": "embedded",
            "nodes.toml": str(nodes_file(tmp_path_factory)),
        }
        (new_token,) = [line for line in lines if line[1:3] == ["token", "new"]]
        names["TOKEN"] = run(*new_token[1:], environment={"XDG_STATE_HOME": desk}).strip()
        words = [names.get(word, word) for word in joining[1:]]
        with tllm(*words, "--name", "laptop", XDG_STATE_HOME=laptop) as joined:
            joined.wait_for(rf"^Joined {re.escape(address)} as n-")
            yield TwoMachines(head=head, laptop=joined, state=desk, names=names)


def nodes_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The example of the guide."""
    text = (repository() / "docs/guides/nodes-file.md").read_text()
    (example,) = re.findall(r"^```toml nodes\n(.*?)^```$", text, flags=re.MULTILINE | re.DOTALL)
    path = tmp_path_factory.mktemp("nodes") / "nodes.toml"
    path.write_text(example)
    return path


def test_nodes_shows_the_two_machines(two):
    shown = two.type("nodes")
    assert re.search(r"^desk +ready +0\.\.7 ", shown, flags=re.MULTILINE)
    assert re.search(r"^laptop +ready ", shown, flags=re.MULTILINE)


def test_a_machine_is_drained_and_taken_back(two):
    assert "laptop is out of every plan" in two.type("drain")
    assert re.search(r"^laptop +draining ", two.type("nodes"), flags=re.MULTILINE)
    assert "laptop can be planned with again" in run(*two.line("drain"), "--undo")


def test_a_plan_is_made_of_the_machines_of_a_file(two):
    shown = two.type("plan")
    assert "desk" in shown
    assert "Predicted:" in shown


def test_what_a_machine_keeps_is_listed_and_removed(two):
    assert "holds no weights" in two.type("cache", "ls")
    assert "freed by removing 0 files" in two.type("cache", "gc")


def test_doctor_finds_the_head(two):
    assert re.search(r"^ok +TLS +answers; fingerprint [0-9a-f]+", two.type("doctor"), flags=re.MULTILINE)


def test_on_the_heads_own_machine_join_is_enough(two):
    with tllm("join", "--name", "second", XDG_STATE_HOME=two.state) as joined:
        joined.wait_for("^Joined .* as n-")
        assert joined.interrupt() == 0


def test_who_came_by_a_token_leaves_when_it_is_revoked(two):
    """The last of them: the laptop is gone afterwards."""
    (listed,) = [line for line in two.type("token", "ls").splitlines() if line.endswith(" laptop")]
    two.names["ID"] = listed.split()[0]
    assert two.type("token", "revoke") == f"Revoked {two.names['ID']}.\n"
    two.laptop.wait_for("^Left: the join token by which it came was revoked", deadline_s=10)
    assert two.laptop.process.wait(timeout=20) == 0
    assert "laptop" not in two.type("nodes").partition("\n\n")[0]


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


@pytest.mark.parametrize("readme", [*READMES, "ARCHITECTURE.md", "CONTRIBUTING.md", "CHANGELOG.md", *GUIDES])
def test_links_between_documents_lead_somewhere(readme):
    directory = (repository() / readme).parent
    for target in re.findall(r"\]\(([^)#:]+)\)", (repository() / readme).read_text()):
        assert (directory / target).exists(), target


def test_files_that_the_architecture_names_exist():
    named = re.findall(r"`((?:[a-z_]+/)+[a-z_0-9]+\.(?:py|proto|md))`", (repository() / "ARCHITECTURE.md").read_text())
    assert len(named) > 10
    for target in named:
        assert any((repository() / root / target).exists() for root in ("src/tllm", ".")), target


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
