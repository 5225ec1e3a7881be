"""Runs that are broken on purpose, for the tests of accounting: by writing to the database, as no command does."""

from __future__ import annotations

from typing import Any

from pipeline_app import Pipeline, Stage
from pipeline_app.control.accounts.verify import Verification
from pipeline_app.domain.hint import Hint
from pipeline_app.flow.consume import Flow
from pipeline_app.runtime import Runtime
from tests.integration.helpers import (
    as_row,
    attempts,
    begin,
    double,
    job,
    lines,
    pipeline,
    pump,
)
from tests.project import Project


def doubled(project: Project, number: int = 6, **job_fields: Any) -> tuple[Runtime, Pipeline]:
    """A run of two stages, seeded."""
    chosen = pipeline(Stage(double, chunk=2), Stage(as_row, chunk=3))
    rt = project.runtime(chosen)
    begin(rt, chosen, lines(number, **job_fields))
    return rt, chosen


def update(rt: Runtime, job_id: str, *changes: dict[str, Any]) -> None:
    """Change a job's document, behind everybody's back."""
    for change in changes:
        done = rt.store.db.job_states.update_one({"_id": f"r/{job_id}"}, change)
        assert done.matched_count == 1


def named(found: Verification) -> set[tuple[str, str | None]]:
    """Kind and job of each problem."""
    return {(problem.kind, problem.job_id) for problem in found.problems}


def events_of(rt: Runtime, **match: Any) -> list[dict[str, Any]]:
    """Events of the run, oldest first."""
    return list(rt.store.db.pipeline_events.find({"run": "r", **match}).sort("_id", 1))


def flip(rt: Runtime, job_id: str, state: str, **fields: Any) -> None:
    """Write another state into a job, and count it, as if there were a path that leads there."""
    before = job(rt, job_id)["state"]
    change: dict[str, Any] = {"$set": {"state": state, "message": None, **fields}}
    if "due_at" not in fields:
        change["$unset"] = {"due_at": ""}
    update(rt, job_id, change)
    rt.store.db.run_counters.update_one({}, {"$inc": {f"states.{before}": -1, f"states.{state}": 1}})


def pump_some(rt: Runtime, some: list[Hint]) -> None:
    """Run these hints."""
    flow = Flow(rt, lambda: False)
    for hint in some:
        flow.run(hint)
    flow.notes.flush()


def close_message(rt: Runtime) -> None:
    """Close the message of the first job."""
    message = job(rt, "j0")["message"]
    rt.store.db.messages.update_one({"_id": message}, {"$set": {"state": "closed", "closed_at": rt.store.now()}})


def break_everything(rt: Runtime) -> None:
    """Something of each kind that can be repaired; 40 jobs."""
    pump(rt)
    for number, job_id in enumerate(sorted(row["job"] for row in rt.store.db.job_states.find())):
        if number % 8 == 0:
            rt.store.db.job_outputs.delete_one({"_id": f"r/{job_id}/{job(rt, job_id)['input']}"})
        if number % 8 == 1:
            update(rt, job_id, {"$set": {"message": "nobody's"}})
        if number % 8 == 2:
            update(rt, job_id, {"$set": {"state": "pending"}})
        if number % 8 == 3:
            update(rt, job_id, {"$set": {"state": "retry_waiting"}})
        if number % 8 == 4:
            update(rt, job_id, {"$set": {"state": "held"}})
    for state in ("pending", "retry_waiting", "held"):
        # Their last stage is to be done again.
        for row in list(rt.store.db.job_states.find({"state": state})):
            made = attempts(rt, job=row["job"], stage="double")[0]["_id"].rsplit("/", 1)[1]
            update(rt, row["job"], {"$set": {"input": f"double/{made}"}, "$inc": {"generation": 1}})
    rt.store.db.run_counters.update_one({}, {"$inc": {"completed": 7, "states.cancelled": -2}})
    rt.store.db.pipeline_events.delete_one({"event": "recorded"})
