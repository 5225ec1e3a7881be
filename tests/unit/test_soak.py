"""What the soak calls growth, and what it objects to."""

from __future__ import annotations

import pytest

from benchmarks.memory import MEBIBYTE, Sample, Track
from benchmarks.soak import Load, growing, lagging

WARM_UP_S, WINDOW_S = 600.0, 150.0


def track(*, per_hour: float = 0.0, warming: float = 0.0, until: float = 3600.0, ours: bool = True) -> Track:
    """A process of 100 MiB that grows by so many MiB an hour after it took `warming` MiB in its first minutes."""
    found = Track(name="worker", pid=7, ours=ours)
    for at in range(0, int(until), 5):
        size = int((100 + warming * min(at / WARM_UP_S, 1) + per_hour * at / 3600) * MEBIBYTE)
        found.samples.append(Sample(at=float(at), rss=200 * MEBIBYTE, uss=size))
    return found


def test_growth_counts_from_the_end_of_the_warm_up() -> None:
    """Given a process that takes its memory in the first ten minutes, when an hour is over, then it did not grow."""
    assert track(warming=80).growth(WARM_UP_S, WINDOW_S) == pytest.approx(0, abs=0.001)


def test_a_leak_is_found_in_memory_that_is_shared_with_nobody() -> None:
    """Given a process that keeps 8 MiB an hour, when an hour is over, then it grew by more than 5 %, although its RSS
    stayed what it was.
    """
    leaking = track(per_hour=8)
    assert growing([leaking, track()], WARM_UP_S, WINDOW_S, 0.05) == ["worker 7 grew by 6.2%"]
    assert growing([track(per_hour=4)], WARM_UP_S, WINDOW_S, 0.05) == []


def test_servers_are_not_judged() -> None:
    """Given a server whose cache fills, when it is judged, then nothing is said against it."""
    assert growing([track(per_hour=80, ours=False)], WARM_UP_S, WINDOW_S, 0.05) == []


def test_a_process_that_ended_is_an_objection() -> None:
    """Given a process that lived after the warm-up and is not there at the end, then that is said."""
    gone = track(until=1800)
    gone.ended = True
    assert growing([gone], WARM_UP_S, WINDOW_S, 0.05) == ["worker 7 ended"]


@pytest.mark.parametrize("until", [500.0, 700.0])
def test_too_short_to_say(until: float) -> None:
    """Given a soak with less than two windows behind its warm-up, then nothing is said of growth."""
    assert track(per_hour=1000, until=until).growth(WARM_UP_S, WINDOW_S) is None


def test_a_load_that_is_not_kept_up_with() -> None:
    """Given lag after the warm-up, then it is an objection; before, it is none."""
    loads = [
        Load(at=float(at), seeded=at, at_rest=at, ready=0, lag_s=lag) for at, lag in [(30, 50), (700, 4), (900, 45)]
    ]
    assert lagging(loads[:2], WARM_UP_S) == []
    assert lagging(loads, WARM_UP_S) == ["the load was not kept up with: lag 45 s at second 900"]
