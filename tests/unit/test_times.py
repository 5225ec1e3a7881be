"""Points in time as people write them."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta, timezone

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline_app.domain.times import point_in_time, time_to_come
from pipeline_app.errors import UsageError

NOW = datetime(2030, 3, 1, 14, 2, 0, 500_000, tzinfo=UTC)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("+30m", NOW + timedelta(minutes=30)),
        ("-2h", NOW - timedelta(hours=2)),
        ("+1h30m", NOW + timedelta(minutes=90)),
        ("+90", NOW + timedelta(seconds=90)),
        ("+0s", NOW),
        (" +5s ", NOW + timedelta(seconds=5)),
        ("2030-03-01T14:32:00Z", datetime(2030, 3, 1, 14, 32, tzinfo=UTC)),
        ("2030-03-01T14:32:00+01:00", datetime(2030, 3, 1, 13, 32, tzinfo=UTC)),
        ("2030-03-01T14:32:00", datetime(2030, 3, 1, 14, 32, tzinfo=UTC)),
        ("2030-03-01 14:32", datetime(2030, 3, 1, 14, 32, tzinfo=UTC)),
        ("2030-03-01", datetime(2030, 3, 1, tzinfo=UTC)),
        ("2030-03-01T14:32:00.123987Z", datetime(2030, 3, 1, 14, 32, 0, 123_000, tzinfo=UTC)),
    ],
)
def test_a_time_is_read_in_utc_to_the_millisecond(text: str, expected: datetime) -> None:
    found = point_in_time(text, NOW)
    assert found == expected
    assert found.utcoffset() == timedelta(0)


def test_a_distance_counts_from_now_in_any_zone() -> None:
    there = NOW.astimezone(timezone(timedelta(hours=-7)))
    found = point_in_time("+1m", there)
    assert (found, found.tzinfo) == (NOW + timedelta(minutes=1), UTC)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "soon",
        "30m",
        "+",
        "+30 m",
        "+5parsecs",
        "+-5s",
        "14:32",
        "2030-13-01",
        "2030-02-30",
        "+9999999d",
        "-9999999d",
    ],
)
def test_what_is_not_a_time_is_refused_and_quoted(text: str) -> None:
    with pytest.raises(UsageError, match="not a time") as caught:
        point_in_time(text, NOW)
    assert repr(text) in caught.value.message
    assert "+30m" in str(caught.value.hint)


def test_an_unknown_unit_is_named() -> None:
    with pytest.raises(UsageError, match="not a duration: '5parsecs'"):
        point_in_time("+5parsecs", NOW)


@pytest.mark.parametrize("text", ["+1ms", "+30m", "2030-03-01T14:02:01Z"])
def test_a_time_to_come_is_read(text: str) -> None:
    assert time_to_come(text, NOW) > NOW


@pytest.mark.parametrize("text", ["-1s", "+0s", "2030-03-01T14:02:00Z", "2030-03-01T14:30:00+01:00", "1999-12-31"])
def test_what_is_over_is_no_time_to_come(text: str) -> None:
    with pytest.raises(UsageError, match="is in the past: it is 2030-03-01T14:02:00Z") as caught:
        time_to_come(text, NOW)
    assert text in caught.value.message


@given(st.datetimes(datetime(1970, 1, 1), datetime(2999, 1, 1)))
def test_a_time_written_as_iso_reads_as_itself(at: datetime) -> None:
    at = at.replace(microsecond=at.microsecond // 1000 * 1000, tzinfo=UTC)
    assert point_in_time(at.isoformat(), NOW) == at
    assert point_in_time(at.isoformat().replace("+00:00", "Z"), NOW) == at
