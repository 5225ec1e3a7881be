"""Adding jobs to a run, in batches that are open under a lease.

A stream is published as it comes, page by page, as the run's bound leaves room (`room.py`). A whole batch (a file)
shows nothing of itself before it is closed, and a duplicate id takes all of it back. Either way memory is bounded by a
page.

States of a batch: open -> closing -> closed; open -> interrupted (its seeder died; seeding on with `skip_existing`
closes it); open -> removing (taken back). The sweep finishes what a dead seeder left in closing or removing.
"""

from __future__ import annotations

import itertools
import logging
import threading
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from pipeline_app.control.seed import paging
from pipeline_app.control.seed.paging import PAGE
from pipeline_app.control.seed.room import Room, Waiting
from pipeline_app.control.seed.rows import new_row, partition_rows, queue_up
from pipeline_app.control.seed.rows import size as rows_size
from pipeline_app.control.targets import throttles
from pipeline_app.domain.job import JobLine, job_key
from pipeline_app.domain.plan import RunPlan
from pipeline_app.domain.states import JobState, MessageState
from pipeline_app.errors import DuplicateJobError, PipelineError, RefusedError, StoreError
from pipeline_app.flow.enqueue import new_messages
from pipeline_app.flow.forward import publish_or_leave
from pipeline_app.runtime import Runtime
from pipeline_app.store import counters, events, jobs, manifests, messages, partitions, transition, turns
from pipeline_app.store.client import Document
from pipeline_app.store.transition import SEED_PREFIX, DuplicateKeyFoundError, NotFittingError, Transition
from pipeline_app.store.workers import LEASE_S, RENEW_S

logger = logging.getLogger(__name__)

#: Bytes of the payloads in one transaction, roughly; beside it, a page bounds the number of jobs.
PAGE_BYTES = 16 * 1024 * 1024

Progress = Callable[[int], None]


@dataclass(frozen=True, kw_only=True)
class Seeded:
    """What a seeding did."""

    run: str
    batch: str
    #: Jobs that were added.
    added: int
    #: Jobs that were in the run already (only with `skip_existing`).
    skipped: int
    #: Whether the broker has all that may go now; if not, the sweep publishes it.
    published: bool


def seed(
    rt: Runtime,
    run: str,
    lines: Iterable[JobLine | Mapping[str, Any]],
    *,
    whole: bool = False,
    skip_existing: bool = False,
    progress: Progress = lambda added: None,
    waiting: Waiting = lambda why: None,
) -> Seeded:
    """Add jobs to a run, in constant memory.

    Args:
        whole: nothing is published before all are in, and an error takes all of them back; without it, what was added
            before an error stays.
        skip_existing: jobs that are in the run already are passed over, and batches whose seeder died are closed.
        progress: called with the number of jobs added so far.
        waiting: called with what is waited for, again and again, while the run's bound leaves no room.

    Raises NotFoundError, RefusedError (the run was cancelled; it has a bound, and `whole` is asked for),
    BadJobLineError, DuplicateJobError, StoreError.
    """
    manifest = manifests.get(rt.store, run)
    if manifest["cancelled_at"] is not None:
        raise RefusedError(f"run {manifest['_id']} was cancelled", hint="make another run")
    plan = RunPlan.of(manifest)
    if whole and plan.bound is not None:
        what = f"run {plan.run} has a bound of {plan.bound:,}: jobs must start before all are in"
        raise RefusedError(what, hint="seed them as a stream: whole=False")
    if skip_existing:
        sweep(rt)  # a seeder that died may not have been noticed yet: no worker need be there
    batch = _Batch(rt, plan, progress, whole=whole, skip_existing=skip_existing)
    room = Room(rt, plan, batch.id, waiting)
    with batch.leased():
        try:
            for page in paging.full(lines) if whole else paging.as_they_come(lines):
                for part in room.parts(batch.fresh(page)):
                    batch.add(part)
        except BaseException as exc:
            batch.abandon(exc)
            raise
        if skip_existing:
            # Before its own: those that were added first go first.
            for row in manifests.batches(rt.store, batch.plan.run, "interrupted"):
                # Only those that these jobs belong to: another file's batch may still lack jobs.
                if row["_id"] in batch.met or not row["jobs"]:
                    batch.published &= close_batch(rt, row)
        batch.close()
    return Seeded(
        run=batch.plan.run, batch=batch.id, added=batch.added, skipped=batch.skipped, published=batch.published
    )


class _Batch:
    """A batch while its seeder works on it."""

    def __init__(
        self, rt: Runtime, plan: RunPlan, progress: Progress, *, whole: bool, skip_existing: bool
    ) -> None:
        self.rt = rt
        self.plan = plan
        self._progress = progress
        self.id = messages.new_id()
        self.whole = whole
        self.skip_existing = skip_existing
        self.added = 0
        self.skipped = 0
        self.published = True
        self._ordered = False
        self._keyed = False
        #: Batches of the jobs that were there already.
        self.met: set[str] = set()
        self._partitions: set[str] = set()
        # Grows from batch to batch: two million to each millisecond, in 63 bits.
        self._seq = itertools.count(int(rt.store.now().timestamp() * 1000) << 21)

    @contextmanager
    def leased(self) -> Iterator[None]:
        """The batch is open, and a thread keeps it so, however slowly its jobs come."""
        mine = {"run": self.plan.run, "process": self.rt.process}
        manifests.open_batch(self.rt.store, self.id, **mine, whole=self.whole, lease_s=LEASE_S)
        ended = threading.Event()

        def renew() -> None:
            while not ended.wait(RENEW_S):
                try:
                    manifests.renew_batch(self.rt.store, self.id, jobs=self.added, lease_s=LEASE_S)
                except StoreError as exc:
                    logger.warning("the batch's lease was not renewed: %s", exc)

        thread = threading.Thread(target=renew, name="pipeline-seed-lease", daemon=True)
        thread.start()
        try:
            yield
        finally:
            ended.set()
            thread.join()

    def fresh(self, lines: Sequence[JobLine]) -> Sequence[JobLine]:
        """Those that are to be added. Raises DuplicateJobError."""
        if self.skip_existing:
            there = jobs.existing(self.rt.store, [job_key(self.plan.run, line.job_id) for line in lines])
            first = {line.job_id: line for line in reversed(lines)}
            fresh = [line for key, line in first.items() if job_key(self.plan.run, key) not in there]
            fresh.reverse()
            self.met.update(there.values())
            self.skipped += len(lines) - len(fresh)
            lines = fresh
        self._refuse_doubles(lines)
        return lines

    def add(self, lines: Sequence[JobLine]) -> None:
        """One transaction (or a few, if payloads are large): jobs, their messages, counters and an event."""
        if not self._ordered and any(line.priority for line in lines):
            # Before the first of them can go straight to the broker, which knows no order but its own.
            throttles.order_run(self.rt, self.plan.run, reason="jobs were seeded with a priority")
            self._ordered = True
        rows: list[tuple[JobLine, Document]] = []
        size = 0
        for line in lines:
            seq, now = next(self._seq), self.rt.store.now()
            row = new_row(self.rt, self.plan, line, batch=self.id, seq=seq, shown=not self.whole, now=now)
            size += rows_size(line, row)
            rows.append((line, row))
            if size > PAGE_BYTES:
                self._insert(rows)
                rows, size = [], 0
        if rows:
            self._insert(rows)

    def _refuse_doubles(self, lines: Sequence[JobLine]) -> None:
        seen: set[str] = set()
        for line in lines:
            if line.job_id in seen:
                raise DuplicateJobError(f"job {line.job_id!r} is there twice")
            seen.add(line.job_id)

    def _insert(self, rows: Sequence[tuple[JobLine, Document]]) -> None:
        now = self.rt.store.now()
        documents = [row for _, row in rows]
        self._ensure_partitions(rows)
        if not self._keyed and any("order_key" in row for row in documents):
            # Before the first of them: whoever closes the batch has to let them queue up.
            manifests.note_keyed(self.rt.store, self.id)
            self._keyed = True
        whole = Transition(worker=SEED_PREFIX + self.id, now=now, new_jobs=documents)
        whole.join.update(row["queues_for"] for row in documents if "queues_for" in row)
        groups: dict[str, list[Document]] = defaultdict(list)
        for row in documents:
            place = (self.plan.run, row["stage"], row["partition"])
            whole.count(place, None, row["state"], 1)
            whole.counts[place]["seeded"] += 1
            if row["state"] == JobState.PENDING:
                groups[row["partition"]].append(row)
        for partition, group in groups.items():
            self._give_messages(whole, partition, group, now)
        first = self.plan.stages[0].name
        ids = [row["job"] for row in documents]
        whole.events.append(transition.event(self.plan.run, first, "seeded", jobs=ids, now=now, batch=self.id))
        try:
            transition.apply(self.rt.store, whole)
        except DuplicateKeyFoundError as exc:
            job_id = next((row["job"] for row in documents if row["_id"] == exc.key), exc.key)
            raise DuplicateJobError(
                f"job {job_id!r} is in run {self.plan.run} already", hint="--skip-existing passes over such jobs"
            ) from exc
        self.added += len(documents)
        # Before they are published: whoever stops it meanwhile is told how many are in.
        self._progress(self.added)
        if not self.whole:
            self.published &= publish_or_leave(self.rt, whole.messages)

    def _give_messages(self, whole: Transition, partition: str, group: Sequence[Document], now: datetime) -> None:
        by_id = {row["job"]: row for row in group}
        for message in new_messages(self.plan, self.plan.stages[0].name, partition, list(by_id), now):
            message["batch"] = self.id
            if self.whole:
                message["state"] = MessageState.DRAFT
            for job_id in message["jobs"]:
                by_id[job_id]["message"] = message["_id"]
            whole.messages.append(message)

    def _ensure_partitions(self, rows: Sequence[tuple[JobLine, Document]]) -> None:
        """Workers must be able to find a partition's queues before the first message is in one."""
        new: list[Document] = []
        for line, row in rows:
            if row["partition"] not in self._partitions:
                self._partitions.add(row["partition"])
                new.extend(partition_rows(self.plan, line))
        partitions.ensure(self.rt.store, new)

    def abandon(self, exc: BaseException) -> None:
        """An error ends the seeding: a whole batch is taken back, a stream keeps what it added."""
        store = self.rt.store
        if isinstance(exc, StoreError):
            return  # the sweep finds it when its lease has ended
        if self.whole:
            if manifests.set_batch(store, self.id, "removing", expected=("open", "interrupted")):
                remove_batch(self.rt, self.plan.run, self.id)
            return
        # A stream that was refused a line is closed: what it added is all there is of it. One whose seeder was
        # stopped from outside is not known to be complete.
        if isinstance(exc, PipelineError):
            self.close()
        else:
            manifests.set_batch(store, self.id, "interrupted", expected=("open",), jobs=self.added)

    def close(self) -> None:
        """All jobs are in: a whole batch opens its messages and publishes them."""
        manifests.renew_batch(self.rt.store, self.id, jobs=self.added, lease_s=LEASE_S)
        self.published &= close_batch(self.rt, {"_id": self.id, "run": self.plan.run})


def close_batch(rt: Runtime, batch: Document) -> bool:
    """Close a batch and publish what was hidden; False if the broker is away and the sweep has to.

    May be asked again after any crash.
    """
    # Also what was closed already: a seeder that was only slow may have added to it since.
    if not manifests.set_batch(
        rt.store, batch["_id"], "closing", expected=("open", "interrupted", "closing", "closed")
    ):
        return True  # it is being taken back
    published = True
    # Page by page: a run of millions has more drafts than one write can open in time.
    while page := messages.drafts(rt.store, batch["_id"], PAGE):
        messages.open_drafts(rt.store, [row["_id"] for row in page])
        # Without a broker the rest is opened all the same; the sweep publishes it.
        published = published and publish_or_leave(rt, page)
    if manifests.is_keyed(rt.store, batch["_id"]):
        _queue_up(rt, batch)
    counters.release(rt.store, SEED_PREFIX + batch["_id"])
    manifests.set_batch(rt.store, batch["_id"], "closed", expected=("closing",))
    return published


def _queue_up(rt: Runtime, batch: Document) -> None:
    """Let the batch's jobs with an order key wait for their turns, page by page, in the order in which they came."""
    event = events.of_batch(rt.store, batch["_id"])
    while event is not None:
        keys = [job_key(batch["run"], job_id) for job_id in event["jobs"]]
        while rows := turns.not_queued(rt.store, keys, batch["_id"]):
            whole = Transition(now=rt.store.now())
            whole.moves, whole.join = queue_up(rows)
            try:
                with rt.counting() as whole.worker:
                    transition.apply(rt.store, whole)
            except NotFittingError:
                continue  # somebody else closes it, too, and was faster
        event = events.of_batch(rt.store, batch["_id"], event["_id"])


def remove_batch(rt: Runtime, run: str, batch: str) -> None:
    """Take a batch back that never showed itself; may be asked again after any crash.

    Its jobs are found by its own events: a look at all jobs of a run would take longer than a call may.
    """
    while page := messages.drafts(rt.store, batch, PAGE):
        messages.delete(rt.store, [row["_id"] for row in page])
    while event := events.of_batch(rt.store, batch):
        jobs.delete(rt.store, [job_key(run, job_id) for job_id in event["jobs"]], batch)
        events.delete(rt.store, event["_id"])
    counters.delete_process(rt.store, SEED_PREFIX + batch)
    manifests.delete_batch(rt.store, batch)


def hidden_batches(rt: Runtime) -> list[str]:
    """Whole batches that are not closed: their jobs don't show yet."""
    rows = manifests.batches_in(rt.store, "open", "interrupted", "removing")
    return [row["_id"] for row in rows if row["whole"]]


def sweep(rt: Runtime) -> None:
    """What seeders left behind that died."""
    for row in manifests.abandoned_batches(rt.store, "open", "closing", "removing"):
        # Killed in the middle of a page it holds the turns of its keys, which other duties need.
        rt.store.end_transactions(row.get("process", ""))
        if row["state"] == "open":
            logger.warning("its seeder is gone: batch=%s run=%s", row["_id"], row["run"])
            manifests.set_batch(rt.store, row["_id"], "interrupted", expected=("open",))
        elif row["state"] == "closing":
            close_batch(rt, row)
        else:
            remove_batch(rt, row["run"], row["_id"])
