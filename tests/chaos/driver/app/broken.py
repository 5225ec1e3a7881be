"""The product, broken on purpose: what the checker must find. Each variant undoes one promise, in the workers only."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Any

from pipeline_app.flow import forward, record
from pipeline_app.flow.consume import StageTask
from pipeline_app.store import messages, transition, workers
from pipeline_app.store.client import translated


def acknowledge_before_record() -> None:
    """RabbitMQ forgets a message as soon as a process takes it on."""
    StageTask.acks_late = False


def forward_before_record() -> None:
    """The next stage's hints are published, and then it is recorded."""
    apply = transition.apply

    def publish_and_apply(store: Any, plan: Any) -> None:
        if plan.close and not plan.given_back:
            runtime = sys.modules["pipeline_app.celery"]._runtime()
            forward.publish(runtime, plan.messages)
        apply(store, plan)

    transition.apply = publish_and_apply


def claim_without_compare() -> None:
    """A message is claimed whether or not somebody has it."""

    def claim(store: Any, ids: Sequence[str], *, worker: str, process: str, token: str, **_: Any) -> list[Any]:
        taken = {"state": "claimed", "worker": worker, "process": process, "token": token, "claimed_at": store.now()}
        with translated(store):
            store.db.messages.update_many(
                {"_id": {"$in": list(ids)}, "state": {"$in": ["open", "claimed"]}}, {"$set": taken}
            )
            return list(store.db.messages.find({"_id": {"$in": list(ids)}, "token": token}))

    messages.claim = claim


def lease_without_renewal() -> None:
    """A worker believes that its lease goes on for ever."""
    workers.renew = lambda *_, **__: True


def late_outputs_overwrite() -> None:
    """A worker that lost its claim writes its outputs all the same, over those that count."""
    keep_refused = record._keep_refused

    def keep_and_overwrite(rt: Any, records: Sequence[Any]) -> None:
        keep_refused(rt, records)
        for outcome, key, stage in (
            (outcome, f"{entry.work.plan.run}/{outcome.job_id}", entry.work.stage)
            for entry in records
            for outcome in entry.outcomes
            if outcome.output is not None and f"{entry.work.plan.run}/{outcome.job_id}" in entry.refused
        ):
            those = {"_id": {"$gte": f"{key}/{stage}/", "$lt": f"{key}/{stage}0"}}
            rt.store.db.job_outputs.update_many(those, {"$set": {"value": outcome.output["value"]}})

    record._keep_refused = keep_and_overwrite


VARIANTS: dict[str, Callable[[], None]] = {
    variant.__name__: variant
    for variant in (
        acknowledge_before_record,
        forward_before_record,
        claim_without_compare,
        lease_without_renewal,
        late_outputs_overwrite,
    )
}
