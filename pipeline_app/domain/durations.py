"""Durations as people write them: `2s`, `5m`, `1h30m`, or a number of seconds."""

from __future__ import annotations

import re

from pipeline_app.errors import UsageError

_UNITS = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}
_PART = re.compile(r"(\d+(?:\.\d+)?)(ms|s|m|h|d)")


def seconds(text: str | float) -> float:
    """Seconds in `text`.

    Raises UsageError for an unknown unit, a negative number or anything that is not a duration.
    """
    value = _parse(str(text).strip())
    if not 0 <= value < float("inf"):
        raise UsageError(f"a duration is not negative and ends: {text!r}")
    return value


def _parse(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        pass
    parts = _PART.findall(text)
    if not parts or "".join(number + unit for number, unit in parts) != text:
        raise UsageError(f"not a duration: {text!r}", hint="write 500ms, 2s, 5m, 1h30m or a number of seconds")
    return sum(float(number) * _UNITS[unit] for number, unit in parts)
