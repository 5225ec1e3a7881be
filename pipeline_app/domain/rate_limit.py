"""What a provider says when it will not serve us now: `Retry-After`, seconds or an HTTP date (RFC 9110, 10.2.3)."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from email.utils import parsedate_to_datetime

from pipeline_app.errors import UsageError

#: A provider that does not say when is asked again after this; longer each time that it refuses.
DEFAULT_S = 5.0
#: Nobody closes a target for longer than this by mistake in a header: ten years.
LONGEST_S = 10 * 365 * 86400.0


def retry_after(header: str | float | None, now: datetime | None = None) -> datetime | None:
    """When a `Retry-After` header says that one may ask again, in UTC; None for a header that is missing.

    Args:
        header: seconds (`"120"`, also with a fraction), or an HTTP date (`"Fri, 31 Dec 1999 23:59:59 GMT"`).
        now: what seconds count from; the time of this machine if not given.

    Raises UsageError if it is neither.
    """
    if header is None:
        return None
    now = now or datetime.now(UTC)
    try:
        wait_s = float(header)
    except ValueError:
        return _http_date(str(header))
    if not 0 <= wait_s < float("inf"):
        raise UsageError(f"Retry-After: {header!r} is no time to wait")
    return now + timedelta(seconds=min(wait_s, LONGEST_S))


def _http_date(text: str) -> datetime:
    try:
        at = parsedate_to_datetime(text.strip())
        return at.replace(tzinfo=UTC) if at.tzinfo is None else at.astimezone(UTC)
    except (TypeError, ValueError, OverflowError) as exc:
        raise UsageError(f"Retry-After: {text!r} is neither seconds nor an HTTP date") from exc
