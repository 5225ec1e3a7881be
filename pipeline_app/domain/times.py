"""Points in time as people write them: `+30m` from now, or ISO 8601 (UTC if it has no zone)."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

from pipeline_app.domain.durations import seconds
from pipeline_app.errors import UsageError

_HINT = "write +30m for half an hour from now, -2h for two hours ago, or ISO 8601 such as 2026-03-01T14:32:00Z"


def point_in_time(text: str, now: datetime) -> datetime:
    """The time that `text` names, in UTC, to the millisecond.

    Raises UsageError for an unknown unit or anything that is not a time.
    """
    text = text.strip()
    try:
        if text[:1] in ("+", "-"):
            distance = timedelta(seconds=seconds(text[1:]))
            at = now + distance if text[0] == "+" else now - distance
        else:
            at = datetime.fromisoformat(text)
        at = at.replace(tzinfo=UTC) if at.tzinfo is None else at.astimezone(UTC)
    except UsageError as exc:
        raise UsageError(f"not a time: {text!r} ({exc.message})", hint=_HINT) from exc
    except (ValueError, OverflowError) as exc:
        raise UsageError(f"not a time: {text!r}", hint=_HINT) from exc
    return at.replace(microsecond=at.microsecond // 1000 * 1000)


def time_to_come(text: str, now: datetime) -> datetime:
    """The same, for what must not be over yet. Raises UsageError."""
    at = point_in_time(text, now)
    if at <= now:
        raise UsageError(f"{text} is in the past: it is {now:%Y-%m-%dT%H:%M:%SZ}", hint=_HINT)
    return at
