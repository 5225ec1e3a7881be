"""Mistakes in who works: workers with other definitions or versions, queues that nobody consumes, parked messages."""

from __future__ import annotations

from collections.abc import Iterator

from pipeline_app.control.check.finding import Severity, Subject, Trouble, some
from pipeline_app.control.serving import serving
from pipeline_app.domain.partition import queue_stage
from pipeline_app.runtime import VERSION
from pipeline_app.store import manifests, partitions
from pipeline_app.transport.depth import depths
from pipeline_app.transport.topology import PARKED_EXCHANGE


def definitions(subject: Subject) -> Iterator[Trouble]:
    """Workers that have another definition of a pipeline than this project, and runs that wait for theirs."""
    for pipeline in subject.rt.pipelines.values():
        mine = [row for row in subject.workers if any(name.startswith(f"{pipeline.name}.") for name in row["stages"])]
        others = [row["worker"] for row in mine if pipeline.hash not in row["definitions"]]
        if others:
            alone = len(others) == len(mine)
            yield Trouble(
                what=f"workers have another definition of {pipeline.name} than this project: {some(others)}",
                hint="restart them with this code; until then they leave jobs of new runs alone",
                severity=Severity.ERROR if alone else Severity.WARNING,
            )
    for manifest in manifests.matching(subject.rt.store, {"awaits_definition": {"$ne": None}}):
        yield Trouble(
            what=f"jobs of run {manifest['_id']} wait for a worker with its definition of {manifest['pipeline']}",
            hint="start a worker with the code that the run was made with",
            severity=Severity.ERROR,
        )


def versions(subject: Subject) -> Iterator[Trouble]:
    """Workers of another version of this package."""
    known = {row["worker"]: row.get("version") or "unknown" for row in subject.workers}
    others = {worker: version for worker, version in known.items() if version != VERSION}
    if others:
        yield Trouble(
            what=f"this is version {VERSION}, and workers are of {some(set(others.values()))}: {some(others)}",
            hint="update all to one version",
        )


def unconsumed(subject: Subject) -> Iterator[Trouble]:
    """Queues with work that nobody consumes."""
    found = depths(subject.rt.settings.amqp_url, subject.queues)
    idle = {queue: depth.ready for queue, depth in found.items() if depth.ready and depth.consumers == 0}
    # A worker of many partitions takes turns.
    served = serving(subject.rt, list(idle)) if idle else {}
    idle = {queue: ready for queue, ready in idle.items() if not served[queue]}
    if idle:
        yield Trouble(
            what=f"nothing consumes {some(idle)}; messages ready there: {sum(idle.values())}",
            hint=f"start a worker: celery -A pipeline_app worker -Q {','.join(sorted({queue_stage(q) for q in idle}))}",
        )


def parked(subject: Subject) -> Iterator[Trouble]:
    """Messages that were put aside."""
    if count := partitions.count_parked(subject.rt.store):
        yield Trouble(
            what=f"messages that are not ours in the collection parked_messages: {count}",
            hint="look at reason and body there; remove them when you know who sent them",
        )
    queue = PARKED_EXCHANGE.name
    depth = depths(subject.rt.settings.amqp_url, [queue])[queue]
    if depth.ready:
        yield Trouble(
            what=f"messages that no worker can read in RabbitMQ's queue {queue}: {depth.ready}",
            hint=f"look at them on RabbitMQ's management page; celery -A pipeline_app purge -Q {queue} removes them",
        )
