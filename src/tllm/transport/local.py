"""A link within one process: the same promises as between machines, without bytes.

This file does not know what the messages are for.
"""

from __future__ import annotations

from tllm.transport.base import FrameLimits, StageMessage
from tllm.transport.checks import check
from tllm.transport.mailbox import Inbox


class LocalLink:
    """The sending end; made by `local_link`."""

    def __init__(self, inbox: Inbox, limits: FrameLimits) -> None:
        self._inbox = inbox
        self._limits = limits

    async def send(self, message: StageMessage) -> None:
        check(message, self._limits)
        await self._inbox.put(message)

    async def aclose(self) -> None:
        self._inbox.finish()


def local_link(limits: FrameLimits, capacity: int = 8) -> tuple[LocalLink, Inbox]:
    """Both ends of a link on which at most `capacity` messages wait. Activations are handed over, not copied."""
    inbox = Inbox(capacity)
    return LocalLink(inbox, limits), inbox
