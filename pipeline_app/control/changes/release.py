"""Give jobs that wait in the store a message. Who calls: the duties that let them go, each in its order and pace."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

from pipeline_app.control.changes.fitting import apply_fitting
from pipeline_app.control.contained import contained
from pipeline_app.domain.states import JobState
from pipeline_app.flow.enqueue import enqueued_state, new_messages
from pipeline_app.flow.forward import publish_or_leave
from pipeline_app.runtime import Runtime
from pipeline_app.store import jobs, transition
from pipeline_app.store.client import Document
from pipeline_app.store.transition import JobMove, Place, Transition


def enqueue_parked(
    rt: Runtime, rows: Sequence[Document], why: str, *, chunk: int | None = None, released_by: str | None = None
) -> list[Document]:
    """Give jobs that wait in the store a message, in full chunks or of at most `chunk`; returns the messages.

    `why` is for the event log; `released_by` names what kept them and lets them pass now.
    """
    groups: dict[tuple[str, str, str, str], list[Document]] = defaultdict(list)
    for row in rows:
        groups[row["run"], row["stage"], row["partition"], row["state"]].append(row)
    made: list[Document] = []
    for (run, stage, partition, state), group in groups.items():
        with contained("enqueueing", run):
            fresh = _enqueue_group(rt, (run, stage, partition), JobState(state), group, why, chunk, released_by)
            made.extend(fresh)
            publish_or_leave(rt, fresh)
    return made


def _enqueue_group(
    rt: Runtime,
    place: Place,
    state: JobState,
    rows: Sequence[Document],
    why: str,
    chunk: int | None,
    released_by: str | None,
) -> list[Document]:
    run, stage, partition = place
    definition = rt.memory.need_plan(run)

    def plan(whole: Transition, fitting: list[Document]) -> None:
        keys = {row["job"]: row["_id"] for row in fitting}
        whole.messages += new_messages(
            definition, stage, partition, list(keys), whole.now, chunk=chunk, released_by=released_by
        )
        for message in whole.messages:
            whole.moves.append(
                JobMove(
                    keys=[keys[job] for job in message["jobs"]],
                    # A job that waits for its turn is let go by nothing else.
                    guard={"state": state, "stage": stage, "message": None, "queues_for": None},
                    set=enqueued_state(message["_id"]),
                    unset=jobs.PARKED_FIELDS,
                )
            )
            about = {"jobs": message["jobs"], "now": whole.now, "message": message["_id"], "why": why}
            whole.events.append(transition.event(run, stage, "enqueued", **about))
        whole.count(place, state, JobState.PENDING, len(fitting))

    return apply_fitting(rt, {row["_id"]: row for row in rows}, plan)[1]
