"""What a handler's `RateLimited` makes: its target is closed, for this process at once, for others through the store.

A thousand jobs that meet the same closed provider make one hold: its id is that of its target, and who has said so
already says it again only if the time has moved.
"""

from __future__ import annotations

import logging
import threading
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

from pipeline_app.domain.outcome import ErrorRecord
from pipeline_app.domain.partition import target_tags
from pipeline_app.domain.rate_limit import DEFAULT_S, LONGEST_S, retry_after
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
#: Longer reasons are cut: they stand in lists.
LONGEST_REASON = 500


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
        # As the ledger keeps it: whatever the handler raised it with, it can be stored.
        reason = ErrorRecord.of(exc).message[:LONGEST_REASON]
        actor = f"{work.task} on {self._rt.incarnation()}"
        closing = Closing(hold=hold, target=target, until=until, reason=reason, actor=actor)
        with self._lock:
            if self._is_said(work, hold, until):
                return hold
            now = self._rt.store.now()
            self._said = {known: end for known, end in self._said.items() if end > now} | {hold: until}
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
            try:
                row = holds.close(
                    self._rt.store,
                    holds.HOLD,
                    closing.target,
                    until=closing.until,
                    reason=closing.reason,
                    actor=closing.actor,
                    by_handler=True,
                )
            except StoreError:
                raise
            except Exception:
                # One that cannot be stored must not stand before all that come after it.
                logger.exception("cannot close: hold=%s target=%s", closing.hold, closing.target)
                self._forget(closing)
                continue
            # Told before it is forgotten here: without a word the others would look at it only seconds later.
            announce(self._rt)
            self._forget(closing)
            until = row["until"]
            logger.warning("closed: hold=%s target=%s until=%s: %s", row["_id"], closing.target, until, row["reason"])

    def _forget(self, closing: Closing) -> None:
        with self._lock:
            if closing in self._unsaved:
                self._unsaved.remove(closing)
        self._rt.memory.closed(closing.hold)

    def _is_said(self, work: Work, hold: str, until: datetime) -> bool:
        """Whether this process has said so already, and it is still so."""
        said = self._said.get(hold)
        if said is None or said <= self._rt.store.now() or until - said > timedelta(seconds=WORTH_S):
            return False
        # A probe that is refused says that the target is closed once more; and a hold that was cleared is none.
        probes = work.released_by is not None and work.released_by.startswith(f"{hold}/")
        return not probes and any(closure.id == hold for _, closure in self._rt.memory.flags().closures.entries)


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
    """When the target may be asked again, within reason; what the handler says may be anything."""
    try:
        at = _said_until(exc, now)
    except (UsageError, TypeError, ValueError, OverflowError, AttributeError) as error:
        logger.warning("RateLimited: %s: closing for %.0f s instead", error, DEFAULT_S)
        at = now + timedelta(seconds=DEFAULT_S)
    # A time that is over already still means "not now".
    return min(max(at, now + timedelta(seconds=0.1)), now + timedelta(seconds=LONGEST_S))


def _said_until(exc: RateLimited, now: datetime) -> datetime:
    at = exc.until
    if at is None:
        at = retry_after(exc.retry_after, now)
    if at is None:
        at = now + timedelta(seconds=DEFAULT_S)
    return at.replace(tzinfo=UTC) if at.tzinfo is None else at.astimezone(UTC)
