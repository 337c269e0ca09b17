"""The examples of the guide do what they say."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tllm.testing.namespaces import missing

GUIDE = Path(__file__).parents[2] / "docs" / "guides" / "link-emulator.md"


def example(label: str) -> str:
    (content,) = re.findall(rf"^```{label}\n(.*?)^```$", GUIDE.read_text(), flags=re.MULTILINE | re.DOTALL)
    return str(content)


def test_the_example_of_a_link_runs() -> None:
    exec(compile(example("python"), str(GUIDE), "exec"), {})


@pytest.mark.skipif(bool(missing()), reason=missing())
def test_the_example_of_a_network_runs() -> None:
    exec(compile(example("python root"), str(GUIDE), "exec"), {})
