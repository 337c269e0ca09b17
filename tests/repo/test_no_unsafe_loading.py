"""The product cannot be made to run what it reads: no pickle in any of its disguises, no code from strings, no shell,
no unverified TLS, no names of temporary files that somebody else may take first.

Read from the syntax tree of every file, with imports resolved, so that neither an alias hides a call nor a comment
counts as one. This file does not know what third parties do inside.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

SOURCE = Path(__file__).parents[2] / "src" / "tllm"

# Reading what these wrote may run code; multiprocessing pickles whatever crosses its queues and pipes.
FORBIDDEN_MODULES = frozenset(
    ("pickle", "_pickle", "cPickle", "pickle5", "marshal", "shelve", "dill", "cloudpickle", "joblib", "multiprocessing")
)
FORBIDDEN_CALLS = frozenset(
    (
        "eval",
        "exec",
        "compile",
        "os.system",
        "os.popen",
        "subprocess.getoutput",
        "subprocess.getstatusoutput",
        "asyncio.create_subprocess_shell",
        "tempfile.mktemp",
        "ssl._create_unverified_context",
        "yaml.unsafe_load",
        "yaml.unsafe_load_all",
        "yaml.full_load",
        "yaml.full_load_all",
        "torch.jit.load",
        "torch.package.PackageImporter",
        "pandas.read_pickle",
    )
)
# Methods that pickle, whatever object they are of.
FORBIDDEN_METHODS = frozenset(
    (
        "send_pyobj",
        "recv_pyobj",
        "all_gather_object",
        "gather_object",
        "broadcast_object_list",
        "scatter_object_list",
        "send_object_list",
        "recv_object_list",
        "create_subprocess_shell",
        "subprocess_shell",
    )
)
# Keyword arguments, and the one value that each may have where it stands.
ALLOWED_KEYWORDS = {
    "allow_pickle": False,
    "trust_remote_code": False,
    "shell": False,
    "verify": True,
    "weights_only": True,
}
SAFE_LOADERS = frozenset(("yaml.SafeLoader", "yaml.CSafeLoader"))


def findings(source: str) -> Iterator[str]:
    """What is unsafe in a file, each as `line: what`."""
    tree = ast.parse(source)
    names = dict(imported_names(tree))
    for node in ast.walk(tree):
        for what in unsafe(node, names):
            yield f"{getattr(node, 'lineno', 0)}: {what}"


def imported_names(tree: ast.AST) -> Iterator[tuple[str, str]]:
    """What local names stand for, as dotted paths."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for name in node.names:
                yield (
                    name.asname or name.name.partition(".")[0],
                    name.name if name.asname else name.name.partition(".")[0],
                )
        elif isinstance(node, ast.ImportFrom):
            for name in node.names:
                yield name.asname or name.name, f"{node.module}.{name.name}"


def dotted(node: ast.expr, names: dict[str, str]) -> str:
    """`np.load` as `numpy.load`; empty for what is not a path of names."""
    match node:
        case ast.Name(id=name):
            return names.get(name, name).removeprefix("builtins.")
        case ast.Attribute(value=value, attr=attr):
            return f"{dotted(value, names) or '?'}.{attr}".removeprefix("builtins.")
        case _:
            return ""


def unsafe(node: ast.AST, names: dict[str, str]) -> Iterator[str]:
    match node:
        case ast.Import(names=modules):
            yield from (f"imports {each.name}" for each in modules if is_forbidden(each.name))
        case ast.ImportFrom(module=str(module), names=members):
            if is_forbidden(module):
                yield f"imports {module}"
            yield from (
                f"imports {module}.{each.name}" for each in members if f"{module}.{each.name}" in FORBIDDEN_CALLS
            )
        case ast.Call(func=func, args=args, keywords=keywords):
            yield from unsafe_call(dotted(func, names), args, {each.arg: each.value for each in keywords}, names)
        case ast.Dict(keys=keys, values=values):
            pairs = {key.value: value for key, value in zip(keys, values, strict=True) if isinstance(key, ast.Constant)}
            yield from unsafe_keywords(pairs)
        case ast.Name() | ast.Attribute():
            path = dotted(node, names)
            if path in FORBIDDEN_CALLS or path.rpartition(".")[2] in FORBIDDEN_METHODS:  # passed on is as bad as called
                yield f"uses {path}"


def unsafe_call(
    path: str, args: list[ast.expr], keywords: dict[str | None, ast.expr], names: dict[str, str]
) -> Iterator[str]:
    yield from unsafe_keywords(keywords)
    match path, args:
        case "__import__" | "importlib.import_module", [ast.Constant(value=str(module)), *_] if is_forbidden(module):
            yield f"imports {module}"
        case "torch.load", _ if "weights_only" not in keywords:
            yield "calls torch.load without weights_only=True"
        case "yaml.load" | "yaml.load_all", _:
            loaders = [*args[1:2], *(keywords[key] for key in keywords if key == "Loader")]
            if not any(dotted(loader, names) in SAFE_LOADERS for loader in loaders):
                yield "calls yaml.load without SafeLoader"


def unsafe_keywords(keywords: Mapping[Any, ast.expr]) -> Iterator[str]:
    for keyword, given in keywords.items():
        allowed = ALLOWED_KEYWORDS.get(keyword)
        if allowed is None or (isinstance(given, ast.Constant) and given.value is allowed):
            continue
        if keyword == "verify" and not isinstance(given, ast.Constant):
            continue  # a context or a path of certificates
        yield f"says {keyword}={ast.unparse(given)}"


def is_forbidden(module: str) -> bool:
    return module.partition(".")[0] in FORBIDDEN_MODULES


def test_nothing_in_the_product_runs_what_it_reads() -> None:
    files = sorted(SOURCE.rglob("*.py"))
    assert len(files) > 50
    found = [
        f"{file.relative_to(SOURCE)}:{what}" for file in files for what in findings(file.read_text(encoding="utf-8"))
    ]
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "import os, marshal as m",
        "from shelve import open",
        "def f():\n    import cloudpickle.fast",
        "__import__('dill')",
        "import importlib\nimportlib.import_module('pickle')",
        "from multiprocessing import Queue",
        "import torch\ntorch.load(path)",
        "import torch as t\nt.load(path, weights_only=False)",
        "from torch import load as read\nread(path)",
        "import torch\ntorch.load(path, weights_only=flag)",
        "import numpy as np\nnp.load(path, allow_pickle=True)",
        "load(path, **{'allow_pickle': True})",
        "eval('1')",
        "exec(code)",
        "compile(code, '', 'exec')",
        "import builtins\nbuiltins.eval('1')",
        "run = eval",
        "import yaml\nyaml.load(text)",
        "import yaml\nyaml.load(text, Loader=yaml.Loader)",
        "from yaml import unsafe_load\nunsafe_load(text)",
        "AutoModel.from_pretrained(name, trust_remote_code=True)",
        "options = {'trust_remote_code': True}",
        "import subprocess\nsubprocess.run(command, shell=True)",
        "import os\nos.system(command)",
        "import asyncio\nasyncio.create_subprocess_shell(command)",
        "import tempfile\ntempfile.mktemp()",
        "from tempfile import mktemp",
        "import httpx\nhttpx.get(url, verify=False)",
        "socket.recv_pyobj()",
        "import torch.distributed as dist\ndist.broadcast_object_list(parts)",
    ],
)
def test_unsafe_code_is_found(source: str) -> None:
    assert list(findings(source))


@pytest.mark.parametrize(
    "source",
    [
        "import json, struct",
        "import torch\ntorch.load(path, weights_only=True)",
        "import numpy as np\nnp.load(path)\nnp.load(path, allow_pickle=False)",
        "import re, torch\nre.compile('x')\ntorch.compile(model)",
        "model.eval()",
        "import yaml\nyaml.load(text, Loader=yaml.SafeLoader)\nyaml.safe_load(text)",
        "import subprocess\nsubprocess.run([program])\nsubprocess.run([program], shell=False)",
        "import httpx\nhttpx.get(url)\nhttpx.get(url, verify=context)",
        "load(path, trust_remote_code=False)",
        "'never pickle, never eval(...)'  # nor trust_remote_code=True",
        "import torch.distributed as dist\ndist.all_gather(parts, part)",
    ],
)
def test_safe_code_is_not(source: str) -> None:
    assert not list(findings(source))
