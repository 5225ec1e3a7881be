"""The workers of a chaos run. Whatever is done to them, there are soon as many again.

Each has proxies of its own to the services, so that one can be cut off while the others are not.
"""

from __future__ import annotations

import itertools
import os
import signal
import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil

from tests.chaos.driver.journal import Journal
from tests.integration.proxy import Proxy
from tests.project import Project
from tests.worker import Worker

#: A worker that does not consume by then has failed to start.
START_S = 120.0
#: A worker that is told to stop must have stopped by then.
STOP_S = 90.0


class Place:
    """One worker's place in the fleet, taken by one after the other."""

    def __init__(
        self,
        project: Project,
        journal: Journal,
        numbers: itertools.count[int],
        kind: tuple[str, int],
        proxies: Mapping[str, Proxy],
        env: Mapping[str, str],
    ) -> None:
        self._project = project
        self._journal = journal
        self._numbers = numbers
        self.pool, self.concurrency = kind
        #: Name of a service -> the proxy before it.
        self.named_proxies = proxies
        self._env = env
        # Faults come from several threads: a worker is replaced by one of them.
        self._lock = threading.Lock()
        self._start()

    @property
    def proxies(self) -> list[Proxy]:
        """Everything between this worker and its services."""
        return list(self.named_proxies.values())

    @property
    def pid(self) -> int:
        """Of its main process."""
        return self.worker.process.pid

    def look(self) -> None:
        """Notice that it is ready, or that it ended by itself, which nothing here excuses."""
        with self._lock:
            code = self.worker.process.poll()
            if code is not None:
                self._note("ended by itself", code=code)
                self._replace()
            elif self.ready_at is None:
                self._look_at_start()

    def _look_at_start(self) -> None:
        if " ready." in self.worker.text:
            self.ready_at = time.monotonic()
        elif time.monotonic() - self._started > START_S:
            self._note("did not start")
            self.worker.kill()
            self._replace()

    def kill(self, *, with_children: bool) -> bool:
        """SIGKILL, to all of its processes at once or to the main one alone, whose children must not outlive it.

        False if it is not there just now.
        """
        with self._lock:
            process = self.worker.process
            if self.ready_at is None or process.poll() is not None:
                return False
            self._note("kill", group=with_children)
            if with_children:
                os.killpg(process.pid, signal.SIGKILL)
            else:
                os.kill(process.pid, signal.SIGKILL)
            process.wait(30)
            self._replace()
        return True

    def children(self) -> list[psutil.Process]:
        """Processes of its pool, and of jobs that run alone."""
        return self.family()[1:]

    def family(self) -> list[psutil.Process]:
        """Its main process and all below it."""
        try:
            main = psutil.Process(self.pid)
            return [main, *main.children(recursive=True)]
        except psutil.NoSuchProcess:
            return []

    def witnesses(self, folder: Path) -> list[Path]:
        """Files that its processes write now."""
        files = [folder / f"{process.pid}.jsonl" for process in self.family()]
        return [file for file in files if file.exists()]

    def stop(self) -> int:
        """Tell it to stop, and wait until it has; its exit code."""
        with self._lock:
            code = self.worker.stop(timeout=STOP_S)
            self._note("told to stop", code=code)
        for proxy in self.proxies:
            proxy.close()
        return code

    def _replace(self) -> None:
        self.worker.stop()
        self._start()

    def _start(self) -> None:
        self._started = time.monotonic()
        #: When it began to consume; None until then.
        self.ready_at: float | None = None
        self.name = f"w{next(self._numbers)}"
        env = {**self._env, "CHAOS_WORKER": self.name}
        self.worker = Worker(self._project, ("-n", f"{self.name}@%h"), self.pool, self.concurrency, env=env)
        self._note("started", pool=self.pool)

    def _note(self, what: str, **more: object) -> None:
        self._journal.write(what, worker=self.name, pid=self.pid, **more)


class Fleet:
    """All places."""

    def __init__(self, places: Sequence[Place]) -> None:
        self.places = places

    def look(self) -> None:
        """Notice who is ready, and fill the places of those who ended."""
        for place in self.places:
            place.look()

    def wait_ready(self, timeout: float = 180) -> None:
        """Until all consume."""
        deadline = time.monotonic() + timeout
        while any(place.ready_at is None for place in self.places):
            self.look()
            assert time.monotonic() < deadline, "the workers did not start"
            time.sleep(0.05)

    def stop(self) -> list[int]:
        """Tell all to stop, once, and wait until they have; their exit codes."""
        with ThreadPoolExecutor(len(self.places)) as pool:
            return list(pool.map(Place.stop, self.places))
