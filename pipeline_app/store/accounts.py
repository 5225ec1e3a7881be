"""What accounting reads of a run, all of it as it was at one instant, and the corrections that a repair adds.

Every question goes through the collections in the order of their `_id`s, in pages: memory does not grow with the run.
Who calls: `control/accounts/verify.py` and what it is made of.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime

from pymongo import UpdateOne

from pipeline_app.domain.job import job_key
from pipeline_app.domain.states import MessageState
from pipeline_app.store.client import Document, Session, Store, translated

#: Name of the process in whose counters corrections stand. They have no time, so they are never folded.
REPAIR = "repair"
#: They belong to no partition: counts are compared by stage.
NO_PARTITION = "-"

PAGE = 2000
#: Attempts that are grouped in one question.
LEDGER_PAGE = 20_000

_JOB_FIELDS = dict.fromkeys(
    (
        "run",
        "job",
        "batch",
        "stage",
        "partition",
        "state",
        "message",
        "input",
        "generation",
        "due_at",
        "reason",
        "waits_for",
        "order_key",
        "queues_for",
        "has_turn",
    ),
    1,
)


@dataclass(frozen=True, kw_only=True)
class RunFlags:
    """What is going on with a run as a whole."""

    cancelled: bool
    #: It was cancelled, and the sweep still moves its jobs.
    cancelling: bool
    #: The sweep looks for jobs that wait for a worker with the run's definition.
    awaits_definition: bool
    #: How often its counts were corrected.
    corrections: int
    #: Seed batches that are being taken back: part of them is gone, the rest goes. They count as gone.
    leaving: frozenset[str]
    #: Whole seed batches that are not closed: nothing of them may start.
    hidden: frozenset[str]
    #: Seed batches that are being closed: part of them may start.
    closing: frozenset[str]


def flags(store: Store, run: str, session: Session | None = None) -> RunFlags:
    """The flags of a run, which must be there."""
    with translated(store):
        manifest = store.db.run_manifests.find_one({"_id": run}, session=session) or {}
        query = {"run": run, "state": {"$in": ["open", "interrupted", "removing", "closing"]}}
        batches = list(store.db.seed_batches.find(query, session=session))
    cancelled = manifest.get("cancelled_at") is not None
    return RunFlags(
        cancelled=cancelled,
        cancelling=cancelled and not manifest["cancel_done"],
        awaits_definition=manifest.get("awaits_definition") is not None,
        corrections=manifest.get("corrections", 0),
        leaving=frozenset(row["_id"] for row in batches if row["state"] == "removing"),
        hidden=frozenset(row["_id"] for row in batches if row["whole"] and row["state"] != "closing"),
        closing=frozenset(row["_id"] for row in batches if row["state"] == "closing"),
    )


def job_pages(
    store: Store, run: str, *, leaving: frozenset[str] = frozenset(), session: Session | None = None
) -> Iterator[list[Document]]:
    """All jobs of a run, without payloads and tags; not those of batches that are leaving."""
    last = f"{run}/"
    while True:
        with translated(store):
            found = store.db.job_states.find({"_id": {"$gt": last, "$lt": f"{run}0"}}, _JOB_FIELDS, session=session)
            rows = list(found.sort("_id", 1).limit(PAGE))
        yield [row for row in rows if row["batch"] not in leaving]
        if len(rows) < PAGE:
            return
        last = rows[-1]["_id"]


def jobs_again(store: Store, keys: Sequence[str]) -> list[Document]:
    """The same of these jobs, as they are now."""
    with translated(store):
        return list(store.db.job_states.find({"_id": {"$in": list(keys)}}, _JOB_FIELDS))


def counted(store: Store, run: str, leaving: frozenset[str], session: Session) -> dict[str, dict[str, int]]:
    """Stage -> what the counters say: `completed`, `seeded`, and `states.` with each state."""
    sums: dict[str, dict[str, int]] = {}
    names = [f"seed:{batch}" for batch in leaving]
    with translated(store):
        for row in store.db.run_counters.find({"run": run, "worker": {"$nin": names}}, session=session):
            stage = sums.setdefault(row["stage"], {})
            numbers = {f"states.{state}": number for state, number in row.get("states", {}).items()}
            numbers |= {key: row[key] for key in ("completed", "seeded") if key in row}
            for key, number in numbers.items():
                stage[key] = stage.get(key, 0) + number
    return sums


def logged(store: Store, run: str, leaving: frozenset[str], session: Session) -> dict[str, dict[str, int]]:
    """Stage -> `{"advanced": n, "seeded": n}` jobs, as the event log says."""
    is_seeding = {"$and": [{"$eq": ["$event", "seeded"]}, {"$not": {"$in": ["$batch", list(leaving)]}}]}
    steps: list[Document] = [
        {"$match": {"run": run, "event": {"$in": ["seeded", "recorded", "repaired"]}}},
        {
            "$group": {
                "_id": "$stage",
                "advanced": {"$sum": "$advanced"},
                "seeded": {"$sum": {"$cond": [is_seeding, {"$size": "$jobs"}, "$seeded"]}},
            }
        },
    ]
    with translated(store):
        rows = store.db.pipeline_events.aggregate(steps, session=session)
        return {row["_id"]: {"advanced": row["advanced"], "seeded": row["seeded"]} for row in rows}


def seeded_pages(store: Store, run: str, leaving: frozenset[str], session: Session) -> Iterator[list[str]]:
    """Ids of all jobs that were ever seeded, as the event log says."""
    query = {"run": run, "event": "seeded", "batch": {"$nin": list(leaving)}}
    with translated(store):
        for row in store.db.pipeline_events.find(query, {"jobs": 1}, session=session).sort("_id", 1):
            yield row["jobs"]


def absent(store: Store, run: str, job_ids: Sequence[str], session: Session) -> list[str]:
    """Those of `job_ids` that the run does not have."""
    keys = [job_key(run, job_id) for job_id in job_ids]
    with translated(store):
        found = {row["_id"] for row in store.db.job_states.find({"_id": {"$in": keys}}, {"_id": 1}, session=session)}
    return [job_id for job_id, key in zip(job_ids, keys, strict=True) if key not in found]


@dataclass(frozen=True, kw_only=True)
class LedgerPage:
    """A part of the ledger: all attempts of some jobs in some stages."""

    #: Stage -> attempts that ended ok.
    ok: dict[str, int]
    #: `{job, stage, generation, n}` where more than one ended ok.
    twice: list[Document]
    #: Attempts in this part, roughly.
    size: int


def ledger(store: Store, run: str, session: Session) -> Iterator[LedgerPage]:
    """The ledger, in parts: no attempts of one job in one stage are in two of them."""
    ledger_of_run, begin, end = store.db.job_attempts, f"{run}/", f"{run}0"
    grouping: list[Document] = [
        {"$group": {"_id": {"job": "$job", "stage": "$stage", "generation": "$generation"}, "n": {"$sum": 1}}},
        {
            "$group": {
                "_id": "$_id.stage",
                "n": {"$sum": "$n"},
                "twice": {"$push": {"$cond": [{"$gt": ["$n", 1]}, {"of": "$_id", "n": "$n"}, "$$REMOVE"]}},
            }
        },
    ]
    while begin < end:
        with translated(store):
            rest = ledger_of_run.find({"_id": {"$gte": begin, "$lt": end}}, {"job": 1, "stage": 1}, session=session)
            edge = next(iter(rest.sort("_id", 1).skip(LEDGER_PAGE).limit(1)), None)
            # "0" is the character after "/": behind the last attempt of that job in that stage.
            upper = f"{job_key(run, edge['job'])}/{edge['stage']}0" if edge else end
            match = {"$match": {"_id": {"$gte": begin, "$lt": upper}, "outcome": "ok"}}
            rows = list(ledger_of_run.aggregate([match, *grouping], session=session))
        yield LedgerPage(
            ok={row["_id"]: row["n"] for row in rows},
            twice=[{**double["of"], "n": double["n"]} for row in rows for double in row["twice"]],
            size=LEDGER_PAGE if edge else sum(row["n"] for row in rows),
        )
        begin = upper


# Messages


def unpublished(store: Store, run: str, queues: Sequence[str], before: datetime) -> dict[str, int]:
    """Queue -> open messages of a run that should have been published before that."""
    with translated(store):
        rows = store.db.messages.aggregate(
            [{"$match": _unpublished(run, queues, before)}, {"$group": {"_id": "$queue", "n": {"$sum": 1}}}]
        )
        return {row["_id"]: row["n"] for row in rows}


def unpublished_pages(store: Store, run: str, queues: Sequence[str], before: datetime) -> Iterator[list[Document]]:
    """The same, as messages."""
    return _pages(store, _unpublished(run, queues, before))


def published(store: Store, queue: str, before: datetime) -> int:
    """How many messages of a queue, of whatever run, are open and were published before that."""
    with translated(store):
        return store.db.messages.count_documents(_published(queue, before))


def published_pages(store: Store, queue: str, before: datetime) -> Iterator[list[Document]]:
    """The same, as messages."""
    return _pages(store, _published(queue, before))


def _unpublished(run: str, queues: Sequence[str], before: datetime) -> Document:
    query: Document = {"state": MessageState.OPEN, "queue": {"$in": list(queues)}, "published_at": None}
    return {**query, "run": run, "check_at": {"$lt": before}}


def _published(queue: str, before: datetime) -> Document:
    return {"state": MessageState.OPEN, "queue": queue, "published_at": {"$type": "date", "$lt": before}}


def _pages(store: Store, query: Document) -> Iterator[list[Document]]:
    last = ""
    while True:
        with translated(store):
            rows = list(store.db.messages.find({**query, "_id": {"$gt": last}}).sort("_id", 1).limit(PAGE))
        if rows:
            yield rows
        if len(rows) < PAGE:
            return
        last = rows[-1]["_id"]


# Corrections


def correct(
    store: Store,
    run: str,
    *,
    seen: int,
    counts: Mapping[str, Mapping[str, int]],
    events: Sequence[Document],
) -> bool:
    """Add `counts` (stage -> what the counters lack) and `events`, all or nothing; False if somebody else did.

    Differences that were found at one instant are true for ever, however many others count meanwhile, but only once:
    `seen` is the number of corrections at that instant, and nobody may have made another since.
    """
    updates = [
        UpdateOne(
            {"_id": f"{run}|{stage}|{NO_PARTITION}|{REPAIR}"},
            {
                "$inc": dict(differences),
                "$setOnInsert": {"run": run, "stage": stage, "partition": NO_PARTITION, "worker": REPAIR},
            },
            upsert=True,
        )
        for stage, differences in counts.items()
        if differences
    ]

    def work(session: Session) -> bool:
        guard = {"_id": run, "corrections": seen or None}
        done = store.db.run_manifests.update_one(guard, {"$inc": {"corrections": 1}}, session=session)
        if not done.matched_count:
            return False
        if updates:
            store.db.run_counters.bulk_write(updates, session=session)
        if events:
            store.db.pipeline_events.insert_many(events, session=session)
        return True

    return store.transaction(work)
