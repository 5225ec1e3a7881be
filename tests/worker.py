"""A `celery -A pipeline_app worker` process of a project: what every kind of test starts, kills and reads.

It also is what pytest-celery calls the container of a worker's node (name, status, logs, ready, kill, restart): see
`tests/nodes.py`.
"""

from __future__ import annotations

import os
import signal
import subprocess
import time
import uuid
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Protocol

import celery


class Place(Protocol):
    """Where a worker runs: a project."""

    @property
    def folder(self) -> Path: ...

    @property
    def env(self) -> dict[str, str]: ...


class Worker:
    """It starts when it is made; `wait_ready` waits until it consumes."""

    def __init__(
        self,
        place: Place,
        arguments: tuple[str, ...] = (),
        pool: str = "threads",
        concurrency: int = 2,
        env: Mapping[str, str] | None = None,
    ) -> None:
        self.id = uuid.uuid4().hex
        self.name = f"worker-{time.monotonic_ns()}"
        self.log = place.folder / f"{self.name}.log"
        self._folder = place.folder
        self._env = {**place.env, **(env or {})}
        self._command = [
            *("celery", "-A", "pipeline_app", "worker", "-P", pool, "-c", str(concurrency), "-n", f"{self.name}@%h"),
            *("--without-mingle", "--without-gossip", "-l", self.log_level(), *arguments),
        ]
        self.process = self._start()

    def _start(self) -> subprocess.Popen[bytes]:
        self._before = len(self.text)
        with self.log.open("ab") as log:
            return subprocess.Popen(
                self._command,
                cwd=self._folder,
                env=self._env,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    @property
    def text(self) -> str:
        """Its log so far, of all its lives."""
        return self.log.read_text(errors="replace") if self.log.exists() else ""

    def wait_ready(self, timeout: float = 30) -> None:
        """Wait until it consumes."""
        self.wait_for(self.ready, timeout)

    def wait_for(self, condition: Callable[[], bool], timeout: float = 30) -> None:
        """Wait for something that the worker should do while it lives."""
        deadline = time.monotonic() + timeout
        while not condition():
            assert self.process.poll() is None, f"the worker ended:\n{self.text[-4000:]}"
            assert time.monotonic() < deadline, f"not within {timeout} s:\n{self.text[-4000:]}"
            time.sleep(0.05)

    def kill(self, signal: str | int = "SIGKILL") -> None:
        """Send a signal and wait for the end; SIGKILL goes to the children, too, as when a machine loses power."""
        number = _number(signal)
        if number == _number("SIGKILL"):
            os.killpg(self.process.pid, number)
        else:
            self.process.send_signal(number)
        self.process.wait(30)

    def stop(self, number: signal.Signals = signal.SIGTERM, timeout: float = 30) -> int:
        """Tell it to stop and wait until it has; kill it if it does not, and whatever it left behind."""
        if self.process.poll() is None:
            self.process.send_signal(number)
            try:
                self.process.wait(timeout)
            except subprocess.TimeoutExpired:
                self.kill()
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        return self.process.returncode

    # The rest is for pytest-celery alone.

    @property
    def status(self) -> str:
        """`running` or `exited`, as Docker says."""
        return "running" if self.process.poll() is None else "exited"

    def ready(self) -> bool:
        """Whether it consumes."""
        return self.status == "running" and " ready." in self.text[self._before :]

    def logs(self) -> str:
        """The same as `text`."""
        return self.text

    def reload(self) -> None:
        """A container's attributes are read anew; here they always are."""

    def restart(self, timeout: float | None = None) -> None:
        """End it if it runs, start it again, wait until it consumes."""
        self.stop()
        self.process = self._start()
        self.wait_ready()

    def teardown(self) -> None:
        """End it."""
        self.stop()

    @staticmethod
    def version() -> str:
        """Of Celery."""
        return str(celery.__version__)

    @staticmethod
    def log_level() -> str:
        """As on the command line."""
        return "INFO"

    def worker_name(self) -> str:
        """Before the @ of its name."""
        return self.name

    @staticmethod
    def worker_queue() -> str:
        """For tasks that are not stages."""
        return "celery"


def _number(name: str | int) -> int:
    return signal.Signals[name].value if isinstance(name, str) else name
