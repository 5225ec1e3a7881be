"""Which queues have workers, whatever consumes them at this instant.

A worker of many partitions takes turns, and one whose slots are all busy for long consumes nothing: that the broker has
no consumer of a queue does not mean that nobody works on it. Used by what warns of such queues.
"""

from __future__ import annotations

from collections.abc import Collection

from pipeline_app.domain.partition import queue_stage
from pipeline_app.domain.selector import Selectors
from pipeline_app.runtime import Runtime
from pipeline_app.store import partitions, workers


def serving(rt: Runtime, queues: Collection[str]) -> dict[str, int]:
    """Queue -> workers with a lease that take messages from it, now or in their turn. Raises StoreError."""
    tags = {row["_id"]: row["tags"] for row in partitions.of_pipelines(rt.store, [q.split(".", 1)[0] for q in queues])}
    found = dict.fromkeys(queues, 0)
    for worker in workers.alive(rt.store):
        selectors = Selectors.parse(worker.get("select", ()), worker.get("skip", ()))
        for queue in queues:
            is_of_stage = queue_stage(queue) in worker["stages"] and selectors.admit(tags.get(queue, {}))
            found[queue] += is_of_stage or queue in worker["queues"]
    return found
