"""Deadlines, restarts and blame: what a driver decides about simulators that fail."""

import pytest

from rlvla.recovery import HOUR_S, KNOWN_CALLS, MIN_DEADLINE_S, Deadlines, Incident, Restarts


def test_before_the_pace_is_known_a_call_may_take_the_whole_limit() -> None:
    deadlines = Deadlines(300)
    for _ in range(KNOWN_CALLS - 1):
        deadlines.took(0.1, work=1)
    assert deadlines.of(1) == 300
    deadlines.took(0.1, work=1)
    assert deadlines.of(1) == MIN_DEADLINE_S


def test_a_known_pace_gives_twenty_times_the_slowest_recent_call() -> None:
    deadlines = Deadlines(1000)
    for seconds in [1.0] * 9 + [4.0]:
        deadlines.took(seconds, work=1)
    assert deadlines.of(1) == 80
    # By hand: 8 chunks in 8 s are a second each, so four chunks may take 20 x 4 s of the slowest.
    deadlines.took(8.0, work=8)
    assert deadlines.of(4) == 320
    assert deadlines.of(1000) == 1000
    # Fifty calls later the slow one is forgotten.
    for _ in range(50):
        deadlines.took(2.0, work=1)
    assert deadlines.of(1) == 40


def test_a_short_limit_is_kept_whatever_the_pace() -> None:
    deadlines = Deadlines(3)
    for _ in range(KNOWN_CALLS):
        deadlines.took(1.0, work=1)
    assert deadlines.of(1) == 3


def test_restarts_are_limited_within_an_hour_and_forgotten_after_it() -> None:
    clock = [0.0]
    restarts = Restarts(per_hour=2, quarantine_after=2, now=lambda: clock[0])
    restarts.count("died")
    clock[0] = 1800
    restarts.count("died")
    clock[0] = HOUR_S
    restarts.count("died")
    clock[0] = HOUR_S + 1
    with pytest.raises(RuntimeError, match=r"replaced 3 times within an hour .*max_restarts_per_hour is 2; .* hung"):
        restarts.count("hung")


def test_a_state_is_quarantined_when_it_has_killed_alone_often_enough() -> None:
    restarts = Restarts(per_hour=60, quarantine_after=2)
    restarts.blame(17)
    assert not restarts.quarantined(17)
    restarts.blame(17)
    assert restarts.quarantined(17)
    assert not restarts.quarantined(18)


def test_an_incident_reads_as_a_sentence() -> None:
    incident = Incident(worker=1, why="died while running a chunk", recovery_s=2.25, replayed_chunks=7, lost_episodes=0)
    assert str(incident) == "simulator 1 died while running a chunk: replaced in 2.2 s, 7 chunks replayed"
