"""`Retry-After`: seconds and HTTP dates."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import pytest

from pipeline_app import RateLimited, retry_after
from pipeline_app.errors import UsageError

NOW = datetime(2026, 3, 1, 12, 0, tzinfo=UTC)


@pytest.mark.parametrize(("header", "wait_s"), [("120", 120), ("0", 0), (1.5, 1.5), ("  7 ", 7)])
def test_seconds(header: str | float, wait_s: float) -> None:
    assert retry_after(header, NOW) == NOW + timedelta(seconds=wait_s)


@pytest.mark.parametrize(
    "header",
    ["Sun, 01 Mar 2026 12:30:00 GMT", "Sunday, 01-Mar-26 12:30:00 GMT", "Sun, 01 Mar 2026 13:30:00 +0100"],
)
def test_dates(header: str) -> None:
    assert retry_after(header, NOW) == datetime(2026, 3, 1, 12, 30, tzinfo=UTC)


def test_a_header_that_is_missing_says_nothing() -> None:
    assert retry_after(None) is None


def test_a_wait_without_end_is_cut() -> None:
    assert retry_after("1e300", NOW) < NOW + timedelta(days=3651)


@pytest.mark.parametrize("header", ["soon", "", "-1", "inf", "nan", "Sun, 99 Mar 2026"])
def test_what_is_no_time_is_said(header: str) -> None:
    with pytest.raises(UsageError, match="Retry-After"):
        retry_after(header, NOW)


def test_a_handler_may_pass_the_header_as_it_came() -> None:
    error = RateLimited(retry_after="120", selector={"provider": "p"})

    assert (error.retry_after, error.selector, error.until) == ("120", {"provider": "p"}, None)
    assert error.message == "The target takes no more for now."
