"""What a run is doing now. The cost does not grow with the run: counts are read from counters, never counted."""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

from pipeline_app.control.serving import serving
from pipeline_app.control.sight import keeping
from pipeline_app.domain.partition import queue_name, queue_stage
from pipeline_app.domain.plan import RunPlan
from pipeline_app.domain.states import AT_REST, JobState
from pipeline_app.domain.target import Target
from pipeline_app.errors import BrokerError
from pipeline_app.runtime import Runtime
from pipeline_app.store import counters, holds, manifests, messages, partitions, workers
from pipeline_app.store.client import Document
from pipeline_app.transport.depth import depths

#: Holds and pauses that are named one by one.
CLOSED_SHOWN = 5


@dataclass(frozen=True, kw_only=True)
class PartitionStatus:
    """A stage's queue for one partition. `ready` and `consumers` are the broker's; None if it does not tell."""

    partition: str
    queue: str
    ready: int | None
    consumers: int | None


@dataclass(frozen=True, kw_only=True)
class StageStatus:
    """A stage of a run."""

    stage: str
    #: Jobs that went through it.
    completed: int
    #: State -> jobs that stand in this stage now.
    states: dict[str, int]
    workers: int
    concurrency: int
    partitions: list[PartitionStatus] = field(default_factory=list)


@dataclass(frozen=True, kw_only=True)
class Status:
    """A run."""

    run: str
    pipeline: str
    #: seeding, active, paused, cancelled or complete.
    state: str
    seeded: int
    #: State -> jobs.
    states: dict[str, int]
    stages: list[StageStatus]
    warnings: list[str]
    as_of: datetime
    #: Seed batches whose seeder died.
    interrupted: list[str]
    #: Seed batches that are open.
    seeding: list[str]

    @property
    def at_rest(self) -> int:
        """Jobs that nothing happens to any more."""
        return sum(self.states[state] for state in AT_REST)

    def is_past(self, stage: str | None) -> bool:
        """Whether every job of every closed batch is at rest, or past `stage`."""
        if self.seeding or self.interrupted:
            return False
        names = [row.stage for row in self.stages]
        until = len(names) if stage is None else names.index(stage) + 1
        return all(
            number == 0
            for row in self.stages[:until]
            for state, number in row.states.items()
            if state not in AT_REST
        )

    def as_dict(self) -> dict[str, Any]:
        """The shape that `run status --json` prints."""
        return {
            "run": self.run,
            "pipeline": self.pipeline,
            "state": self.state,
            "seeded": self.seeded,
            "states": self.states,
            "stages": [
                {
                    "stage": row.stage,
                    "completed": row.completed,
                    "states": row.states,
                    "workers": row.workers,
                    "concurrency": row.concurrency,
                    "partitions": [vars(part) for part in row.partitions],
                }
                for row in self.stages
            ],
            "warnings": self.warnings,
            "as_of": self.as_of,
        }


def status(rt: Runtime, run: str, *, queues: bool = True) -> Status:
    """The status of a run (`last` is the newest); without `queues` the broker is not asked.

    Raises NotFoundError, StoreError. A broker that is away is a warning.
    """
    manifest = manifests.get(rt.store, run)
    plan = RunPlan.of(manifest)
    with rt.store.snapshot() as session:
        # At one instant: read in two halves, jobs on their way from one counter to another would be in neither.
        totals = counters.totals(rt.store, plan.run, session)
    running = _running(rt, plan.run)
    alive = workers.alive(rt.store)
    warnings: list[str] = []
    found = _partitions(rt, plan, warnings) if queues else {}
    stages = [
        StageStatus(
            stage=stage.name,
            completed=totals.get(stage.name, {}).get("completed", 0),
            states=_states(totals.get(stage.name, {}), running.get(stage.name, 0)),
            **_workforce(alive, f"{plan.pipeline}.{stage.name}"),
            partitions=found.get(stage.name, []),
        )
        for stage in plan.stages
    ]
    states = {state: sum(row.states[state] for row in stages) for state in map(str, JobState)}
    closed = holds.concerning(rt.store, plan.run, plan.pipeline)
    batches = manifests.batches(rt.store, plan.run, "open", "closing", "removing", "interrupted")
    interrupted = [row["_id"] for row in batches if row["state"] == "interrupted"]
    seeding = [row["_id"] for row in batches if row["state"] != "interrupted"]
    seeded = sum(stage.get("seeded", 0) for stage in totals.values())
    return Status(
        run=plan.run,
        pipeline=plan.pipeline,
        state=_state(
            manifest, states, seeded, seeding=bool(seeding), interrupted=bool(interrupted), paused=_is_paused(closed)
        ),
        seeded=seeded,
        states=states,
        stages=stages,
        warnings=(
            warnings
            + _warnings(rt, manifest, stages, interrupted, queues=queues)
            + _closed(closed, states)
            + _bounded(plan, batches)
        ),
        as_of=rt.store.now(),
        interrupted=interrupted,
        seeding=seeding,
    )


def _running(rt: Runtime, run: str) -> dict[str, int]:
    """Stage -> jobs in messages that workers hold: as many documents as the cluster has slots."""
    numbers: dict[str, int] = {}
    for row in messages.claimed(rt.store, run=run):
        numbers[row["stage"]] = numbers.get(row["stage"], 0) + len(row["jobs"])
    return numbers


def _states(totals: dict[str, int], running: int) -> dict[str, int]:
    states = {state: totals.get(f"states.{state}", 0) for state in map(str, JobState)}
    # The two questions are not asked at the same instant: never show a negative count for that.
    states[JobState.RUNNING] = max(0, min(running, states[JobState.PENDING]))
    states[JobState.PENDING] -= states[JobState.RUNNING]
    return states


def _workforce(alive: list[Document], stage: str) -> dict[str, int]:
    mine = [row for row in alive if stage in {*row.get("stages", ()), *map(queue_stage, row["queues"])}]
    return {"workers": len(mine), "concurrency": sum(row["concurrency"] for row in mine)}


def _partitions(rt: Runtime, plan: RunPlan, warnings: list[str]) -> dict[str, list[PartitionStatus]]:
    names = [stage.name for stage in plan.stages]
    rows = [row for row in partitions.of_pipelines(rt.store, [plan.pipeline]) if row["stage"] in names]
    queues = [row["_id"] for row in rows]
    try:
        found = depths(rt.settings.amqp_url, queues)
    except BrokerError as exc:
        warnings.append(exc.message)
        found = {}
    stages: dict[str, list[PartitionStatus]] = {}
    for row in rows:
        depth = found.get(row["_id"])
        stages.setdefault(row["stage"], []).append(
            PartitionStatus(
                partition=row["partition"],
                queue=queue_name(plan.pipeline, row["stage"], row["partition"]),
                ready=depth.ready if depth else None,
                consumers=depth.consumers if depth else None,
            )
        )
    return stages


def _state(
    manifest: Document, states: dict[str, int], seeded: int, *, seeding: bool, interrupted: bool, paused: bool
) -> str:
    if manifest["cancelled_at"] is not None:
        return "cancelled"
    if paused:
        return "paused"
    if seeding:
        return "seeding"
    unfinished = sum(number for state, number in states.items() if state not in AT_REST)
    return "complete" if seeded and not unfinished and not interrupted else "active"


def _is_paused(closed: list[Document]) -> bool:
    """Whether the whole run is."""
    return any(row["kind"] == "pause" and row["stage"] is None and row["partition"] is None for row in closed)


def _closed(closed: list[Document], states: dict[str, int]) -> list[str]:
    """What keeps jobs of this run, or might."""
    found = []
    for row in closed:
        because = f" ({row['reason']})" if row["reason"] else ""
        if row["kind"] == "pause":
            found.append(f"{Target.of(row)} is paused{because}: pipeline-app resume {keeping.paused_place(row)}")
        elif states[JobState.HELD]:
            until = "until it is cleared" if row["until"] is None else f"until {row['until']:%Y-%m-%dT%H:%M:%SZ}"
            found.append(f"{Target.of(row)} is closed {until}{because}: hold {row['_id']}")
    if len(found) > CLOSED_SHOWN:
        found[CLOSED_SHOWN:] = [f"and {len(found) - CLOSED_SHOWN} more: pipeline-app hold list"]
    return found


def _bounded(plan: RunPlan, batches: list[Document]) -> list[str]:
    """Whether a seeder waits for room."""
    waiting = [row["waits_since"] for row in batches if row["state"] == "open" and "waits_since" in row]
    if not waiting:
        return []
    since = f"since {min(waiting):%Y-%m-%dT%H:%M:%SZ}"
    return [f"seeding waits {since}: {plan.bound:,} jobs are unfinished, and that is the run's bound"]


def _warnings(
    rt: Runtime, manifest: Document, stages: list[StageStatus], interrupted: list[str], *, queues: bool
) -> list[str]:
    found: list[str] = []
    for row in stages:
        work = row.states[JobState.PENDING] + row.states[JobState.RUNNING]
        idle = [part.queue for part in row.partitions if part.ready and part.consumers == 0]
        served = serving(rt, idle) if idle and work else {}
        idle = [queue for queue in idle if not served.get(queue)]
        remedy = f"start a worker with -Q {manifest['pipeline']}.{row.stage}"
        if idle and work:
            found.append(f"nothing consumes {', '.join(idle)}: {remedy}")
        elif queues and work and not row.workers:
            found.append(f"no worker runs stage {row.stage}: {remedy}")
    if interrupted:
        found.append(
            f"seed batch {', '.join(interrupted)} was interrupted: seed the same jobs again with --skip-existing"
        )
    if manifest["awaits_definition"] is not None:
        found.append("jobs wait for a worker with this run's definition: the workers have another one")
    parked = partitions.count_parked(rt.store) if queues else 0
    if parked:
        found.append(f"{parked} messages that are not ours were parked in collection parked_messages")
    return found
