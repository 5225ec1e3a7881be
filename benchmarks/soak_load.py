"""The load of the soak: a pipeline that meets some of everything, and the process that seeds it at a steady rate.

    python -m benchmarks.soak_load SECONDS RATE

One in fifty jobs fails once and is tried again, alone in its partition: its message fails as a whole, and Celery keeps
its traceback. One in five hundred is buried; a provider limits its callers in the first two seconds of each minute. A
new run begins every minute, because what is remembered of runs is remembered by every process.
"""

from __future__ import annotations

import itertools
import os
import sys
import time
from collections.abc import Iterator
from typing import Any

from pydantic import BaseModel

from pipeline_app import Job, PermanentError, Pipeline, RateLimited, Retry, Stage
from pipeline_app.application import client_runtime
from pipeline_app.control import runs
from pipeline_app.control.seed import seeding

RUN_S = 60.0
#: Jobs come in a few at a time, as from a source that is asked now and then.
TICK_S = 0.5
KINDS, PROVIDERS, FAILS = 4, 10, 50
LIMITED, LIMITED_S = "p7", 2.0

#: KiB of each job that a handler keeps for ever: what the soak is there to find.
LEAK_KB = int(os.environ.get("SOAK_LEAK_KB", "0"))
_kept: list[bytes] = []


class Item(BaseModel):
    """What a job begins with."""

    n: int
    text: str


def fails_once(n: int) -> bool:
    """Whether that job's first attempt fails."""
    return n % FAILS == FAILS - 1


def fetch(item: Item, job: Job) -> Item:
    """Fails now and then, as what is fetched from others does."""
    if LEAK_KB:
        _kept.append(os.urandom(LEAK_KB * 1024))
    if job.tags["provider"] == LIMITED and time.time() % 60 < LIMITED_S:
        raise RateLimited(retry_after=LIMITED_S, selector={"provider": LIMITED})
    if item.n % 500 == 499:
        raise PermanentError("one in five hundred")
    if fails_once(item.n) and job.attempt == 1:
        raise ConnectionError(f"nobody answered for {item.n}")
    time.sleep(0.005)
    return item


def parse(item: Item) -> dict[str, Any]:
    """Takes some memory, and gives it back."""
    words = [f"{item.text[:16]}{n}" for n in range(5000)]
    return {"n": item.n, "words": len(set(words)), "text": item.text * 2}


def keep(row: dict[str, Any]) -> dict[str, Any]:
    """The last stage."""
    return {"n": row["n"], "square": row["n"] ** 2}


soak = Pipeline(
    "soak",
    stages=[
        Stage(fetch, chunk=5, retry=Retry(attempts=3, backoff="1s", cap="2s")),
        Stage(parse, chunk=2),
        Stage(keep, chunk=10),
    ],
    partition_by=["kind"],
)


def paced(start: float, numbers: Iterator[int], rate: float, until: float) -> Iterator[dict[str, Any]]:
    """Job lines as their time comes."""
    for tick in itertools.count(int((time.monotonic() - start) / TICK_S)):
        time.sleep(max(0.0, start + tick * TICK_S - time.monotonic()))
        if time.monotonic() >= until:
            return
        for n in itertools.islice(numbers, max(1, round(rate * TICK_S))):
            tags = {"kind": "alone" if fails_once(n) else "abcdefgh"[n % KINDS], "provider": f"p{n % PROVIDERS}"}
            yield {"job_id": f"j{n}", "payload": {"n": n, "text": f"{n:016x}" * 16}, "tags": tags}


def main() -> None:
    """Seed run after run."""
    seconds, rate = float(sys.argv[1]), float(sys.argv[2])
    rt = client_runtime()
    start = time.monotonic()
    numbers = itertools.count()
    while (begin := time.monotonic()) < start + seconds:
        run = f"soak-{int((begin - start) / RUN_S):05}"
        runs.create_run(rt, run, "soak")
        until = min(start + seconds, start + (int((begin - start) / RUN_S) + 1) * RUN_S)
        seeding.seed(rt, run, paced(start, numbers, rate, until))
    rt.close()


if __name__ == "__main__":
    main()
