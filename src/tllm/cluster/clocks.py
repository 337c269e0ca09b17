"""What another process's clock shows when this one's shows something else, and how well that is known.

    here     asked_s ────────▶                    ▶ heard_s
    there             ▶ arrived_s ── answered_s ──

A question arrives after it was asked and an answer is heard after it was given, whatever the network does between. So

    answered_s - heard_s  <=  offset  <=  arrived_s - asked_s

holds for every exchange, and the offset lies where all of them meet. With one exchange this is NTP's formula (RFC 5905,
section 8): the middle, give or take half of the round trip.

This file does not know who asks whom.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

DRIFT = 50e-6  # seconds per second by which two quartz clocks part when nobody disciplines them


@dataclass(frozen=True, slots=True, kw_only=True)
class Exchange:
    """One question and its answer: seconds of this side's clock, and of the other's."""

    asked_s: float
    arrived_s: float  # the other's
    answered_s: float  # the other's
    heard_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class ClockOffset:
    """The other clock minus this one, give or take `error_s`, when this one showed `at_s`."""

    offset_s: float
    error_s: float
    at_s: float

    def here_s(self, there_s: float) -> float:
        """A time of the other clock on this one."""
        return there_s - self.offset_s

    def error_at(self, here_s: float) -> float:
        """How wrong `here_s` may be about another time: the clocks may have drifted since, or until then."""
        return self.error_s + DRIFT * abs(here_s - self.at_s) if self.error_s else 0.0


SAME_CLOCK = ClockOffset(offset_s=0.0, error_s=0.0, at_s=0.0)


def align(exchanges: Sequence[Exchange]) -> ClockOffset:
    """The offset that all exchanges allow. Clocks that drift while one asks may contradict themselves a little; half
    of the contradiction is the error then, as half of the freedom is otherwise. At least one exchange."""
    low_s = max(each.answered_s - each.heard_s for each in exchanges)
    high_s = min(each.arrived_s - each.asked_s for each in exchanges)
    return ClockOffset(
        offset_s=(low_s + high_s) / 2,
        error_s=abs(high_s - low_s) / 2,
        at_s=max(each.heard_s for each in exchanges),
    )


def on_one_machine(measured: ClockOffset) -> ClockOffset:
    """The same for two processes of one machine: `perf_counter` reads one clock there, which only a container with a
    clock of its own would change, and that would show."""
    return SAME_CLOCK if abs(measured.offset_s) <= measured.error_s else measured
