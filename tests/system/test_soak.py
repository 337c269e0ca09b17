"""The short version of `make soak`: a dozen faults of all kinds under load, from a fixed seed."""

from __future__ import annotations

from collections import Counter

import pytest

from tests.system.machines import can_be_elsewhere
from tests.system.recovery import Footprint
from tests.system.soak import Answer, Fault, Kind, Report, Strike, draw, soak

_NOTHING = Footprint(used_blocks=0, num_running=0, num_processes=1, num_descriptors=1, rss_bytes=1)


def test_a_seed_draws_the_same_faults_of_every_kind():
    faults = draw(7, num_faults=25, duration_s=60, kinds=tuple(Kind))
    assert faults == draw(7, num_faults=25, duration_s=60, kinds=tuple(Kind))
    assert faults != draw(8, num_faults=25, duration_s=60, kinds=tuple(Kind))
    assert set(Counter(fault.kind for fault in faults).values()) == {2, 3}
    assert [fault.at_s for fault in faults] == sorted(fault.at_s for fault in faults)


def test_a_pause_belongs_to_the_fault_that_struck_in_it_or_else_to_the_last_one():
    strikes = [
        Strike(fault=Fault(kind=kind, at_s=at_s, lasts_s=0, choice=0), target="m1", began_s=at_s)
        for kind, at_s in ((Kind.RESET, 10.0), (Kind.KILL_NODE, 20.0), (Kind.KILL_WORKER, 30.0))
    ]
    pauses = [(9.9, 11.0), (19.5, 22.0), (25.0, 26.0)]
    answers = [Answer(prompt=0, asked_s=9, ended_s=40, done=True, pauses=pauses)]
    report = Report(
        seed=0,
        strikes=strikes,
        answers=answers,
        sights=[],
        violations=[],
        back_s=0.0,
        before=_NOTHING,
        after=_NOTHING,
    )
    found = {kind: round(longest, 1) for kind, (longest,) in report.pauses().items()}
    assert found == {Kind.RESET: 1.1, Kind.KILL_NODE: 2.5, Kind.KILL_WORKER: 0.0}


@pytest.mark.timeout(300)
@pytest.mark.skipif(not can_be_elsewhere(), reason="a host name of its own needs unshare and the right to use it")
def test_a_cluster_that_breaks_all_the_time_answers_every_request():
    report = soak(seed=5, num_faults=6, duration_s=14.0, tell=print)
    assert report.violations == [], f"seed {report.seed}\n{report.table()}"
    assert len(report.strikes) == 6
    assert report.num_right > 8
    assert report.num_epochs >= 2  # they did break something
