"""The fake keeps the real deployment's interface."""

from __future__ import annotations

import inspect

import pytest

from tests.api.fake_deployment import FakeDeployment, FakeGeneration
from tllm.cluster.deployment import Deployment, Generation


@pytest.mark.parametrize(
    ("real", "fake", "method"),
    [
        (Deployment, FakeDeployment, "submit"),
        (Deployment, FakeDeployment, "statistics"),
        (Generation, FakeGeneration, "cancel"),
        (Generation, FakeGeneration, "usage"),
        (Generation, FakeGeneration, "__anext__"),
    ],
)
def test_the_fake_has_the_signatures_of_the_real_one(real: type, fake: type, method: str) -> None:
    theirs = inspect.signature(getattr(real, method))
    ours = inspect.signature(getattr(fake, method))
    assert [*ours.parameters] == [*theirs.parameters]


def test_the_fake_has_the_fields_that_the_real_one_sets(new_deployment: FakeDeployment) -> None:
    source = inspect.getsource(Deployment)
    for name in (
        "names",
        "created",
        "root",
        "max_model_len",
        "vocab_size",
        "state",
        "tokenizer",
        "template",
        "end_ids",
    ):
        assert f"self.{name}" in source
        assert hasattr(new_deployment, name)
