"""How many jobs stand in a place of a run, by state: what a pause there would stop. The command line asks."""

from __future__ import annotations

from pipeline_app.control.changes.selecting import places
from pipeline_app.control.sight.ledger import find_plan
from pipeline_app.control.sight.status import status
from pipeline_app.domain.selection import Selection
from pipeline_app.domain.states import AT_REST, JobState
from pipeline_app.errors import NotFoundError
from pipeline_app.runtime import Runtime
from pipeline_app.store import partitions


def standing(rt: Runtime, run: str, *, stage: str | None = None, partition: str | None = None) -> dict[str, int]:
    """State -> jobs that are not at rest, in a run, a stage or a partition.

    A run and a stage are read from counters; the jobs of a partition have none and are counted.
    Raises NotFoundError (run, stage or partition), StoreError.
    """
    plan = find_plan(rt, run, stage)
    if partition is None:
        now = status(rt, plan.run, queues=False)
        row = next((row for row in now.stages if row.stage == stage), None)
        states = now.states if row is None else row.states
        return {state: number for state, number in states.items() if state not in AT_REST}
    if partition not in {row["partition"] for row in partitions.of_pipelines(rt.store, [plan.pipeline])}:
        raise NotFoundError(
            f"pipeline {plan.pipeline} has no partition {partition!r}",
            hint=f"pipeline-app run status {plan.run} names them",
        )
    counts = dict.fromkeys((str(state) for state in JobState if state not in AT_REST), 0)
    for (_, state, _), number in places(rt, plan, Selection(stage=stage, partition=partition)).items():
        counts[state] += number
    return counts
