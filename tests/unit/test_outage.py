"""When an outage is spoken of."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from itertools import pairwise

from pipeline_app.domain.outage import FIRST, LONGEST, Outage

START = datetime(2026, 11, 21, 14, 0, tzinfo=UTC)


def test_an_outage_is_told_at_once_then_ever_less_often() -> None:
    """Given an outage of ten hours that is seen every second, then it is told of some dozen times."""
    outage = Outage()

    told = [second for second in range(36_000) if outage.goes_on(START + timedelta(seconds=second))]

    pauses = [later - earlier for earlier, later in pairwise(told)]
    assert told[0] == 0
    assert pauses == sorted(pauses)
    assert (pauses[0], pauses[-1]) == (FIRST.total_seconds(), LONGEST.total_seconds())
    assert len(told) < 60
    assert outage.since == START


def test_the_end_of_an_outage_is_told_once() -> None:
    """Given an outage that ends, then its length is told once, and the next one begins anew."""
    outage = Outage()
    assert outage.ends(START) is None, "there was none"
    outage.goes_on(START)
    outage.goes_on(START + timedelta(hours=3))

    assert outage.ends(START + timedelta(hours=4)) == timedelta(hours=4)

    assert outage.ends(START + timedelta(hours=5)) is None
    assert outage.goes_on(START + timedelta(hours=6)) is True
    assert outage.goes_on(START + timedelta(hours=6) + FIRST) is True, "at the first interval again"
