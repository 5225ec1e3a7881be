"""Rates and budgets as people write them."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline_app.domain.rates import Budget, Rate
from pipeline_app.errors import UsageError


@pytest.mark.parametrize(
    ("text", "per_s", "written"),
    [
        ("39/s", 39.0, "39/s"),
        ("100/m", 100 / 60, "100/m"),
        ("5000/h", 5000 / 3600, "5000/h"),
        ("20000/d", 20000 / 86400, "20000/d"),
        ("100/10s", 10.0, "10/s"),
        ("1/7s", 1 / 7, "1/7s"),
        ("90/1h30m", 1 / 60, "1/m"),
        ("0.5/s", 0.5, "30/m"),
        ("2/500ms", 4.0, "4/s"),
        (" 39 / s ", 39.0, "39/s"),
        ("1e3/s", 1000.0, "1000/s"),
        ("+.5/s", 0.5, "30/m"),
        ("0.123456789/s", 0.123456789, "0.123457/s"),
    ],
)
def test_a_rate_is_read_and_written(text: str, per_s: float, written: str) -> None:
    found = Rate.parse(text)
    assert found.per_s == pytest.approx(per_s)
    assert found.written == written


@pytest.mark.parametrize(
    ("text", "amount", "unit", "period_s", "written"),
    [
        ("100000 tokens/1d", 100_000.0, "tokens", 86400.0, "100000 tokens/1d"),
        ("20 usd/h", 20.0, "usd", 3600.0, "20 usd/1h"),
        ("1e6/d", 1e6, "units", 86400.0, "1000000 units/1d"),
        ("0.25 usd/1h30m", 0.25, "usd", 5400.0, "0.25 usd/1h30m"),
        ("1234567.75 tokens/1500ms", 1_234_567.75, "tokens", 1.5, "1234567.75 tokens/1s500ms"),
        ("5 input-tokens / m", 5.0, "input-tokens", 60.0, "5 input-tokens/1m"),
    ],
)
def test_a_budget_is_read_and_written(text: str, amount: float, unit: str, period_s: float, written: str) -> None:
    found = Budget.parse(text)
    assert (found.amount, found.unit) == (amount, unit)
    assert found.period_s == pytest.approx(period_s)
    assert found.written == written


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("-1/s", "is not negative"),
        ("-0.5/m", "is not negative"),
        ("0/s", "of zero lets nothing through"),
        ("0.0/d", "of zero lets nothing through"),
        ("1e400/s", "ends"),
        ("1/x", "unknown unit or period 'x'"),
        ("1/month", "unknown unit or period 'month'"),
        ("1/S", "unknown unit or period 'S'"),
        ("1/-5s", "unknown unit or period '-5s'"),
        ("1/5", "the period of a .* has a unit"),
        ("1/1.5", "the period of a .* has a unit"),
        ("1/0s", "the period of a .* is between"),
        ("1/367d", "the period of a .* is between"),
        ("39", "not a "),
        ("", "not a "),
        ("/s", "not a "),
        ("5/", "not a "),
        ("1/2/s", "not a "),
        ("nan/s", "not a "),
        ("inf/s", "not a "),
        ("1,000/s", "not a "),
        ("1_000/s", "not a "),
        ("many/s", "not a "),
    ],
)
@pytest.mark.parametrize("kind", [Rate, Budget])
def test_what_is_neither_is_refused_quoted_and_helped(kind: type[Rate] | type[Budget], text: str, message: str) -> None:
    with pytest.raises(UsageError, match=message) as caught:
        kind.parse(text)
    assert repr(text) in caught.value.message
    assert kind.__name__.lower() in caught.value.message
    assert caught.value.hint


@pytest.mark.parametrize("text", ["39 requests/s", "1e-9/d", "0.9/366d"])
def test_a_rate_counts_jobs_and_is_not_next_to_nothing(text: str) -> None:
    with pytest.raises(UsageError, match="not a rate"):
        Rate.parse(text)


@pytest.mark.parametrize("text", ["100tokens/d", "100 5/d", "100 a b/d"])
def test_a_budget_has_one_unit_behind_a_space(text: str) -> None:
    with pytest.raises(UsageError, match="not a budget"):
        Budget.parse(text)


@given(number=st.integers(1, 10**6), period=st.sampled_from(["s", "m", "h", "d", "10s", "1h30m"]))
def test_what_is_written_reads_as_the_same_rate(number: int, period: str) -> None:
    rate = Rate.parse(f"{number}/{period}")
    assert Rate.parse(rate.written).per_s == pytest.approx(rate.per_s)


@given(
    amount=st.floats(1e-3, 1e12), unit=st.from_regex(r"[A-Za-z_][\w.-]{0,9}", fullmatch=True), ms=st.integers(1, 10**9)
)
def test_what_is_written_reads_as_the_same_budget(amount: float, unit: str, ms: int) -> None:
    budget = Budget.parse(f"{amount!r} {unit}/{ms}ms")
    again = Budget.parse(budget.written)
    assert again.unit == unit
    assert (again.amount, again.period_s) == pytest.approx((amount, ms / 1000))
