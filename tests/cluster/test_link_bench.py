"""A link benchmark between nodes: an agent carries out an order over real streams, and answers are read with care."""

from __future__ import annotations

import asyncio
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.cluster.test_agent import PlayedHead, until
from tllm.cluster.agent import Agent
from tllm.cluster.link_bench import _answer, ask, carry_out, contents_of, order_message, read_answer
from tllm.cluster.membership import Member
from tllm.cluster.status import LinkOrder
from tllm.core.config import Deadlines, NodeConfig
from tllm.core.errors import FrameError, TransportError
from tllm.testing.identities import members
from tllm.transport import rpc
from tllm.transport import wire_pb2 as pb
from tllm.transport.codecs import CodecName
from tllm.transport.link_bench import LinkBench, Timing
from tllm.transport.link_sweep import Cell, LinkSample, Measured, Sweep, SweepSettings

SETTINGS = SweepSettings(rows=(1, 4), columns=64, repeats=2, budget_s=1.0)
SAMPLE = LinkSample(name="activations", data=bytes(range(64)) * 8, width=32)  # bf16: small numbers
ORDER = LinkOrder(source="a", target="b", settings=SETTINGS, sample=SAMPLE)

seconds = st.floats(0, 10)
timings = st.builds(
    Timing, encoded_bytes=st.integers(1, 1 << 26), compress_s=seconds, carry_s=seconds, decompress_s=seconds
)
cells = st.builds(
    Measured,
    cell=st.builds(Cell, rows=st.integers(1, 4096), codec=st.sampled_from(list(CodecName)), contents=st.text()),
    timings=st.lists(timings, min_size=1, max_size=3).map(tuple),
)
sweeps = st.builds(
    Sweep,
    round_trips_s=st.lists(seconds, min_size=1).map(tuple),
    cells=st.lists(cells, min_size=1, max_size=4).map(tuple),
    left_out_rows=st.lists(st.integers(1, 4096)).map(tuple),
    missing=st.dictionaries(st.sampled_from(list(CodecName)), st.text()),
)


@given(found=sweeps)
def test_an_answer_crosses_unchanged(found: Sweep) -> None:
    assert read_answer(pb.BenchedLink.FromString(_answer(7, found).SerializeToString())) == found


GOOD = _answer(
    1,
    Sweep(
        round_trips_s=(1e-3,),
        cells=(
            Measured(
                cell=Cell(rows=1, codec=CodecName.NONE, contents="random"),
                timings=(Timing(encoded_bytes=1, compress_s=0.0, carry_s=1e-3, decompress_s=0.0),),
            ),
        ),
        left_out_rows=(),
        missing={},
    ),
)


@pytest.mark.parametrize(
    "wrong",
    [
        pb.BenchedLink(),
        pb.BenchedLink(rows=[1]),
        pb.BenchedLink(carry_s=[1.0]),
        pb.BenchedLink(missing_codecs=["lz4"]),
        pb.BenchedLink(missing_codecs=["zip"], missing_reasons=[""]),
        pb.BenchedLink(round_trips_s=[-1.0]),
        pb.BenchedLink(round_trips_s=[float("nan")]),
        pb.BenchedLink(rows=[1], codecs=["zip"], contents=[""], num_timings=[0]),
    ],
)
def test_an_answer_that_makes_no_sense_is_refused(wrong: pb.BenchedLink) -> None:
    answer = pb.BenchedLink()
    if wrong != pb.BenchedLink():
        answer.CopyFrom(GOOD)
        answer.MergeFrom(wrong)
        read_answer(GOOD)
    with pytest.raises(FrameError):
        read_answer(answer)


async def test_a_node_sends_matrices_to_another_and_tells_what_they_took(tmp_path: Path) -> None:
    sender, receiver = members(tmp_path / "cluster", "n-00000001", "n-00000002")
    server = rpc.Server([LinkBench()], identity=receiver)
    addresses = await server.start(["127.0.0.1:0"])
    address = f"unix:{tmp_path}/head.sock"
    agent = Agent(NodeConfig(), address=address, identity=sender, deadlines=Deadlines())
    try:
        async with Listening(address) as head, agent.attached():
            await until(lambda: bool(head.attached))
            assert head.peer is not None
            message = order_message(5, "n-00000002", addresses, ORDER)
            await head.peer.send(pb.HeadMessage(bench_link=message))
            await until(lambda: bool(head.benched))
            found = read_answer(head.benched[0])
            assert head.benched[0].number == 5
            assert len(found.cells) == 2 * 2 * len(CodecName)
            assert {len(each.timings) for each in found.cells} == {2}
            # And to the agent's own server, as another node would.
            other = order_message(6, "n-00000001", list(head.attached[0].addresses), ORDER)
            turn, liveness = asyncio.Lock(), rpc.Liveness()
            answer = await carry_out(other, other.addresses, identity=receiver, turn=turn, liveness=liveness)
            assert len(read_answer(answer).cells) == 2 * 2 * len(CodecName)
    finally:
        await server.aclose()


class Listening(PlayedHead):
    """Keeps what a link benchmark answers."""

    def __init__(self, address: str) -> None:
        super().__init__(address)
        self.benched: list[pb.BenchedLink] = []

    async def _serve(self, peer: rpc.ControlPeer, attach: pb.Attach) -> None:
        await peer.send(pb.HeadMessage(welcome=pb.Welcome(cluster="test")))
        self.attached.append(attach)
        self.peer = peer
        async for message in peer:
            if message.WhichOneof("message") == "benched_link":
                self.benched.append(message.benched_link)


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"dtype": "int3"}, "int3"),
        ({"codecs": ["none", "zip"]}, "'zip' is no codec"),
        ({"columns": 0}, "smaller width"),
        ({"repeats": 1_000_000}, "from 1 to 100"),
        ({"budget_s": 1e9}, "at most 600 s"),
        ({"sample_width": 4096}, "no row of 4096"),
    ],
)
async def test_an_order_beyond_bounds_is_answered_with_the_reason(
    tmp_path: Path, change: dict[str, Any], why: str
) -> None:
    (identity,) = members(tmp_path / "cluster", "n-00000001")
    order = order_message(5, "n-00000002", ["unix:/nowhere"], ORDER)
    for name, value in change.items():
        if isinstance(value, list):
            order.ClearField(name)  # type: ignore[arg-type]
            getattr(order, name).extend(value)
        else:
            setattr(order, name, value)
    answer = await carry_out(order, order.addresses, identity=identity, turn=asyncio.Lock(), liveness=rpc.Liveness())
    assert answer.number == 5
    assert why in answer.failed


class PlayedMember:
    def __init__(self, machine: str, *addresses: str, failed: str = "") -> None:
        self.profile = SimpleNamespace(id="n-1", name="mini", machine=machine)
        self.addresses = addresses
        self.asked: list[pb.BenchLink] = []
        self.failed = failed

    async def ask(self, message: pb.HeadMessage, key: str, timeout_s: float, *, about: object) -> pb.AgentMessage:
        self.asked.append(message.bench_link)
        answer = pb.BenchedLink()
        answer.CopyFrom(GOOD)
        answer.failed = self.failed
        return pb.AgentMessage(benched_link=answer)


async def test_nodes_of_one_machine_speak_over_its_socket_and_others_do_not() -> None:
    here, beside, there = (PlayedMember(name, f"unix:/{name}", "10.0.0.1:5") for name in ("a", "a", "b"))
    for target, expected in ((beside, ["unix:/a", "10.0.0.1:5"]), (there, ["10.0.0.1:5"])):
        await ask(cast(Member, here), cast(Member, target), ORDER)
        assert list(here.asked[-1].addresses) == expected
    await ask(cast(Member, here), None, ORDER)
    assert (here.asked[-1].node_id, list(here.asked[-1].addresses)) == ("head", [])
    with pytest.raises(TransportError, match="the other way round"):
        await ask(cast(Member, here), cast(Member, PlayedMember("b", "unix:/b")), ORDER)
    with pytest.raises(TransportError, match="mini: it broke"):
        await ask(cast(Member, PlayedMember("a", failed="it broke")), None, ORDER)


def test_both_ends_of_an_order_fill_matrices_with_the_same_bytes() -> None:
    assert contents_of(SETTINGS, SAMPLE) == contents_of(SETTINGS, SAMPLE)
    assert [each.name for each in contents_of(SETTINGS, None)] == ["random"]
