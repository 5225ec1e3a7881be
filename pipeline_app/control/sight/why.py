"""Why a job is where it is: what it waits for, in words and as data, and what anybody can do about it.

    reason     a sentence
    waits_for  {"kind": ..., ...} with what the sentence names; null for a job that waits for nothing any more
    hint       what to do; null where doing nothing is right
"""

from __future__ import annotations

import shlex
from datetime import datetime
from typing import Any

from pipeline_app.control.serving import serving
from pipeline_app.control.sight.keeping import Answer, kept
from pipeline_app.control.sight.ledger import find_job, last_errors
from pipeline_app.domain.plan import RunPlan
from pipeline_app.domain.states import JobState, MessageState, WaitReason
from pipeline_app.errors import BrokerError
from pipeline_app.runtime import Runtime
from pipeline_app.store import attempts, manifests, messages, turns, workers
from pipeline_app.store.client import Document
from pipeline_app.transport.depth import Depth, depths

#: Jobs in a queue are counted up to this.
COUNTED = 10_000


def why(rt: Runtime, run: str, job_id: str) -> dict[str, Any]:
    """What a job waits for. Raises NotFoundError, StoreError. A broker that is away is a part of the answer."""
    manifest = manifests.get(rt.store, run)
    plan = RunPlan.of(manifest)
    row, message = _look(rt, plan.run, job_id)
    claimed = message is not None and message["state"] == MessageState.CLAIMED
    state = JobState.RUNNING if row["state"] == JobState.PENDING and claimed else JobState(row["state"])
    reason, waits_for, hint = _answer(rt, manifest, plan, row, message, state)
    return {
        "run": plan.run,
        "job_id": row["job"],
        "state": state,
        "reason": reason,
        "waits_for": waits_for,
        "hint": hint,
    }


def _look(rt: Runtime, run: str, job_id: str) -> tuple[Document, Document | None]:
    """The job and its message, as they were together."""
    while True:
        row = find_job(rt, run, job_id)
        if row["message"] is None:
            return row, None
        message = messages.get(rt.store, row["message"])
        unchanged = message is not None and message["state"] != MessageState.CLOSED
        # A closed message is news only if the job did not move on between the two questions.
        if unchanged or find_job(rt, run, job_id)["message"] == row["message"]:
            return row, message


def _answer(
    rt: Runtime, manifest: Document, plan: RunPlan, row: Document, message: Document | None, state: JobState
) -> Answer:
    if state == JobState.TERMINAL:
        return f"it went through all stages at {_time(row['updated_at'])}", None, None
    if state == JobState.DEAD_LETTERED:
        return _dead(rt, plan, row)
    if state == JobState.CANCELLED:
        return _cancelled(manifest, row), None, None
    hidden = _hidden_batch(rt, plan.run, row["batch"])
    if hidden is not None:
        return _batch(hidden)
    if state == JobState.RUNNING:
        assert message is not None
        return _running(rt, row, message)
    if manifest["cancelled_at"] is not None:
        at = manifest["cancelled_at"]
        return f"its run was cancelled at {_time(at)}; it is moved any moment", {"kind": "cancel", "since": at}, None
    if row.get("waits_for") is not None:
        return kept(rt, row)
    if state == JobState.RETRY_WAITING:
        return _retry(rt, plan, row)
    if state == JobState.WAITING:
        return _waiting(rt, manifest, row)
    if state == JobState.PENDING:
        return _pending(rt, plan, row, message)
    return f"it is {state}", {"kind": str(state)}, None


def _cancelled(manifest: Document, row: Document) -> str:
    since = manifest["cancelled_at"]
    if since is None or row["updated_at"] < since:
        return f"it was cancelled at {_time(row['updated_at'])}, in {row['stage']}"
    return f"its run was cancelled at {_time(since)}"


def _dead(rt: Runtime, plan: RunPlan, row: Document) -> Answer:
    error = last_errors(rt, plan.run, [row])[row["_id"]]
    what = f"it was dead-lettered in {row['stage']} at {_time(row['updated_at'])} ({row['reason']}): {_brief(error)}"
    show = f"pipeline-app failures {plan.run} --job {shlex.quote(row['job'])} shows the whole error"
    return what, None, f"{show}; --error {row['error_group']} instead of --job lists those that died alike"


def _hidden_batch(rt: Runtime, run: str, batch: str) -> Document | None:
    """The job's seed batch if nothing of it may start yet."""
    unfinished = manifests.batches(rt.store, run, "open", "interrupted", "removing")
    return next((found for found in unfinished if found["_id"] == batch and found["whole"]), None)


def _batch(batch: Document) -> Answer:
    waits_for = {"kind": "seed_batch", "batch": batch["_id"], "batch_state": batch["state"]}
    if batch["state"] == "interrupted":
        return (
            f"its seed batch {batch['_id']} was interrupted, and nothing of it starts before it is closed",
            waits_for,
            "seed the same jobs again with --skip-existing: that closes it",
        )
    if batch["state"] == "removing":
        return f"its seed batch {batch['_id']} is being taken back", waits_for, None
    return f"its seed batch {batch['_id']} is not closed yet: the seeder is at work", waits_for, None


def _running(rt: Runtime, row: Document, message: Document) -> Answer:
    since = message["claimed_at"]
    worker = message["worker"]
    alive = {found["_id"]: found["worker"] for found in workers.alive(rt.store)}
    waits_for = {"kind": "handler", "worker": worker, "since": since, "message": message["_id"]}
    others = len(message["jobs"]) - 1
    company = f", in a message with {others} more" if others else ""
    if worker not in alive:
        return (
            f"worker {worker} claimed it at {_time(since)} and has shown no life since its lease ended",
            {**waits_for, "kind": "lease"},
            "the sweep of any worker that runs takes it back within seconds",
        )
    what = f"{row['stage']} runs it on {alive[worker]} ({worker}) since {_time(since)}, {_ago(rt, since)}{company}"
    return what, waits_for, None


def _retry(rt: Runtime, plan: RunPlan, row: Document) -> Answer:
    failed = [found for found in attempts.of_job(rt.store, plan.run, row["job"]) if found["stage"] == row["stage"]]
    error = next((found["error"] for found in reversed(failed) if found.get("error")), None)
    times = "once" if row["failures"] == 1 else f"{row['failures']} times"
    because = f" ({_brief(error)})" if error else ""
    what = f"it failed {times} in {row['stage']}{because}; its next try is due at {_due(rt, row['due_at'])}"
    return (
        what,
        {"kind": "retry", "due_at": row["due_at"], "failures": row["failures"], "error": error},
        _sweeper(rt, row["due_at"]),
    )


def _waiting(rt: Runtime, manifest: Document, row: Document) -> Answer:
    if row["reason"] == WaitReason.DEFINITION:
        return (
            f"no worker that runs has the definition {manifest['hash']} of this run: "
            "the pipeline was changed since the run was made, or is not in celeryconfig.py",
            {"kind": "definition", "hash": manifest["hash"]},
            "start a worker with the code that the run was made with",
        )
    if row["reason"] == WaitReason.ORDER:
        return _queue(rt, row)
    if "due_at" in row:
        what = f"it was seeded with a delay and is due at {_due(rt, row['due_at'])}"
        return what, {"kind": str(row["reason"]), "due_at": row["due_at"]}, _sweeper(rt, row["due_at"])
    return f"it waits: {row.get('reason')}", {"kind": str(row.get("reason"))}, None


def _queue(rt: Runtime, row: Document) -> Answer:
    """Who goes before a job that waits for its turn."""
    turn = turns.by_ids(rt.store, [row["queues_for"]]).get(row["queues_for"]) if "queues_for" in row else None
    holder = None if turn is None else turns.holders(rt.store, [turn["holder"]]).get(turn["holder"])
    waiting = turns.count_before(rt.store, row, COUNTED) if "queues_for" in row else 0
    waits_for: dict[str, Any] = {"kind": "order", "order_key": row["order_key"], "job_id": None, "before": waiting}
    what = f"jobs with the order key {row['order_key']!r} go one at a time"
    number = f"{COUNTED:,} or more" if waiting == COUNTED else f"{waiting:,}"
    queue = f"; {number} wait before it" if waiting else "; it is the next"
    if holder is None or not holder.get("has_turn"):
        hint = None if workers.alive(rt.store) else "a worker has to run for that: celery -A pipeline_app worker"
        return f"{what}, and the turn is given any moment{queue}", waits_for, hint
    waits_for["job_id"] = holder["job"]
    whose = f"it is the turn of job {holder['job']!r}, which is {holder['state']} in {holder['stage']}"
    hint = f"pipeline-app why {row['run']} {shlex.quote(holder['job'])} says what that waits for"
    return f"{what}: {whose}{queue}", waits_for, hint


def _pending(rt: Runtime, plan: RunPlan, row: Document, message: Document | None) -> Answer:
    if message is None or message["state"] == MessageState.CLOSED:
        return (
            f"its message {row['message']} is {'closed' if message else 'not there'}: nothing will move it on",
            {"kind": "lost", "message": row["message"]},
            f"pipeline-app run verify {plan.run} lists such jobs; please report it",
        )
    queue = message["queue"]
    waits_for: dict[str, Any] = {"kind": "publish", "message": message["_id"], "queue": queue}
    if message["published_at"] is None:
        what = f"its message {message['_id']} is not published to {queue} yet"
        return what, waits_for, _sweeper(rt, message["check_at"]) or "the sweep publishes it within seconds"
    try:
        depth = depths(rt.settings.amqp_url, [queue])[queue]
    except BrokerError as exc:
        waits_for |= {"kind": "broker", "since": message["published_at"]}
        return f"it is in queue {queue}, but the broker does not answer: {exc.message}", waits_for, exc.hint
    return _queued(rt, row, message, depth, waits_for)


def _queued(rt: Runtime, row: Document, message: Document, depth: Depth, waits_for: dict[str, Any]) -> Answer:
    queue, since = message["queue"], message["published_at"]
    stage = f"{message['pipeline']}.{row['stage']}"
    # A worker of many partitions takes turns; the embedded broker cannot tell at all.
    consumers = depth.consumers or serving(rt, [queue])[queue]
    waits_for |= {"kind": "queue", "since": since, "ready": depth.ready, "consumers": consumers}
    if depth.ready == 0 and consumers:
        return (
            f"its message left queue {queue} and no worker has claimed it yet: one has it reserved, or it got lost",
            waits_for,
            f"if it got lost, the sweep publishes it again after {_time(message['check_at'])}",
        )
    workforce = "nothing consumes it" if not consumers else f"consumers: {consumers}"
    what = f"it is in queue {queue} since {_time(since)}; messages ready there: {depth.ready}, {workforce}"
    return what, waits_for, None if consumers else f"start a worker: celery -A pipeline_app worker -Q {stage}"


def _sweeper(rt: Runtime, due_at: datetime) -> str | None:
    """What is due is brought on by the sweep, and that runs inside the workers."""
    if workers.alive(rt.store):
        return None
    passed = "was" if due_at <= rt.store.now() else "will be"
    return f"no worker runs, so nobody enqueues it when it {passed} due: start one (celery -A pipeline_app worker)"


def _brief(error: Document) -> str:
    text = f"{error['type']}: {error['message']}" if error["message"] else str(error["type"])
    line = text.splitlines()[0]
    return line if len(line) <= 200 else line[:199] + "…"


def _time(at: datetime) -> str:
    return at.strftime("%Y-%m-%dT%H:%M:%SZ")


def _ago(rt: Runtime, at: datetime) -> str:
    return f"for {max(0.0, (rt.store.now() - at).total_seconds()):.0f} s"


def _due(rt: Runtime, at: datetime) -> str:
    left = (at - rt.store.now()).total_seconds()
    return f"{_time(at)} (in {left:.0f} s)" if left > 0 else f"{_time(at)} (any moment)"
