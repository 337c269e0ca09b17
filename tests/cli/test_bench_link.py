"""`tllm bench link` in all its ways of naming two ends, with small matrices; what it refuses; what it keeps."""

from __future__ import annotations

import asyncio
import itertools
import json
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import httpx
import pytest
import typer
from typer.testing import CliRunner

from tests.api.fake_cluster import FakeCluster
from tests.api.serving import Server
from tllm.api.state import ApiState
from tllm.cli import bench_link
from tllm.cluster.status import LinkOrder
from tllm.core.errors import ConfigError, RequestError, TllmError, UnavailableError
from tllm.lab import link_bench
from tllm.lab.record import Records, records_path
from tllm.transport.codecs import CodecName
from tllm.transport.link_bench import Timing
from tllm.transport.link_sweep import Cell, LinkSample, Measured, Sweep

app = typer.Typer()
app.command("link")(bench_link.link)
app.callback()(lambda: None)

SMALL = ("--rows", "1,4", "--repeats", "2", "--seconds", "1", "--codecs", "int8")
SAMPLE = LinkSample(name="activations", data=bytes(range(64)) * 8, width=32)  # bf16: small numbers


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Records of its own, and no time spent on a model."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    monkeypatch.setattr(link_bench, "activations", lambda model: SAMPLE)


def tllm(*arguments: str) -> str:
    result = CliRunner().invoke(app, ["link", *arguments], env={"TLLM_API_KEY": None, "TLLM_URL": None})
    if isinstance(result.exception, TllmError):
        raise result.exception
    assert result.exit_code == 0, result.output + str(result.exception)
    return result.stdout


def test_alone_it_measures_two_processes_of_this_machine_and_keeps_records(tmp_path: Path) -> None:
    shown = json.loads(tllm(*SMALL, "--json", "--picture", str(tmp_path / "link.png")))
    assert shown["ends"] == "two processes of this machine, over a Unix socket"
    kinds = {(row["rows"], row["codec"], row["contents"]) for row in shown["rows"]}
    assert kinds == set(itertools.product((1, 4), ("none", "int8"), ("activations", "random")))
    assert shown["fit"]["round_trip_s"] > 0
    assert (tmp_path / "link.png").exists()
    with Records(records_path()) as kept:
        found = kept.find("link")
    assert len(found) == 2 * 2 * 2 * 2
    assert {record.settings["columns"] for record in found} == {32}


async def test_a_token_lets_one_machine_in_once() -> None:
    settings = bench_link_settings()
    async with asyncio.timeout(20), bench_link._listening("127.0.0.1", 0) as (address, token, served):
        title, found = await bench_link._towards(address, token, settings, SAMPLE)
        assert title == f"this machine to {address}"
        assert {each.cell.codec for each in found.cells} == {CodecName.NONE, CodecName.INT8}
        await served
        with pytest.raises(ConfigError, match="is revoked"):
            await bench_link._towards(address, token, settings, SAMPLE)


async def test_another_token_does_not_get_in() -> None:
    async with asyncio.timeout(20), bench_link._listening("127.0.0.1", 0) as (address, _, served):
        async with bench_link._listening("127.0.0.1", 0) as (_, other, _):
            with pytest.raises(ConfigError, match="not the one that the join token is of"):
                await bench_link._towards(address, other, bench_link_settings(), SAMPLE)
        assert not served.done()


def bench_link_settings() -> bench_link.SweepSettings:
    from tllm.transport.link_sweep import SweepSettings

    return SweepSettings(rows=(1, 4), columns=32, codecs=(CodecName.NONE, CodecName.INT8), repeats=2, budget_s=1.0)


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        (("a",), "alone is no link"),
        (("a", "b", "c"), "3 were given"),
        (("a", "b", "--token", "t"), "--token belongs to"),
        (("--token", "t"), "--token belongs to"),
        (("--listen", "0.0.0.0:1", "a"), "takes neither ends"),
        (("--listen", "127.0.0.1:99999"), "a port is at least 0"),
        (("--rows", "x"), "give whole numbers"),
        (("--rows", "1"), "at least two"),
        (("--hidden", "0"), "smaller width"),
        (("--codecs", "zip"), "is no codec"),
        (("--repeats", "0"), "repeats is 0"),
        (("--seconds", "-1"), "more than 0"),
    ],
)
def test_what_it_cannot_do_it_says_before_it_measures(arguments: tuple[str, ...], why: str) -> None:
    with pytest.raises(ConfigError, match=why):
        tllm(*arguments)


# Between two nodes ----------------------------------------------------------------------------------------------------


class MeasuringCluster(FakeCluster):
    """Answers as a link of 1 MB/s and 5 ms would."""

    def __init__(self) -> None:
        super().__init__()
        self.orders: list[LinkOrder] = []

    async def bench_link(self, order: LinkOrder) -> Sweep:
        self.orders.append(order)
        if order.target == "gone":
            raise UnavailableError("The link was not measured: m3pro cannot be reached.", state="degraded")
        if order.target not in ("head", "m3pro"):
            raise RequestError(f"There is no node {order.target!r}.", code="not_found")
        cells = []
        for rows in order.settings.rows:
            num_bytes = order.settings.shape(rows).num_bytes
            timing = Timing(encoded_bytes=num_bytes, compress_s=0.0, carry_s=10e-3 + num_bytes / 1e6, decompress_s=0.0)
            cell = Cell(rows=rows, codec=CodecName.NONE, contents="activations")
            cells.append(Measured(cell=cell, timings=(timing,) * order.settings.repeats))
        return Sweep(round_trips_s=(10e-3,), cells=tuple(cells), left_out_rows=(), missing={CodecName.LZ4: "not there"})


@pytest.fixture
def cluster() -> MeasuringCluster:
    return MeasuringCluster()


@pytest.fixture
def start(cluster: MeasuringCluster) -> Iterator[Callable[..., str]]:
    with ExitStack() as stack:
        yield (
            lambda **options: (
                stack.enter_context(Server(ApiState(version="1", deployments={}, cluster=cluster, **options))).url
            )
        )


def test_two_nodes_are_measured_by_the_head_and_shown_here(
    cluster: MeasuringCluster, start: Callable[..., str]
) -> None:
    shown = tllm("mini", "m3pro", "--url", start(), *SMALL)
    assert "Link: mini to m3pro" in shown
    assert "One-way latency 5.000 ms, bandwidth 8 Mb/s = 1 MB/s" in shown
    assert "Left out: lz4. not there" in shown
    [order] = cluster.orders
    assert (order.source, order.target, order.sample) == ("mini", "m3pro", SAMPLE)
    assert order.settings == bench_link_settings()


def test_a_sample_is_cut_to_what_may_be_sent(
    cluster: MeasuringCluster, start: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    large = LinkSample(name="activations", data=bytes(700 << 10), width=1000)
    monkeypatch.setattr(link_bench, "activations", lambda model: large)
    tllm("mini", "m3pro", "--url", start(), *SMALL)
    sent = cluster.orders[0].sample
    assert sent is not None
    assert len(sent.data) == (512 << 10) // 2000 * 2000


def test_the_server_s_refusals_are_shown(start: Callable[..., str]) -> None:
    url = start()
    for target, why in (("nobody", "There is no node 'nobody'"), ("gone", "m3pro cannot be reached")):
        with pytest.raises(UnavailableError, match=why):
            tllm("mini", target, "--url", url, *SMALL)


def test_the_key_is_asked_for_and_bad_bodies_are_named(cluster: MeasuringCluster, start: Callable[..., str]) -> None:
    with pytest.raises(UnavailableError, match="--api-key"):
        tllm("mini", "m3pro", "--url", start(api_keys=("k",)), *SMALL)
    good = {"source": "mini", "target": "m3pro", "rows": [1, 4], "columns": 32}
    with httpx.Client(base_url=start()) as client:
        answer = client.post("/tllm/v1/links", json=good)
        assert answer.status_code == 200, answer.text
        assert cluster.orders[-1].sample is None
        for change, said in (
            ({"rows": [1]}, "at least two"),
            ({"codecs": ["zip"]}, "no codec"),
            ({"dtype": "int3"}, "int3"),
            ({"sample": "?"}, "base64"),
            ({"source": 3}, "source"),
            ({"columns": None}, "columns"),
            ({"sample": "A" * (1 << 20)}, "at most 524288"),
        ):
            answer = client.post("/tllm/v1/links", json=good | change)
            assert (answer.status_code, said in answer.text) == (400, True), answer.text
        answer = client.post("/tllm/v1/links", json=good | {"target": "nobody"})
        assert (answer.status_code, answer.json()["error"]["code"]) == (404, "node_not_found")


def test_the_order_a_person_gives_is_the_one_that_is_checked() -> None:
    order = LinkOrder(source="a", target="b", settings=bench_link_settings(), sample=SAMPLE)
    with pytest.raises(ConfigError, match="at most 524288"):
        replace(order, sample=replace(SAMPLE, data=bytes(600_000)))
