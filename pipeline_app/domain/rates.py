"""Rates and budgets as people write them: `39/s`, `100/10s`, `100000 tokens/1d`.

Throttles are set with them; the throttling gate works with the numbers in them.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from pipeline_app.domain.durations import seconds
from pipeline_app.errors import UsageError

#: What nobody reports a unit for is counted in these.
DEFAULT_UNIT = "units"
#: A longer period, or a slower rate than one in it, is a slip of the pen.
LONGEST_PERIOD_S = 366 * 86400.0

_RATE_HINT = "write 39/s, 100/m, 5000/h, 20000/d or 100/10s"
_BUDGET_HINT = "write '100000 tokens/1d', '20 usd/h' or 1e6/d"

_NUMBER = r"(?P<number>[-+]?(?:\d+(?:\.\d*)?|\.\d+)(?:[eE][-+]?\d+)?)"
_RATE = re.compile(rf"{_NUMBER}\s*/\s*(?P<period>\S+)")
_BUDGET = re.compile(rf"{_NUMBER}(?:\s+(?P<unit>[A-Za-z_][\w.-]*))?\s*/\s*(?P<period>\S+)")

_PERIODS = {"s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}


#: More than this no throttle could tell from none.
FASTEST_PER_S = 1e6


@dataclass(frozen=True)
class Rate:
    """How many may start in a time."""

    per_s: float

    @classmethod
    def parse(cls, text: str) -> Rate:
        """The rate that `39/s` or `100/10s` names.

        Raises UsageError for a negative number, zero, an unknown unit or none.
        """
        found = _RATE.fullmatch(text.strip())
        if found is None:
            raise UsageError(f"not a rate: {text!r}", hint=_RATE_HINT)
        number = _positive(found["number"], text, "rate", _RATE_HINT)
        per_s = number / _period_s(found["period"], text, "rate", _RATE_HINT)
        if per_s > FASTEST_PER_S:
            raise UsageError(f"that is no limit: {text!r}", hint=f"a rate is at most {FASTEST_PER_S:,.0f}/s")
        if per_s * LONGEST_PERIOD_S < 1:
            raise UsageError(f"less than one a year is not a rate: {text!r}", hint=_RATE_HINT)
        return cls(per_s)

    @property
    def written(self) -> str:
        """`39/s`, `100/m`: in the shortest unit that makes it a whole number."""
        for unit, period in _PERIODS.items():
            if _is_whole(self.per_s * period):
                return f"{round(self.per_s * period)}/{unit}"
        if _is_whole(1 / self.per_s):
            return f"1/{_written_period(1 / self.per_s)}"
        return f"{self.per_s:.6g}/s"


@dataclass(frozen=True)
class Budget:
    """How much of something that handlers report may be spent in a period."""

    amount: float
    unit: str
    period_s: float

    @classmethod
    def parse(cls, text: str) -> Budget:
        """The budget that `100000 tokens/1d` names; without a unit, in `units`.

        Raises UsageError for a negative amount, zero, a period with an unknown unit or without one.
        """
        found = _BUDGET.fullmatch(text.strip())
        if found is None:
            raise UsageError(f"not a budget: {text!r}", hint=_BUDGET_HINT)
        amount = _positive(found["number"], text, "budget", _BUDGET_HINT)
        return cls(amount, found["unit"] or DEFAULT_UNIT, _period_s(found["period"], text, "budget", _BUDGET_HINT))

    @property
    def written(self) -> str:
        """`100000 tokens/1d`."""
        return f"{self.amount:.15g} {self.unit}/{_written_period(self.period_s)}"


def _positive(number: str, text: str, word: str, hint: str) -> float:
    value = float(number)
    if value < 0:
        raise UsageError(f"a {word} is not negative: {text!r}", hint=hint)
    if value == 0:
        raise UsageError(f"a {word} of zero lets nothing through: {text!r}", hint="a hold closes a target: hold set")
    if value == float("inf"):
        raise UsageError(f"a {word} ends: {text!r}", hint=hint)
    return value


def _period_s(period: str, text: str, word: str, hint: str) -> float:
    if not period[-1].isalpha():
        raise UsageError(f"the period of a {word} has a unit: {text!r}", hint=hint)
    try:
        found = seconds("1" + period if period.isalpha() else period)
    except UsageError as exc:
        raise UsageError(f"not a {word}: {text!r} (unknown unit or period {period!r})", hint=hint) from exc
    if not 0 < found <= LONGEST_PERIOD_S:
        raise UsageError(f"the period of a {word} is between 1ms and 366d: {text!r}", hint=hint)
    return found


def _is_whole(value: float) -> bool:
    return value >= 0.5 and abs(value - round(value)) <= 1e-9 * value


def _written_period(period_s: float) -> str:
    """`1d`, `1h30m`, `10s`, `500ms`."""
    left = round(period_s * 1000)
    parts = []
    for unit, size in (("d", 86_400_000), ("h", 3_600_000), ("m", 60_000), ("s", 1000), ("ms", 1)):
        count, left = divmod(left, size)
        if count:
            parts.append(f"{count}{unit}")
    return "".join(parts)
