"""Seeds the benchmark's run, or waits for it and prints its seconds; a process with the worker's settings."""

from __future__ import annotations

import sys
import time

from pipeline_app.application import client_runtime
from pipeline_app.control import runs
from pipeline_app.control.seed import seeding


def main() -> None:
    """`seed N`, or `wait N`."""
    what, number = sys.argv[1], int(sys.argv[2])
    rt = client_runtime()
    if what == "seed":
        runs.create_run(rt, "bench", "noop")
        seeding.seed(rt, "bench", ({"job_id": str(n), "payload": n} for n in range(number)))
        print(0)
        return
    deadline = time.monotonic() + 300
    while runs.wait(rt, "bench", timeout_s=60).states["terminal"] != number:
        assert time.monotonic() < deadline, "the run does not end"
    events = rt.store.db.pipeline_events
    last = events.find_one({"run": "bench", "event": "recorded"}, sort=[("at", -1)])
    first = rt.store.db.job_attempts.find_one(sort=[("started_at", 1)])
    assert first is not None
    assert last is not None
    print((last["at"] - first["started_at"]).total_seconds())


if __name__ == "__main__":
    main()
