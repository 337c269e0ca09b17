"""The bounded queue under both planes."""

from __future__ import annotations

import asyncio

import pytest

from tllm.core.errors import TransportError
from tllm.transport.mailbox import Mailbox

pytestmark = pytest.mark.timeout(30)


async def everything(mailbox: Mailbox[int]) -> list[int]:
    return [item async for item in mailbox]


async def test_never_more_than_its_capacity_waits_and_nothing_is_lost() -> None:
    mailbox: Mailbox[int] = Mailbox(2)
    most = 0

    async def put_all() -> None:
        nonlocal most
        for number in range(100):
            await mailbox.put(number)
            most = max(most, len(mailbox._items))
        mailbox.finish()

    putting = asyncio.create_task(put_all())
    assert await everything(mailbox) == list(range(100))
    await putting
    assert most == 2


async def test_what_was_put_before_a_loss_is_delivered_before_the_error() -> None:
    mailbox: Mailbox[int] = Mailbox(2)
    await mailbox.put(1)
    mailbox.finish(TransportError("lost"))
    mailbox.finish()
    assert await anext(mailbox) == 1
    for _ in range(2):
        with pytest.raises(TransportError, match="lost"):
            await anext(mailbox)


async def test_closing_drops_what_waits_and_frees_a_waiting_sender_with_an_error() -> None:
    mailbox: Mailbox[int] = Mailbox(1)
    await mailbox.put(1)
    putting = asyncio.create_task(mailbox.put(2))
    await asyncio.wait({putting}, timeout=0.01)
    assert not putting.done()
    mailbox.close()
    with pytest.raises(TransportError, match="receiver closed"):
        await putting
    assert await everything(mailbox) == []


async def test_closing_hides_an_earlier_loss_from_whoever_closed() -> None:
    mailbox: Mailbox[int] = Mailbox(1)
    mailbox.finish(TransportError("lost"))
    await mailbox.aclose()
    assert await everything(mailbox) == []


async def test_several_waiting_senders_all_get_through() -> None:
    mailbox: Mailbox[int] = Mailbox(1)
    async with asyncio.TaskGroup() as tasks:
        for number in range(5):
            tasks.create_task(mailbox.put(number))
        received = [await anext(mailbox) for _ in range(5)]
    assert sorted(received) == list(range(5))
