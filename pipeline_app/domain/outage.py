"""When to say that something is away: at once, then at growing intervals, and once more when it is back.

Used by every loop that waits for a service: a log of an outage of an hour has a dozen lines of each, not thousands.
"""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

#: It is said again after this, and each time after twice as long, at most LONGEST.
FIRST = timedelta(seconds=15)
LONGEST = timedelta(minutes=15)


class Outage:
    """One thing that may be away, as one loop sees it."""

    def __init__(self) -> None:
        #: When it first did not answer; None while it does.
        self.since: datetime | None = None
        self._interval = FIRST
        self._say_at = datetime.min.replace(tzinfo=UTC)

    def goes_on(self, now: datetime) -> bool:
        """It did not answer; whether that is to be said now."""
        if self.since is None:
            self.since, self._interval, self._say_at = now, FIRST, now + FIRST
            return True
        if now < self._say_at:
            return False
        self._interval = min(self._interval * 2, LONGEST)
        self._say_at = now + self._interval
        return True

    def ends(self, now: datetime) -> timedelta | None:
        """It answers; how long it was away, None if it was not."""
        since, self.since = self.since, None
        return None if since is None else now - since
