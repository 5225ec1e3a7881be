"""`run_counters`: what every worker process added to the counts of a run, summed on reading.

One document for each run, stage, partition and process: a shared one would make every transaction wait for every
other. Those of processes that are gone are folded into one by the sweep, so that reading stays cheap.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime

from pymongo import DeleteMany, UpdateOne

from pipeline_app.domain.states import AT_REST, JobState
from pipeline_app.store.client import Document, Session, Store, translated

#: Name of the process into whose document those of ended ones are folded.
FOLDED = "-"


def totals(store: Store, run: str, session: Session | None = None) -> dict[str, dict[str, int]]:
    """Stage -> {"completed": n, "states.pending": n, ...}; "seeded" stands under the stage of the seed."""
    sums: dict[str, dict[str, int]] = {}
    with translated(store):
        for row in store.db.run_counters.find({"run": run}, session=session):
            stage = sums.setdefault(row["stage"], {})
            for key, number in _flat(row).items():
                stage[key] = stage.get(key, 0) + number
    return sums


def unfinished(store: Store, run: str) -> int:
    """Jobs of a run that are not at rest."""
    states = [state for state in JobState if state not in AT_REST]
    sums = {state: {"$sum": f"$states.{state}"} for state in states}
    steps: list[Document] = [{"$match": {"run": run}}, {"$group": {"_id": None, **sums}}]
    # At one instant: jobs on their way from one counter to another would be in neither, or in both.
    with store.snapshot() as session:
        rows = list(store.db.run_counters.aggregate(steps, session=session))
    return sum(row[state] for row in rows for state in states)


def of_operation(store: Store, run: str, operation: str) -> dict[str, int]:
    """What became of the jobs of a replay: `{"failed": attempts, "terminal": jobs}`."""
    sums = {"failed": 0, "terminal": 0}
    query = {"run": run, f"operations.{operation}": {"$exists": True}}
    # At one instant: what is being folded would be counted twice or not at all, and halt a replay for nothing.
    with store.snapshot() as session:
        for row in store.db.run_counters.find(query, session=session):
            for key, number in row["operations"][operation].items():
                sums[key] += number
    return sums


def _flat(row: Document) -> dict[str, int]:
    flat = {f"states.{state}": number for state, number in row.get("states", {}).items()}
    for operation, numbers in row.get("operations", {}).items():
        flat.update({f"operations.{operation}.{key}": number for key, number in numbers.items()})
    for key in ("completed", "seeded"):
        if key in row:
            flat[key] = row[key]
    return flat


def idle(store: Store, before: datetime, limit: int = 500) -> list[str]:
    """`_id`s of counters that nobody has added to since `before`; those of an open seed batch are left alone."""
    with translated(store):
        rows = store.db.run_counters.find({"at": {"$lt": before}}, {"_id": 1}).limit(limit)
        return [row["_id"] for row in rows]


def release(store: Store, process: str) -> None:
    """The counters of a seed batch may be folded from now on: it is closed and will not be taken back."""
    with translated(store):
        store.db.run_counters.update_many({"worker": process}, {"$set": {"at": store.now()}})


def fold(store: Store, ids: Sequence[str]) -> None:
    """Add these counters to the folded ones and remove them, all or nothing.

    Harmless for a process that lives: its next transaction begins a new document.
    """

    def work(session: Session) -> None:
        rows = list(store.db.run_counters.find({"_id": {"$in": list(ids)}}, session=session))
        sums: dict[tuple[str, str, str], dict[str, int]] = {}
        for row in rows:
            place = sums.setdefault((row["run"], row["stage"], row["partition"]), {})
            for key, number in _flat(row).items():
                place[key] = place.get(key, 0) + number
        updates: list[UpdateOne | DeleteMany] = [
            UpdateOne(
                {"_id": f"{run}|{stage}|{partition}|{FOLDED}"},
                {
                    "$inc": deltas,
                    "$setOnInsert": {"run": run, "stage": stage, "partition": partition, "worker": FOLDED},
                },
                upsert=True,
            )
            for (run, stage, partition), deltas in sums.items()
            if deltas
        ]
        updates.append(DeleteMany({"_id": {"$in": [row["_id"] for row in rows]}}))
        store.db.run_counters.bulk_write(updates, session=session)

    store.transaction(work)


def delete_process(store: Store, name: str) -> None:
    """Remove the counters of a batch that is taken back."""
    with translated(store):
        store.db.run_counters.delete_many({"worker": name})
