"""The jobs of a seeding in pages: what one transaction adds.

Raises BadJobLineError, where a job cannot be read, after the pages before it.
"""

from __future__ import annotations

import itertools
import queue
import threading
import time
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from pipeline_app.domain.job import JobLine, as_job_line

#: Jobs in one page.
PAGE = 1000
#: A line of a stream waits for its page to fill at most this long.
LINGER_S = 0.25

Lines = Iterable[JobLine | Mapping[str, Any]]


def _numbered(lines: Lines) -> Iterator[JobLine]:
    for number, line in enumerate(lines, start=1):
        yield as_job_line(line, number)


def full(lines: Lines) -> Iterator[list[JobLine]]:
    """Pages that are full, but for the last."""
    numbered = _numbered(lines)
    while page := list(itertools.islice(numbered, PAGE)):
        yield page


def as_they_come(lines: Lines) -> Iterator[list[JobLine]]:
    """Pages that are full, or whose first line has waited for LINGER_S: a slow source's jobs start all the same."""
    waiting: queue.Queue[JobLine | BaseException | None] = queue.Queue(maxsize=PAGE)
    given_up = threading.Event()

    def read() -> None:
        last: BaseException | None = None
        try:
            for line in _numbered(lines):
                if given_up.is_set():
                    return
                waiting.put(line)
        except BaseException as exc:  # noqa: BLE001 - raised again where the pages are taken
            last = exc
        waiting.put(last)

    threading.Thread(target=read, name="pipeline-seed-reader", daemon=True).start()
    try:
        page: list[JobLine] = []
        first_at = 0.0
        while True:
            try:
                line = waiting.get(timeout=max(0.0, first_at + LINGER_S - time.monotonic()) if page else None)
            except queue.Empty:
                yield page
                page = []
                continue
            if isinstance(line, JobLine):
                first_at = first_at if page else time.monotonic()
                page.append(line)
            if len(page) == PAGE or (page and not isinstance(line, JobLine)):
                yield page
                page = []
            if isinstance(line, BaseException):
                raise line
            if line is None:
                return
    finally:
        given_up.set()
        while not waiting.empty():  # a reader that waits for room sees that nobody takes any more
            waiting.get_nowait()
