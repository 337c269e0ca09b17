"""What is refused before anything starts."""

from __future__ import annotations

import pytest

from tllm.core.config import ModelConfig, NodeConfig, ServeConfig, is_loopback, join_address, split_address
from tllm.core.errors import ConfigError


def test_serving_beyond_loopback_without_a_key_is_refused():
    with pytest.raises(ConfigError, match="--api-key"):
        ServeConfig(host="0.0.0.0")
    assert ServeConfig(host="0.0.0.0", api_key="k").host == "0.0.0.0"


@pytest.mark.parametrize("host", ["127.0.0.1", "127.8.9.1", "::1", "localhost"])
def test_loopback_addresses_are_known(host):
    assert is_loopback(host)


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.5", "example.org"])
def test_other_addresses_are_not_loopback(host):
    assert not is_loopback(host)


@pytest.mark.parametrize(
    "make",
    [
        lambda: ModelConfig(max_model_len=1),
        lambda: ModelConfig(block_size=0),
        lambda: ModelConfig(max_batch_tokens=0),
        lambda: NodeConfig(num_workers=0),
        lambda: NodeConfig(num_threads=0),
        lambda: ServeConfig(num_nodes=0),
    ],
)
def test_a_count_below_its_least_is_refused_by_the_flags_name(make):
    with pytest.raises(ConfigError, match=r"--[a-z-]+ is \d+; it must be at least \d"):
        make()


@pytest.mark.parametrize(
    ("address", "parts"),
    [
        ("10.0.0.1", ("10.0.0.1", 9)),
        ("10.0.0.1:25001", ("10.0.0.1", 25001)),
        ("http://mac-mini:8022/", ("mac-mini", 8022)),
        ("[fe80::1]:25001", ("fe80::1", 25001)),
        ("[fe80::1]", ("fe80::1", 9)),
        ("fe80::1", ("fe80::1", 9)),
    ],
)
def test_addresses_are_read_in_every_usual_form(address, parts):
    host, port = split_address(address, default_port=9)
    assert (host, port) == parts
    assert split_address(join_address(host, port), default_port=1) == parts


@pytest.mark.parametrize("address", ["", ":25001", "host:port"])
def test_what_is_no_address_is_refused_with_an_example(address):
    with pytest.raises(ConfigError, match="HOST:PORT"):
        split_address(address, default_port=25001)
