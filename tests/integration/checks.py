"""What tests of `check` share."""

from __future__ import annotations

from pipeline_app.control.check.finding import Finding, Look, Subject, Trouble
from pipeline_app.runtime import Runtime
from pipeline_app.store import partitions
from tests.integration.helpers import begin, double, lines, pipeline


def troubles(rt: Runtime, look: Look, *, consumer_timeout: float | None = None) -> list[Trouble]:
    return list(look(Subject(rt, lambda: consumer_timeout)))


def by_name(found: list[Finding], name: str) -> Finding:
    (one,) = [row for row in found if row.check == name]
    return one


def with_queue(rt: Runtime) -> str:
    """A run of a job that waits in a queue that nothing consumes; the queue's name."""
    chosen = pipeline(double)
    begin(rt, chosen, lines(1))
    (name,) = partitions.queues(rt.store)
    return name
