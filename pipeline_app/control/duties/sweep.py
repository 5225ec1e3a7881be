"""What makes everything go on by itself: the duties of the sweep, which one worker at a time leads (`leader.py`).

What is let go at a pace, in small steps many times a second, is in `pacing.py`.
"""

from __future__ import annotations

import logging
import random
import time
from collections import defaultdict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime, timedelta

from pipeline_app.control.changes import cancelling
from pipeline_app.control.changes.release import enqueue_parked
from pipeline_app.control.contained import contained
from pipeline_app.control.duties.leader import Duty, Leader
from pipeline_app.control.seed import seeding
from pipeline_app.domain.evidence import worker_lost
from pipeline_app.domain.outcome import ErrorRecord
from pipeline_app.domain.partition import queue_stage
from pipeline_app.errors import BrokerError, QueueRefusedError
from pipeline_app.flow.enqueue import then_queue
from pipeline_app.flow.forward import publish_and_note, publish_or_leave
from pipeline_app.flow.give_back import give_back
from pipeline_app.runtime import Runtime
from pipeline_app.store import counters, jobs, manifests, messages, partitions, workers
from pipeline_app.store.client import Document
from pipeline_app.transport.depth import depths

logger = logging.getLogger(__name__)

#: Depths are asked of the broker this often, not at every round.
FORGOTTEN_EVERY_S = 5.0
#: Jobs that wait for a worker with their definition are tried this often.
DEFINITIONS_EVERY_S = 5.0
#: Counters that nobody has added to for FOLD_IDLE_S are folded this often.
FOLD_EVERY_S = 30.0
FOLD_IDLE_S = 60.0
#: A leader ends leases only after the store has answered for this long: right after an outage every lease looks ended.
CALM_S = 5.0
#: What may be much is left to the next round after this: between two duties a leader says that it still leads. One that
#: was busy for its whole lease would be at it together with its successor, and that one's.
SPELL_S = 3.0
#: Messages of dead workers that are given back at the same time.
HANDS = 8
PAGE = 5000
#: Jobs in one transaction, each of which may need a message of its own.
JOBS_PAGE = 1000


def end_leases(rt: Runtime) -> None:
    """Close the records of workers whose lease has ended, and give back what workers without a lease have claimed."""
    for row in workers.expired(rt.store):
        # First, so that whoever comes after one that was killed here does it again.
        rt.store.end_transactions(row.get("process", ""))
        if workers.end_stale(rt.store, row["_id"]):
            logger.warning("lease ended: worker=%s", row["_id"])
    claimed = messages.claimed(rt.store)
    if not claimed:
        return
    # In this order: a worker that registers between the two questions has no claim among those read before.
    alive = {row["_id"] for row in workers.alive(rt.store)}
    gone = workers.by_ids(rt.store, {message["worker"] for message in claimed} - alive)
    left = [message for message in claimed if message["worker"] not in alive]
    # In no order: what cannot be given back keeps up nothing else, and two who lead at once seldom meet.
    random.shuffle(left)
    until = time.monotonic() + SPELL_S

    def take_back() -> None:
        while time.monotonic() < until:
            try:
                message = left.pop()
            except IndexError:
                return
            lost = _lost_with_worker(message["worker"], gone.get(message["worker"], {}))
            logger.warning("taking back: message=%s worker=%s", message["_id"], message["worker"])
            with contained("taking back", message["_id"]):
                publish_or_leave(rt, give_back(rt, message, lost=lost))

    # Each is a dozen questions that are waited for. A machine with many workers may have died, and its leader with it.
    with ThreadPoolExecutor(HANDS, thread_name_prefix="pipeline-take-back") as pool:
        for hand in [pool.submit(take_back) for _ in range(min(HANDS, len(left)))]:
            hand.result()


def _lost_with_worker(worker: str, record: Document) -> ErrorRecord:
    return worker_lost(
        "its worker's lease ended: it died, or was cut off",
        pid=record.get("pid"),
        worker=worker,
        host=record.get("host"),
        # Of the worker with all its children, as it was at its last sign of life.
        worker_rss_bytes=record.get("rss_bytes"),
        alone=False,
    )


def release_due(rt: Runtime) -> None:
    """Enqueue jobs whose delay or retry time has come."""
    until = time.monotonic() + SPELL_S
    while time.monotonic() < until:
        hidden = seeding.hidden_batches(rt)
        rows = jobs.due(rt.store, rt.store.now(), JOBS_PAGE, hidden)
        # What cannot be moved is looked at in the next round, not over and over in this one.
        if not enqueue_parked(rt, rows, "due") or len(rows) < JOBS_PAGE:
            return


def publish_unpublished(rt: Runtime) -> None:
    """Publish what a process recorded but could not publish. Raises BrokerError if the broker is still away.

    A queue that the broker refuses, or does not confirm for, keeps no other from its turn.
    """
    groups: dict[str, list[Document]] = defaultdict(list)
    for row in messages.unpublished(rt.store, _queues(rt), PAGE):
        groups[row["queue"]].append(row)
    failed: BrokerError | None = None
    # In any order: what ends a round must not end every round before the same queues.
    for queue in random.sample(sorted(groups), len(groups)):
        try:
            publish_and_note(rt, groups[queue])
        except BrokerError as exc:
            logger.warning("not published: queue=%s messages=%d: %s", queue, len(groups[queue]), exc)
            if not isinstance(exc, QueueRefusedError):
                if failed is not None:
                    raise
                failed = exc
        else:
            logger.warning("published what was left unpublished: queue=%s messages=%d", queue, len(groups[queue]))
    if failed is not None:
        raise failed


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
        # Those that could not be moved are looked for again: the flag is all that leads to them.
        if rows or len(stages) < len(manifest["definition"]["stages"]):
            continue
        # Only if nobody has come to wait since: the flag was written with the jobs, in one transaction.
        unchanged = {"awaits_definition": manifest["awaits_definition"]}
        manifests.update(rt.store, manifest["_id"], {"awaits_definition": None}, **unchanged)


def fold_counters(rt: Runtime) -> None:
    """Fold counters that nobody adds to any more, so that reading a run's counts stays cheap."""
    while ids := counters.idle(rt.store, rt.store.now() - timedelta(seconds=FOLD_IDLE_S)):
        counters.fold(rt.store, ids)


#: What is done, in this order.
DUTIES = (
    Duty(do=end_leases, calm_s=CALM_S),
    Duty(do=release_due),
    Duty(do=publish_unpublished),
    Duty(do=publish_forgotten, every_s=FORGOTTEN_EVERY_S),
    Duty(do=release_definitions, every_s=DEFINITIONS_EVERY_S),
    Duty(do=seeding.sweep),
    Duty(do=cancelling.sweep),
    Duty(do=cancelling.stop_handlers),
    Duty(do=fold_counters, every_s=FOLD_EVERY_S),
)
EVERY_S = 1.0


def sweep(runtime: Callable[[], Runtime]) -> Leader:
    """A worker's part in the sweep."""
    return Leader(runtime, "sweep", DUTIES, EVERY_S)
