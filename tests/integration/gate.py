"""A handler that tests can stop in the middle."""

from __future__ import annotations

import threading
from typing import Any

from pipeline_app import Job, Stage


def work(n: int) -> dict[str, Any]:
    """What the handler does for a suspect, in a process of its own, where no test could let it go on."""
    return {"n": n, "call": 0}


class Gate:
    """A handler that waits until it may go on, and counts its calls."""

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.entered = threading.Event()
        self.may_end = threading.Event()

    def stage(self, **options: Any) -> Stage:
        def work(n: int, job: Job) -> dict[str, Any]:
            self.calls.append(job.id)
            number = len(self.calls)
            self.entered.set()
            assert self.may_end.wait(30)
            return {"n": n, "call": number}

        work.__qualname__ = "work"  # found in another process as the function above
        return Stage(work, **options)
