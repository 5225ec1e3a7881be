"""What handlers do, written down where the product cannot reach: a line for each start and each end of an execution.

Each process appends to a file of its own, a line with one write: what was written is there, however the process ends.
`tests/chaos/evidence.py` reads it.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from pipeline_app import Job

FOLDER = "witness"

_files: dict[int, int] = {}


def _file() -> int:
    """This process's file; a forked child has its own."""
    found = _files.get(os.getpid())
    if found is None:
        # Two threads may both open it, and another process have had its name before: they append.
        name = os.path.join(FOLDER, f"{os.getpid()}.jsonl")
        found = _files[os.getpid()] = os.open(name, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    return found


def write(what: str, job: Job, execution: str, trail: list[str]) -> None:
    """One line: what happened to which job, in which execution, and which executions its input came from."""
    worker = os.environ["CHAOS_WORKER"]
    line = [what, job.id, job.stage, job.attempt, job.key, execution, worker, os.getpid(), os.getppid()]
    line += [time.time(), time.monotonic(), trail]
    os.write(_file(), json.dumps(line).encode() + b"\n")


@contextmanager
def execution(job: Job, value: dict[str, Any]) -> Iterator[str]:
    """The name of this execution, which nothing else is called; its start and its end are written down."""
    name = f"{os.getpid()}-{time.monotonic_ns()}"
    write("start", job, name, value["trail"])
    try:
        yield name
    except BaseException:
        write("raise", job, name, value["trail"])
        raise
    write("end", job, name, value["trail"])
