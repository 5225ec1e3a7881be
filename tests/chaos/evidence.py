"""What the checker goes by: the witness of the handlers, the journal of the faults, and the run's documents.

The store is read directly: nothing of the product takes part in its own trial.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import datetime
from functools import cached_property
from pathlib import Path
from typing import Any

from pymongo import MongoClient

from tests.chaos.driver.load import RUN

Document = dict[str, Any]

#: What a worker may lose its lease by, or its work.
HARM = frozenset({"kill", "kill child", "freeze", "cut", "silence", "delay"})


@dataclass(kw_only=True, slots=True)
class Execution:
    """One execution of a handler, as it saw itself."""

    name: str
    job: str
    stage: str
    #: The number that it was told; one more than the failures.
    attempt: int
    #: The same for every execution of a job in a stage and generation.
    key: str
    worker: str
    pid: int
    parent_pid: int
    #: By the wall's clock and by the one that all processes share.
    started_at: float
    started: float
    #: Executions that its input came from.
    trail: tuple[str, ...]
    ended: float | None = None
    #: `end`, `raise`, or None where its process was gone before.
    how: str | None = None


@dataclass(frozen=True, kw_only=True)
class Fault:
    """Something that was done to the run, or to one of its workers."""

    what: str
    at: float
    #: By the clock that all processes share.
    mono: float
    worker: str | None
    more: Document


@dataclass(kw_only=True)
class Evidence:
    """All of it."""

    executions: dict[str, Execution]
    faults: list[Fault]
    jobs: dict[str, Document]
    attempts: list[Document]
    outputs: dict[str, Document]
    messages: dict[str, Document]
    events: list[Document]
    batches: list[Document]
    parked: list[Document]
    #: What workers acknowledged and published, and how the store had it at that moment.
    broker: list[Document]
    #: Incarnation -> record.
    workers: dict[str, Document]
    #: Lines of the witness that nobody could read.
    unreadable: list[str] = field(default_factory=list)

    @cached_property
    def seeded(self) -> set[str]:
        """Jobs that were added, as their seeder says."""
        return {
            str(number)
            for fault in self.faults
            if fault.what == "seeded"
            for number in range(fault.more["first"], fault.more["last"] + 1)
        }

    @cached_property
    def by_step(self) -> dict[tuple[str, str], list[Execution]]:
        """(job, stage) -> its executions, in the order in which they started."""
        found: dict[tuple[str, str], list[Execution]] = defaultdict(list)
        for execution in sorted(self.executions.values(), key=lambda e: e.started):
            found[execution.job, execution.stage].append(execution)
        return found

    @cached_property
    def attempts_by_step(self) -> dict[tuple[str, str, int], list[Document]]:
        """(job, stage, generation) -> attempts, oldest first."""
        found: dict[tuple[str, str, int], list[Document]] = defaultdict(list)
        for row in sorted(self.attempts, key=lambda row: (row["started_at"], row["_id"])):
            found[row["job"], row["stage"], row["generation"]].append(row)
        return found

    @cached_property
    def faults_of(self) -> dict[str, list[Fault]]:
        """Worker -> the harm that was done to it, in order."""
        found: dict[str, list[Fault]] = defaultdict(list)
        for fault in self.faults:
            if fault.worker is not None and fault.what in HARM:
                found[fault.worker].append(fault)
        return found

    @cached_property
    def doubled(self) -> set[str]:
        """Messages whose hints were published more than once, by us or by the sweep."""
        ours = {message for fault in self.faults for message in fault.more.get("messages", ())}
        return ours | {key for key, row in self.messages.items() if row["publishes"] > 1}

    def worker_of(self, incarnation: str) -> str | None:
        """The worker whose incarnation that was; None if there is no record of it."""
        record = self.workers.get(incarnation)
        return None if record is None else str(record["worker"]).partition("@")[0]


def collect(folder: Path, mongodb_url: str) -> Evidence:
    """Read it all. `folder` is the project's."""
    unreadable: list[str] = []
    executions = _executions(folder / "witness", unreadable)
    faults = _faults(folder / "journal.jsonl")
    with MongoClient[Document](mongodb_url, tz_aware=True) as client:
        db = client.get_default_database()
        mine = {"run": RUN}
        return Evidence(
            executions=executions,
            faults=faults,
            jobs={row["job"]: row for row in db.job_states.find(mine, {"payload": 0})},
            attempts=list(db.job_attempts.find(mine)),
            outputs={row["_id"]: row for row in db.job_outputs.find({"_id": {"$gte": f"{RUN}/", "$lt": f"{RUN}0"}})},
            messages={row["_id"]: row for row in db.messages.find(mine)},
            events=list(db.pipeline_events.find(mine).sort("_id", 1)),
            batches=list(db.seed_batches.find(mine)),
            parked=list(db.parked_messages.find()),
            broker=list(_lines(folder / "broker.jsonl", unreadable)),
            workers={row["_id"]: row for row in db.workers.find()},
            unreadable=unreadable,
        )


def _executions(folder: Path, unreadable: list[str]) -> dict[str, Execution]:
    found: dict[str, Execution] = {}
    for path in sorted(folder.glob("*.jsonl")):
        for what, job, stage, attempt, key, name, worker, pid, parent, at, mono, trail in _lines(path, unreadable):
            if what == "start":
                found[name] = Execution(
                    name=name,
                    job=job,
                    stage=stage,
                    attempt=attempt,
                    key=key,
                    worker=worker,
                    pid=pid,
                    parent_pid=parent,
                    started_at=at,
                    started=mono,
                    trail=tuple(trail),
                )
            else:
                found[name].how, found[name].ended = what, mono
    return found


def _faults(path: Path) -> list[Fault]:
    return [
        Fault(what=row.pop("what"), at=row.pop("at"), mono=row.pop("mono"), worker=row.pop("worker", None), more=row)
        for row in _lines(path, [])
    ]


def _lines(path: Path, unreadable: list[str]) -> Iterator[Any]:
    with path.open() as file:
        for line in file:
            try:
                yield json.loads(line)
            except ValueError:
                unreadable.append(f"{path.name}: {line[:200]}")


def seconds(at: datetime) -> float:
    """A time of the store, as the wall's clock of the witness has it."""
    return at.timestamp()
