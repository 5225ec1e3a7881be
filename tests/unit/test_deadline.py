"""Time limits of one call: what is raised in it, what is said of it, and that nothing strikes after it."""

from __future__ import annotations

import random
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from celery.exceptions import SoftTimeLimitExceeded

from pipeline_app.flow.deadline import OvertakenError, Watch, Watchdog, run_within


@pytest.fixture
def watchdog() -> Watchdog:
    return Watchdog()


def spin(seconds: float) -> float:
    """Take that long, in Python."""
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        pass
    return seconds


def in_main(call: Callable[[], Any]) -> Any:
    return call()


def in_thread(call: Callable[[], Any]) -> Any:
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(call).result()


def nobody(stack: str) -> None:
    raise AssertionError(f"it was in time: {stack}")


WHERE = pytest.mark.parametrize("where", [in_main, in_thread])


@WHERE
def test_what_is_in_time(watchdog: Watchdog, where: Callable[..., Any]) -> None:
    assert where(lambda: Watch(watchdog, 10, 20, nobody).run(lambda: 5)) == 5
    with pytest.raises(ValueError, match="its own"):
        where(lambda: Watch(watchdog, 10, 20, nobody).run(lambda: int("its own")))


@WHERE
def test_the_soft_limit_is_raised_in_the_call(watchdog: Watchdog, where: Callable[..., Any]) -> None:
    ended: list[float] = []

    def call() -> None:
        try:
            spin(10)
        finally:
            ended.append(time.monotonic())

    begun = time.monotonic()
    with pytest.raises(SoftTimeLimitExceeded):
        where(lambda: Watch(watchdog, 0.1, 20, nobody).run(call))
    assert 0.1 <= ended[0] - begun < 5


@WHERE
def test_a_call_may_catch_the_soft_limit(watchdog: Watchdog, where: Callable[..., Any]) -> None:
    def call() -> str:
        try:
            spin(10)
        except SoftTimeLimitExceeded:
            return "caught"
        return "not raised"

    assert where(lambda: Watch(watchdog, 0.1, None, nobody).run(call)) == "caught"


@WHERE
def test_the_hard_limit_is_said_at_once_and_raised_at_the_end(watchdog: Watchdog, where: Callable[..., Any]) -> None:
    # Given a call that does not end for a while
    said: list[str] = []
    may_end = threading.Event()

    def call() -> str:
        assert may_end.wait(30)
        return "late"

    def overdue(stack: str) -> None:
        said.append(stack)
        may_end.set()

    # When its time is over
    with pytest.raises(OvertakenError) as caught:
        where(lambda: Watch(watchdog, None, 0.1, overdue).run(call))
    # Then somebody heard of it before its end, and where it was
    assert caught.value.settled.wait(10)
    (stack,) = said
    assert "assert may_end.wait(30)" in stack
    assert "in overdue" not in stack
    assert "pipeline_app" not in stack


def test_whoever_is_told_may_fail(watchdog: Watchdog) -> None:
    def overdue(stack: str) -> None:
        raise ValueError("whoever is told")

    for _ in range(2):
        with pytest.raises(OvertakenError) as caught:
            Watch(watchdog, None, 0.1, overdue).run(lambda: spin(0.3))
        assert caught.value.settled.wait(10)


def test_one_that_takes_long_to_be_told_keeps_nobody_waiting(watchdog: Watchdog) -> None:
    may_end = threading.Event()
    with pytest.raises(OvertakenError) as first:
        Watch(watchdog, None, 0.1, lambda stack: assert_true(may_end.wait(30))).run(lambda: spin(0.3))
    with pytest.raises(OvertakenError) as second:
        Watch(watchdog, None, 0.1, lambda stack: None).run(lambda: spin(0.3))
    assert second.value.settled.wait(10)
    assert not first.value.settled.is_set()
    may_end.set()
    assert first.value.settled.wait(10)


def assert_true(value: object) -> None:
    assert value


@pytest.mark.parametrize("where", [in_main, in_thread])
def test_nothing_strikes_after_the_call(watchdog: Watchdog, where: Callable[..., Any]) -> None:
    """Given calls that end right when a limit is reached, then each ends in one way, and nothing is raised later."""
    rng = random.Random(7)
    ways: Counter[str] = Counter()

    def many() -> None:
        for _ in range(400):
            ways[one(watchdog, rng.uniform(0.001, 0.007))] += 1
            # Where an exception that came too late would strike.
            spin(0.0005)

    where(many)

    assert ways.total() == 400
    assert {"in time", "soft"} <= set(ways), ways
    assert watchdog._timers == {}


def one(watchdog: Watchdog, seconds: float) -> str:
    """How the call ended; said only of one that was overtaken, and once."""
    told: list[str] = []
    settled = None
    try:
        Watch(watchdog, 0.004, 0.006, told.append).run(lambda: deaf(seconds))
        way = "in time"
    except SoftTimeLimitExceeded:
        way = "soft"
    except OvertakenError as exc:
        way, settled = "hard", exc.settled
    assert settled is None or settled.wait(10)
    assert len(told) == (way == "hard")
    return way


def deaf(seconds: float) -> None:
    """A call that now and then hears nothing of the soft limit."""
    try:
        spin(seconds)
    except SoftTimeLimitExceeded:
        if seconds < 0.006:
            raise
        spin(0.004)


def test_an_alarm_of_ones_own_is_there_again() -> None:
    def own(number: int, frame: Any) -> None:
        raise AssertionError

    before = signal.signal(signal.SIGALRM, own)
    try:
        assert run_within(10, lambda: 5) == 5
        with pytest.raises(SoftTimeLimitExceeded):
            run_within(0.1, lambda: time.sleep(30))
        assert signal.getsignal(signal.SIGALRM) is own
        assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)
    finally:
        signal.signal(signal.SIGALRM, before)


def test_no_limit_is_none() -> None:
    assert run_within(None, lambda: 5) == 5
