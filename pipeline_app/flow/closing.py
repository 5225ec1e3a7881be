"""What a handler's `RateLimited` makes: its target is closed, for this process at once, for others through the store.

A thousand jobs that meet the same closed provider make one hold: its id is that of its target, and who has said so
already says it again only if the time has moved.
"""

from __future__ import annotations

import logging
import threading
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

from pipeline_app.domain.partition import target_tags
from pipeline_app.domain.rate_limit import DEFAULT_S, retry_after
from pipeline_app.domain.selector import check_selector
from pipeline_app.domain.target import Target
from pipeline_app.errors import RateLimited, StoreError, UsageError
from pipeline_app.flow.announce import announce
from pipeline_app.flow.claim import Work
from pipeline_app.runtime import Runtime
from pipeline_app.store import holds

logger = logging.getLogger(__name__)

#: A hold is not written again for moving its end by less than this.
WORTH_S = 0.25


@dataclass(frozen=True, kw_only=True)
class Closing:
    """A hold that a handler asked for."""

    hold: str
    target: Target
    until: datetime
    reason: str
    actor: str


class Closings:
    """The holds that handlers of this process set."""

    def __init__(self, rt: Runtime) -> None:
        self._rt = rt
        self._lock = threading.Lock()
        #: Hold -> until when it is closed, as this process said last.
        self._said: dict[str, datetime] = {}
        self._unsaved: list[Closing] = []

    def close(self, work: Work, job_id: str, exc: RateLimited) -> str:
        """Close the target of a job for what `exc` says; returns the hold's id.

        What the store could not take yet is said by `settle`, before the job is recorded as held.
        """
        target = _target(work, job_id, exc)
        hold = target.digest(holds.HOLD)
        until = _until(exc, self._rt.store.now())
        closing = Closing(
            hold=hold, target=target, until=until, reason=exc.message, actor=f"{work.task} on {self._rt.incarnation()}"
        )
        with self._lock:
            said = self._said.get(hold)
            now = self._rt.store.now()
            # What was said before and is over by now was another closing.
            if said is not None and said > now and until - said <= timedelta(seconds=WORTH_S):
                return hold
            self._said[hold] = until
            self._unsaved.append(closing)
        self._rt.memory.close(hold, target)
        try:
            self.settle()
        except StoreError as exc_:
            logger.warning("the hold is not stored yet: hold=%s: %s", hold, exc_)
        return hold

    def settle(self) -> None:
        """Store what is not stored yet. Raises StoreError; then ask again."""
        while True:
            with self._lock:
                if not self._unsaved:
                    return
                closing = self._unsaved[0]
            row = holds.close(
                self._rt.store,
                holds.HOLD,
                closing.target,
                until=closing.until,
                reason=closing.reason,
                actor=closing.actor,
                by_handler=True,
            )
            with self._lock:
                if closing in self._unsaved:
                    self._unsaved.remove(closing)
                if row["until"] is not None:
                    self._said[closing.hold] = max(self._said[closing.hold], row["until"])
            self._rt.memory.closed(closing.hold)
            until = row["until"]
            logger.warning("closed: hold=%s target=%s until=%s: %s", row["_id"], closing.target, until, row["reason"])
            announce(self._rt)


def _target(work: Work, job_id: str, exc: RateLimited) -> Target:
    if exc.selector:
        try:
            return Target(selector=check_selector(exc.selector))
        except UsageError as error:
            logger.warning("%s: closing the job's own target instead", error.message)
    tags = target_tags(work.jobs[job_id]["tags"], work.plan.partition_by)
    # A job without tags tells no target: its stage is what is closed.
    return Target(selector=tags) if tags else Target(stage=work.task)


def _until(exc: RateLimited, now: datetime) -> datetime:
    at = exc.until
    if at is None:
        try:
            at = retry_after(exc.retry_after, now)
        except UsageError as error:
            logger.warning("%s: closing for %.0f s instead", error.message, DEFAULT_S)
    if at is None:
        at = now + timedelta(seconds=DEFAULT_S)
    at = at.replace(tzinfo=UTC) if at.tzinfo is None else at.astimezone(UTC)
    # A time that is over already still means "not now".
    return max(at, now + timedelta(seconds=0.1))
