"""Durations as people write them."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline_app.domain.durations import seconds
from pipeline_app.errors import UsageError


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("500ms", 0.5),
        ("2s", 2.0),
        ("1.5s", 1.5),
        ("5m", 300.0),
        ("1h30m", 5400.0),
        ("1d2h3m4s5ms", 93784.005),
        (" 7s ", 7.0),
        ("0", 0.0),
        ("12.5", 12.5),
        (3, 3.0),
        (0.25, 0.25),
    ],
)
def test_a_duration_is_read(text: str | float, expected: float) -> None:
    assert seconds(text) == pytest.approx(expected)


@pytest.mark.parametrize(
    "text",
    ["", " ", "soon", "5 m", "5x", "5m3x", "x5m", "m", "1.s", "1.5.5s", "5M", "2s,", "5min", True, None, [], "1s-1s"],
)
def test_what_is_not_a_duration_is_refused_and_quoted(text: object) -> None:
    with pytest.raises(UsageError, match="not a duration") as caught:
        seconds(text)  # type: ignore[arg-type]
    assert repr(str(text).strip()) in caught.value.message
    assert caught.value.hint


@pytest.mark.parametrize("text", ["-1", "-0.5", -3, "inf", "-inf", "nan", float("inf"), float("nan"), "9" * 400 + "d"])
def test_a_duration_is_not_negative_and_ends(text: str | float) -> None:
    with pytest.raises(UsageError, match="not negative and ends"):
        seconds(text)


@given(days=st.integers(0, 400), hours=st.integers(0, 23), minutes=st.integers(0, 59), ms=st.integers(0, 59_999))
def test_the_parts_of_a_duration_add_up(days: int, hours: int, minutes: int, ms: int) -> None:
    text = f"{days}d{hours}h{minutes}m{ms}ms"
    assert seconds(text) == pytest.approx(days * 86400 + hours * 3600 + minutes * 60 + ms / 1000)


@given(st.floats(min_value=0, max_value=1e12))
def test_a_number_is_its_own_duration(number: float) -> None:
    assert seconds(number) == number
    assert seconds(repr(number)) == number
