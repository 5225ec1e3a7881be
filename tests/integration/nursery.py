"""Lets processes die at every write that a step of the protocol makes, and those who live on do their duty afterwards.

Used by the tests of crash points. The steps are in `crash_child.py`.
"""

from __future__ import annotations

import itertools
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from typing import Any

from pipeline_app.control import runs
from pipeline_app.control.duties import sweep
from pipeline_app.control.results import results
from pipeline_app.runtime import Runtime
from pipeline_app.store.client import APP_NAME
from tests.integration import crash_child
from tests.integration.helpers import backdate, in_broker, prove, pump
from tests.integration.proxy import WRITES, MongoProxy, When
from tests.project import REPOSITORY, Project


class Nursery:
    """Lets a child take a step, and kills it at one of its writes."""

    def __init__(self, project: Project, proxy: MongoProxy) -> None:
        self._urls = {"amqp_url": project.amqp_url, "mongodb_url": proxy.address(project.mongodb_url)}
        self._proxy = proxy
        self._process = subprocess.Popen(
            # Imported, not run as a program: handlers in __main__ would make another definition.
            [sys.executable, "-c", "from tests.integration import crash_child; crash_child.nursery()"],
            cwd=REPOSITORY,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def close(self) -> None:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        self._process.wait(30)
        self._process.stdout.close()

    def killed_at(self, number: int, when: When, step: str, run: str, detail: str) -> tuple[bool, set[str]]:
        """Whether the child was killed, which it is not if it makes fewer writes; and the names of its processes."""
        assert self._process.stdin is not None
        left = [number]
        born: Future[int] = Future()

        def hook(now: When, command: dict[str, Any]) -> bool:
            if now != when or not WRITES & command.keys():
                return False
            left[0] -= 1
            if left[0] == 0:
                os.kill(born.result(), signal.SIGKILL)
            return left[0] <= 0

        self._proxy.clients.clear()
        self._proxy.hook = hook
        order = {"step": step, "run": run, "detail": detail, **self._urls}
        self._process.stdin.write(json.dumps(order) + "\n")
        self._process.stdin.flush()
        born.set_result(int(self._answer()))
        status = int(self._answer())
        assert status in (0, -signal.SIGKILL)
        return status != 0, {name.removeprefix(APP_NAME).strip() for name in self._proxy.clients}

    def _answer(self) -> str:
        assert self._process.stdout is not None
        return self._process.stdout.readline()


def each_gap(
    nursery: Nursery, rt: Runtime, step: str, arrange: Callable[[str], str] = lambda run: "", writes: int = 3
) -> Iterator[str]:
    """Runs in which the step died, at one gap after the other; those who live on have done their duty in each.

    `writes` is how many it makes at least: one that makes none would prove nothing.
    """
    for when in ("before", "after"):
        for number in itertools.count(1):
            run = f"{step}-{when}-{number}"
            runs.create_run(rt, run, crash_child.PIPELINE)
            killed, processes = nursery.killed_at(number, when, step, run, arrange(run))
            # What a worker held is freed by whoever takes over its messages; for others MongoDB needs a minute.
            live_on(rt, set() if step in crash_child.OF_A_WORKER else processes)
            yield run
            if not killed:
                assert number > writes, "it should make some writes"
                break


def live_on(rt: Runtime, dead: set[str]) -> None:
    """What the sweep does once every time is over."""
    for process in dead:
        rt.store.end_transactions(process)
    sweep.end_leases(rt)
    backdate(rt, "seed_batches", 3600, "lease_until")
    backdate(rt, "messages", 3600, "check_at")
    backdate(rt, "run_counters", 3600, "at")
    sweep.sweep(lambda: rt).round(rt)


def finish(rt: Runtime, run: str) -> None:
    """All jobs are through, with the results that they should have, and the user's task was told of each."""
    go_through(rt, run)
    prove(rt, run, terminal=5)
    want = {f"{run}-{n}": {"n": n + 1} for n in range(5)}
    assert {row["job_id"]: row["result"] for row in results(rt, run)} == want
    told = {row["job_id"]: row["result"] for (rows,) in in_broker(rt, "celery") for row in rows}
    assert want.items() <= told.items()


def go_through(rt: Runtime, run: str) -> None:
    """What is on its way comes to its end."""
    pump(rt)
    backdate(rt, "job_states", 3600, "due_at", run=run)
    sweep.release_due(rt)
    pump(rt)


def take_away(rt: Runtime) -> None:
    """Take all hints out of the broker."""
    in_broker(rt, *rt.store.db.partitions.distinct("_id"))
