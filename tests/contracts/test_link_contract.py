"""What every link promises, local or over gRPC: one suite."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from tllm.core.errors import FrameError, TransportError
from tllm.core.types import (
    Activation,
    BlockId,
    Chunk,
    DType,
    Epoch,
    SequenceId,
    Step,
    StepFailed,
    StepId,
    StepResult,
    TokenId,
)
from tllm.testing.identities import members
from tllm.transport import rpc
from tllm.transport.base import FrameLimits, Link, StageMessage, StepFrame
from tllm.transport.local import local_link
from tllm.transport.mailbox import Inbox

LIMITS = FrameLimits(
    epoch=Epoch(3), hidden_size=4096, dtype=DType.FLOAT32, max_tokens=64, max_chunks=8, max_blocks=16, vocab_size=1000
)
CAPACITY = 3
DEADLINE_S = 10.0
pytestmark = pytest.mark.timeout(30)


@asynccontextmanager
async def local(_directory: Path) -> AsyncIterator[tuple[Link, Inbox]]:
    link, inbox = local_link(LIMITS, CAPACITY)
    yield link, inbox
    await link.aclose()


@asynccontextmanager
async def over_grpc(directory: Path, address: str) -> AsyncIterator[tuple[Link, Inbox]]:
    here, there = members(directory / "cluster", "n-here", "n-there")
    stage = rpc.StageServer(capacity=CAPACITY)
    server = rpc.Server([stage], identity=there)
    bound = await server.start([address])
    inbox = stage.expect(LIMITS, sender="n-here")
    link = await rpc.connect(bound, LIMITS, identity=here, peer="n-there", timeout_s=DEADLINE_S, close_timeout_s=1.0)
    try:
        yield link, inbox
    finally:
        await inbox.aclose()
        await link.aclose()
        await server.aclose()


LINKS: dict[str, Callable[[Path], AbstractAsyncContextManager[tuple[Link, Inbox]]]] = {
    "local": local,
    "unix": lambda directory: over_grpc(directory, f"unix:{directory}/stage.sock"),
    "tcp": lambda directory: over_grpc(directory, "127.0.0.1:0"),
}


@pytest.fixture(params=LINKS)
async def ends(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[tuple[Link, Inbox]]:
    async with LINKS[request.param](tmp_path) as both:
        yield both


def frame(number: int, num_tokens: int = 1) -> StepFrame:
    chunk = Chunk(
        seq=SequenceId(1), start=number, tokens=tuple(TokenId(t) for t in range(num_tokens)), blocks=(BlockId(0),)
    )
    hidden = Activation(
        data=bytes([number % 256]) * (num_tokens * 4096 * 4), dtype=DType.FLOAT32, shape=(num_tokens, 4096)
    )
    return StepFrame(step=Step(id=StepId(number), epoch=Epoch(3), chunks=(chunk,)), hidden=hidden)


async def test_messages_of_every_kind_arrive_in_order_and_once(ends: tuple[Link, Inbox]) -> None:
    link, inbox = ends
    sent: list[StageMessage] = [
        frame(1),
        StepFailed(step=StepId(2), epoch=Epoch(3), layers=(0, 4), reason="out of memory"),
        StepResult(step=StepId(3), epoch=Epoch(3)),
        *(frame(number, num_tokens=number) for number in range(4, 40)),
    ]

    async def send_all() -> None:
        for message in sent:
            await link.send(message)
        await link.aclose()

    sending = asyncio.create_task(send_all())
    assert [message async for message in inbox] == sent
    await sending


async def test_sends_from_several_tasks_each_arrive_once(ends: tuple[Link, Inbox]) -> None:
    link, inbox = ends
    async with asyncio.TaskGroup() as tasks:
        for number in range(20):
            tasks.create_task(link.send(frame(number)))
        received = [await anext(inbox) for _ in range(20)]
    assert {message.step.id for message in received if isinstance(message, StepFrame)} == set(range(20))


async def test_a_reader_that_does_not_read_holds_the_sender_up_and_then_gets_everything(
    ends: tuple[Link, Inbox],
) -> None:
    link, inbox = ends
    num_frames, num_sent = 100, 0  # of a megabyte each: far more than sockets and windows hold

    async def send_all() -> None:
        nonlocal num_sent
        for number in range(num_frames):
            await link.send(frame(number, num_tokens=64))
            num_sent += 1
        await link.aclose()

    sending = asyncio.create_task(send_all())
    before = -1
    while before != num_sent:  # until nothing moves for a while
        before = num_sent
        await asyncio.wait({sending}, timeout=0.2)
    assert CAPACITY <= num_sent < num_frames
    assert not sending.done()
    received = [message.step.id async for message in inbox if isinstance(message, StepFrame)]
    assert received == list(range(num_frames))
    await sending


async def test_what_was_sent_before_closing_is_delivered_before_the_end(ends: tuple[Link, Inbox]) -> None:
    link, inbox = ends
    for number in range(CAPACITY):
        await link.send(frame(number))
    await link.aclose()
    await link.aclose()
    assert len([message async for message in inbox]) == CAPACITY
    assert [message async for message in inbox] == []


async def test_a_closed_link_takes_nothing(ends: tuple[Link, Inbox]) -> None:
    link, _ = ends
    await link.aclose()
    with pytest.raises(TransportError):
        await link.send(frame(1))


async def test_a_send_that_waits_fails_when_the_receiver_closes_and_so_does_every_later_one(
    ends: tuple[Link, Inbox],
) -> None:
    link, inbox = ends

    async def flood() -> None:
        while True:
            await link.send(frame(1, num_tokens=64))

    flooding = asyncio.create_task(flood())
    await anext(inbox)
    await inbox.aclose()
    with pytest.raises(TransportError):
        await flooding
    for _ in range(3):
        with pytest.raises(TransportError):
            await link.send(frame(2))
    assert [message async for message in inbox] == []


async def test_closing_an_inbox_ends_a_reader_that_waits(ends: tuple[Link, Inbox]) -> None:
    _, inbox = ends

    async def read() -> list[StageMessage]:
        return [message async for message in inbox]

    reading = asyncio.create_task(read())
    await asyncio.wait({reading}, timeout=0.01)
    await inbox.aclose()
    assert await reading == []


@pytest.mark.parametrize(
    "wrong",
    [
        replace(frame(1), step=replace(frame(1).step, epoch=Epoch(2))),
        frame(1, num_tokens=65),
        replace(frame(2), hidden=frame(1, num_tokens=2).hidden),
        StepFailed(step=StepId(1), epoch=Epoch(3), layers=(4, 0), reason=""),
    ],
    ids=["epoch", "tokens", "shape", "layers"],
)
async def test_a_message_beyond_the_limits_is_refused_and_the_link_goes_on(
    ends: tuple[Link, Inbox], wrong: StageMessage
) -> None:
    link, inbox = ends
    with pytest.raises(FrameError):
        await link.send(wrong)
    await link.send(frame(9))
    assert await anext(inbox) == frame(9)
