"""Making, using and steering runs from Python: what the command line does, as functions.

    from pipeline_app import create_run, results, seed, wait

    create_run("books-1", "books")
    seed("books-1", ({"job_id": path.name, "payload": str(path)} for path in folder.iterdir()))
    wait("books-1")
    for row in results("books-1"):
        ...

    runs.py      making runs, adding jobs, results
    steering.py  holds, throttles, pauses, replays, cancelling

The package itself offers these names and loads this one at their first use: handlers import the package in every
worker, and need nothing of this. Addresses are those of the settings; a process connects once.
"""

from __future__ import annotations

from pipeline_app.api.runs import chain, create_run, results, seed, status, verify, wait
from pipeline_app.api.steering import (
    cancel,
    clear_hold,
    clear_throttle,
    failure_groups,
    hold,
    holds,
    move,
    pause,
    pause_replay,
    replay,
    replays,
    resume,
    resume_replay,
    set_priority,
    stop_replay,
    throttle,
    throttles,
)
from pipeline_app.control.accounts.verify import Verification
from pipeline_app.control.seed.seeding import Seeded
from pipeline_app.control.sight.status import Status

__all__ = [
    "Seeded",
    "Status",
    "Verification",
    "cancel",
    "chain",
    "clear_hold",
    "clear_throttle",
    "create_run",
    "failure_groups",
    "hold",
    "holds",
    "move",
    "pause",
    "pause_replay",
    "replay",
    "replays",
    "results",
    "resume",
    "resume_replay",
    "seed",
    "set_priority",
    "status",
    "stop_replay",
    "throttle",
    "throttles",
    "verify",
    "wait",
]
