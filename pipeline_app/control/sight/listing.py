"""What there is: the newest runs, the workers, the services. For people who look around before they ask of one run."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

from pipeline_app.control.sight.status import status
from pipeline_app.errors import PipelineError
from pipeline_app.runtime import Runtime
from pipeline_app.settings import redact
from pipeline_app.store import manifests, messages
from pipeline_app.store import workers as store_workers

#: Workers that ended are listed for this long.
ENDED_SHOWN = timedelta(hours=1)


def runs(rt: Runtime, limit: int) -> list[dict[str, Any]]:
    """The newest runs, oldest of them first. Raises StoreError."""
    found = []
    for manifest in manifests.listing(rt.store, limit):
        now = status(rt, manifest["_id"], queues=False)
        found.append(
            {
                "run": now.run,
                "pipeline": now.pipeline,
                "state": now.state,
                "created_at": manifest["created_at"],
                "seeded": now.seeded,
                "states": now.states,
            }
        )
    return found


def workers(rt: Runtime) -> list[dict[str, Any]]:
    """Workers that run and those that ended lately, oldest first. Raises StoreError."""
    rows = store_workers.listing(rt.store, rt.store.now() - ENDED_SHOWN)
    alive = {row["_id"] for row in store_workers.alive(rt.store)}
    running: dict[str, int] = {}
    for message in messages.claimed(rt.store):
        running[message["worker"]] = running.get(message["worker"], 0) + len(message["jobs"])
    shown = ("worker", "host", "pid", "pool", "concurrency", "queues", "stages", "select", "skip")
    return [
        {
            **{name: row[name] for name in shown},
            # Its lease is over, and the sweep has not come by yet.
            "state": "stale" if row["ended_at"] is None and row["_id"] not in alive else row["state"],
            "started_at": row["started_at"],
            "heartbeat_at": row["heartbeat_at"],
            "running_jobs": running.get(row["_id"], 0),
            "rss_bytes": row.get("rss_bytes"),
            "log": row.get("log"),
        }
        for row in rows
    ]


def services(rt: Runtime) -> list[dict[str, Any]]:
    """The store and the broker that this project's commands and workers use, and whether they answer."""
    found = []
    for name, address, ask in (
        ("mongodb", rt.settings.mongodb_url, rt.store.synchronise),
        ("rabbitmq", rt.settings.amqp_url, rt.publisher.ping),
    ):
        problem = None
        try:
            ask()
        except PipelineError as exc:
            problem = exc.message
        state = "running" if problem is None else "unreachable"
        found.append({"name": name, "state": state, "address": redact(address), "problem": problem})
    return found
