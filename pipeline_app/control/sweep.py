"""What makes everything go on by itself. Runs inside the workers, one leader at a time by a lease.

Each duty looks at what is stored and makes one small transition after another, each of them guarded: two leaders at
once do no harm, and a leader that dies in the middle leaves nothing half done.
"""

from __future__ import annotations

import logging
import random
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import datetime, timedelta

from pipeline_app.control import cancelling, seeding
from pipeline_app.domain.outcome import ErrorRecord
from pipeline_app.domain.partition import queue_stage
from pipeline_app.domain.states import JobState
from pipeline_app.errors import BrokerError, StoreError
from pipeline_app.flow.enqueue import enqueued_state, new_messages, then_queue
from pipeline_app.flow.forward import publish_or_leave
from pipeline_app.flow.give_back import give_back
from pipeline_app.runtime import Runtime
from pipeline_app.store import counters, jobs, manifests, messages, partitions, transition, workers
from pipeline_app.store.client import Document
from pipeline_app.store.transition import JobMove, NotFittingError, Transition
from pipeline_app.transport.depth import depths

logger = logging.getLogger(__name__)

LEASE = "sweep"
LEASE_S = 10.0
EVERY_S = 1.0
#: Depths are asked of the broker this often, not at every round.
FORGOTTEN_EVERY_S = 5.0
#: Jobs that wait for a worker with their definition are tried this often.
DEFINITIONS_EVERY_S = 5.0
#: Counters that nobody has added to for FOLD_IDLE_S are folded this often.
FOLD_EVERY_S = 30.0
FOLD_IDLE_S = 60.0
#: A leader ends leases only after the store has answered for this long: right after an outage every lease looks ended.
CALM_S = 5.0
PAGE = 5000
#: Jobs in one transaction, each of which may need a message of its own.
JOBS_PAGE = 1000


class Sweep:
    """One worker's part in sweeping: it leads, or stands by."""

    def __init__(self, runtime: Callable[[], Runtime]) -> None:
        self._runtime = runtime
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        self._calm_since = time.monotonic()
        self._last: dict[str, float] = {}

    def start(self) -> None:
        """Begin, in a thread."""
        self._thread = threading.Thread(target=self._run, name="pipeline-sweep", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """End after the duty that is under way, and let another worker lead."""
        self._stop.set()
        if self._thread is not None:
            self._thread.join(timeout=LEASE_S)
        rt = self._runtime()
        try:
            workers.give_up_lead(rt.store, LEASE, rt.process)
        except StoreError as exc:
            logger.info("the lead ends by itself: %s", exc)

    def _run(self) -> None:
        while not self._stop.wait(EVERY_S):
            rt = self._runtime()
            try:
                if workers.lead(rt.store, LEASE, rt.process, LEASE_S):
                    self.round(rt)
            except StoreError as exc:
                logger.info("sweep waits for the store: %s", exc)
                self._calm_since = time.monotonic()
            except Exception:
                # The next round may do better; without this thread nothing that waits would ever go on.
                logger.exception("sweep")

    def round(self, rt: Runtime) -> None:
        """Every duty that is due, each whether or not the one before it could be done.

        Raises StoreError: without the store none can.
        """
        for duty, every_s in DUTIES:
            if duty is end_leases and time.monotonic() - self._calm_since <= CALM_S:
                continue
            if not self._is_time(duty.__qualname__ + duty.__module__, every_s):
                continue
            try:
                duty(rt)
            except StoreError:
                raise
            except BrokerError as exc:
                logger.info("sweep waits for the broker: %s", exc)
            except Exception:
                # A duty that trips over something must not keep all the others from being done.
                logger.exception("sweep: %s", duty.__name__)

    def _is_time(self, what: str, every_s: float) -> bool:
        now = time.monotonic()
        if now - self._last.get(what, float("-inf")) < every_s:
            return False
        self._last[what] = now
        return True


def end_leases(rt: Runtime) -> None:
    """Close the records of workers whose lease has ended, and give back what workers without a lease have claimed."""
    for row in workers.expired(rt.store):
        if workers.end_stale(rt.store, row["_id"]):
            logger.warning("lease ended: worker=%s", row["_id"])
    claimed = messages.claimed(rt.store)
    if not claimed:
        return
    # In this order: a worker that registers between the two questions has no claim among those read before.
    alive = {row["_id"] for row in workers.alive(rt.store)}
    for message in claimed:
        if message["worker"] in alive:
            continue
        lost = ErrorRecord(type="WorkerLost", message=f"the lease of {message['worker']} ended", traceback="")
        logger.warning("taking back: message=%s worker=%s", message["_id"], message["worker"])
        with _contained("taking back", message["_id"]):
            publish_or_leave(rt, give_back(rt, message, lost=lost))


@contextmanager
def _contained(what: str, which: object) -> Iterator[None]:
    """One thing that cannot be done, whatever it trips over, must not keep a duty from the others."""
    try:
        yield
    except (StoreError, BrokerError):
        raise
    except Exception:
        logger.exception("%s: %s", what, which)


def release_due(rt: Runtime) -> None:
    """Enqueue jobs whose delay or retry time has come."""
    while True:
        hidden = seeding.hidden_batches(rt)
        rows = jobs.due(rt.store, rt.store.now(), JOBS_PAGE, hidden)
        # What cannot be moved is looked at in the next round, not over and over in this one.
        if not enqueue_parked(rt, rows, "due") or len(rows) < JOBS_PAGE:
            return


def enqueue_parked(rt: Runtime, rows: Sequence[Document], why: str) -> int:
    """Give jobs that wait in the store a message, in full chunks; returns how many."""
    groups: dict[tuple[str, str, str, str], list[Document]] = defaultdict(list)
    for row in rows:
        groups[row["run"], row["stage"], row["partition"], row["state"]].append(row)
    moved = 0
    for (run, stage, partition, state), group in groups.items():
        with _contained("enqueueing", run):
            fresh = _enqueue_group(rt, run, stage, partition, JobState(state), group, why)
            moved += sum(len(message["jobs"]) for message in fresh)
            publish_or_leave(rt, fresh)
    return moved


def _enqueue_group(
    rt: Runtime, run: str, stage: str, partition: str, state: JobState, rows: Sequence[Document], why: str
) -> list[Document]:
    plan = rt.memory.need_plan(run)
    left = {row["_id"]: row for row in rows}
    while left:
        now = rt.store.now()
        keys = {row["job"]: key for key, row in left.items()}
        fresh = new_messages(plan, stage, partition, list(keys), now)
        whole = Transition(now=now, messages=list(fresh))
        for message in fresh:
            whole.moves.append(
                JobMove(
                    keys=[keys[job] for job in message["jobs"]],
                    guard={"state": state, "message": None},
                    set=enqueued_state(message["_id"]),
                    unset=("due_at", "reason"),
                )
            )
            whole.events.append(
                transition.event(run, stage, "enqueued", jobs=message["jobs"], now=now, message=message["_id"], why=why)
            )
        whole.count((run, stage, partition), state, JobState.PENDING, len(left))
        try:
            with rt.counting() as whole.worker:
                transition.apply(rt.store, whole)
            return fresh
        except NotFittingError as exc:
            left = {key: row for key, row in left.items() if key not in exc.jobs}
    return []


def publish_unpublished(rt: Runtime) -> None:
    """Publish what a process recorded but could not publish."""
    groups: dict[str, list[Document]] = defaultdict(list)
    for row in messages.unpublished(rt.store, _queues(rt), PAGE):
        groups[row["queue"]].append(row)
    # In any order: one queue that the broker refuses ends this round, but not always before the same others.
    for queue in random.sample(sorted(groups), len(groups)):
        logger.warning("publishing what was left unpublished: queue=%s messages=%d", queue, len(groups[queue]))
        if not publish_or_leave(rt, groups[queue]):
            return


def publish_forgotten(rt: Runtime) -> None:
    """Publish again what is open although its queue is empty, or although a later message was claimed from it."""
    now = rt.store.now()
    suspects: dict[str, datetime] = {}
    for queue in _queues(rt):
        oldest = messages.oldest_published(rt.store, queue)
        if oldest is not None and now - oldest > timedelta(seconds=messages.FORGOTTEN_AFTER_S):
            suspects[queue] = now
    if not suspects:
        return
    found = depths(rt.settings.amqp_url, list(suspects))
    latest_claimed = _latest_claimed(rt)
    for queue in suspects:
        # A hint that waits in a queue is not gone; one that was overtaken is, or went to the queue's tail.
        before = now if found[queue].ready == 0 else latest_claimed.get(queue)
        if before is None:
            continue
        rows = messages.forgotten(rt.store, queue, before, PAGE)
        if rows:
            logger.warning("publishing again: queue=%s messages=%d", queue, len(rows))
            publish_or_leave(rt, rows)


def _latest_claimed(rt: Runtime) -> dict[str, datetime]:
    latest: dict[str, datetime] = {}
    for row in messages.claimed(rt.store):
        if row["published_at"] is not None:
            latest[row["queue"]] = max(row["published_at"], latest.get(row["queue"], row["published_at"]))
    return latest


def _queues(rt: Runtime) -> list[str]:
    names = partitions.queues(rt.store)
    pipelines = {name.split(".", 1)[0] for name in names}
    return names + [then_queue(pipeline) for pipeline in sorted(pipelines)]


def release_definitions(rt: Runtime) -> None:
    """Enqueue jobs that waited for a worker with their run's definition, once there is one."""
    waiting = manifests.matching(rt.store, {"awaits_definition": {"$ne": None}})
    if not waiting:
        return
    known: dict[str, set[str]] = defaultdict(set)
    for row in workers.alive(rt.store):
        for digest in row["definitions"]:
            known[digest].update(row["stages"], (queue_stage(queue) for queue in row["queues"]))
    # Not those that come to wait meanwhile: where old and new workers share a queue they might come for ever.
    before = rt.store.now()
    for manifest in waiting:
        names = known[manifest["hash"]]
        stages = [s["name"] for s in manifest["definition"]["stages"] if f"{manifest['pipeline']}.{s['name']}" in names]
        if not stages:
            continue
        while rows := jobs.waiting_for_definition(rt.store, manifest["_id"], stages, before, JOBS_PAGE):
            if not enqueue_parked(rt, rows, "definition"):
                break
        if len(stages) < len(manifest["definition"]["stages"]):
            continue
        # Only if nobody has come to wait since: the flag was written with the jobs, in one transaction.
        unchanged = {"awaits_definition": manifest["awaits_definition"]}
        manifests.update(rt.store, manifest["_id"], {"awaits_definition": None}, **unchanged)


def fold_counters(rt: Runtime) -> None:
    """Fold counters that nobody adds to any more, so that reading a run's counts stays cheap."""
    while ids := counters.idle(rt.store, rt.store.now() - timedelta(seconds=FOLD_IDLE_S)):
        counters.fold(rt.store, ids)


#: What is done, in this order, and how often at most (seconds); 0 is every round.
DUTIES: tuple[tuple[Callable[[Runtime], None], float], ...] = (
    (end_leases, 0),
    (release_due, 0),
    (publish_unpublished, 0),
    (publish_forgotten, FORGOTTEN_EVERY_S),
    (release_definitions, DEFINITIONS_EVERY_S),
    (seeding.sweep, 0),
    (cancelling.sweep, 0),
    (fold_counters, FOLD_EVERY_S),
)
