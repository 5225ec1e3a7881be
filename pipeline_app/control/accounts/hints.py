"""Whether RabbitMQ has a hint for every open message, and bringing back what is missing. Asked by `verify.py`.

Hints can only be counted: one that is there twice hides one that is gone. The sweep finds that one, once its queue is
empty.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from datetime import timedelta

from pipeline_app.domain.plan import RunPlan
from pipeline_app.errors import BrokerError
from pipeline_app.flow.enqueue import then_queue
from pipeline_app.flow.forward import publish, task_name
from pipeline_app.runtime import Runtime
from pipeline_app.store import accounts, messages, partitions, workers
from pipeline_app.store.client import Document
from pipeline_app.transport.depth import depths

#: A message that was to be published this long ago has nobody who does it.
LATE_S = 30.0
#: A broker under load may answer wrongly once: what seems to be missing is looked at again after this long, so often.
LOOK_AGAIN_S = 0.5
LOOKS = 3


@dataclass(kw_only=True)
class Hints:
    """How hints and open messages compare, by queue."""

    #: Nothing consumed meanwhile: what is missing is really missing.
    exact: bool = False
    #: Open messages of the run that nobody published.
    unpublished: dict[str, int] = field(default_factory=dict)
    #: (hints that are ready, open messages of all runs), where hints are missing.
    gone: dict[str, tuple[int, int]] = field(default_factory=dict)


def compare(rt: Runtime, plan: RunPlan) -> Hints:
    """Compare the queues of a run's pipeline; a broker that is away makes the answer inexact.

    Raises StoreError.
    """
    found = Hints()
    queues = stage_of_queue(rt, plan)
    late = rt.store.now() - timedelta(seconds=LATE_S)
    found.unpublished = accounts.unpublished(rt.store, plan.run, [*queues, then_queue(plan.pipeline)], late)
    try:
        found.gone = _missing(rt, list(queues))
        found.exact = not _is_consumed(rt, plan, queues)
        for _ in range(LOOKS - 1):
            if not (found.exact and found.gone):
                break
            time.sleep(LOOK_AGAIN_S)
            again = _missing(rt, list(found.gone))
            found.gone = {queue: again[queue] for queue in found.gone if queue in again}
    except (BrokerError, _ConsumedError):
        found.exact = False
    if not found.exact:
        found.gone = {}
    return found


def stage_of_queue(rt: Runtime, plan: RunPlan) -> dict[str, str]:
    """Every queue of a run's pipeline, and its stage."""
    names = {stage.name for stage in plan.stages}
    rows = partitions.of_pipelines(rt.store, [plan.pipeline])
    return {row["_id"]: row["stage"] for row in rows if row["stage"] in names}


class _ConsumedError(Exception):
    """Something takes hints out of a queue: nothing can be compared."""


def _is_consumed(rt: Runtime, plan: RunPlan, queues: dict[str, str]) -> bool:
    """Whether a worker may have hints reserved: those are in no queue, and it may have stopped consuming for now."""
    mine = {*queues, *(task_name(plan.pipeline, stage.name) for stage in plan.stages)}
    return any(mine.intersection((*row["queues"], *row.get("stages", ()))) for row in workers.alive(rt.store))


def _missing(rt: Runtime, queues: Sequence[str]) -> dict[str, tuple[int, int]]:
    # In this order: what was published before the broker is asked is there, or was claimed before it is counted.
    before = rt.store.now()
    held = depths(rt.settings.amqp_url, queues)
    if any(depth.consumers != 0 for depth in held.values()):
        raise _ConsumedError
    counted = ((queue, accounts.published(rt.store, queue, before)) for queue in queues)
    return {queue: (held[queue].ready, number) for queue, number in counted if number > held[queue].ready}


def publish_late(rt: Runtime, plan: RunPlan) -> int:
    """Publish what nobody published; how many messages. Raises BrokerError, StoreError."""
    queues = [*stage_of_queue(rt, plan), then_queue(plan.pipeline)]
    late = rt.store.now() - timedelta(seconds=LATE_S)
    return _publish(rt, accounts.unpublished_pages(rt.store, plan.run, queues, late))


def publish_again(rt: Runtime, queue: str) -> int:
    """Publish again what is open in a queue: which hints are gone cannot be known, and doubled ones are dropped.

    Raises BrokerError, StoreError.
    """
    return _publish(rt, accounts.published_pages(rt.store, queue, rt.store.now()))


def _publish(rt: Runtime, pages: Iterator[list[Document]]) -> int:
    done = 0
    for page in pages:
        rows = [row for row in page if rt.memory.plan(row["run"]) is not None]
        publish(rt, rows)
        messages.note_published(rt.store, [row["_id"] for row in rows if row["stage"] != messages.THEN])
        done += len(rows)
    return done
