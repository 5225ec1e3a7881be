"""Processes that outlive the command that started them. Called by the modules of each service and by workers.py.

A process is known by its pid and the time when it was made, so a pid that the system gave to somebody else is never
touched. It also carries a mark in its environment, the project's folder and its own name: its children inherit it, and
it is still there when no record was written because the starting command was killed.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

#: The environment variable of the mark.
MARK = "PIPELINE_APP_PROCESS"

#: Ports are taken from below the range that systems give to outgoing connections: a client that tries to reach a
#: server which is away could otherwise be given the server's own port, connect to itself and so keep the server out.
PORTS = range(10_000, 32_000)

#: psutil derives the time from the system's clock, which may be moved a little meanwhile.
CREATE_TIME_TOLERANCE_S = 1.0


class CancelledError(Exception):
    """The call was told to give up; whoever told it raises the real reason."""


@dataclass(frozen=True, kw_only=True)
class ProcessRecord:
    """What is written down of a process to find it again."""

    name: str
    pid: int
    #: Seconds since the epoch, as psutil tells it.
    create_time: float
    #: Path of its log file.
    log: str
    #: Value of its environment variable MARK.
    mark: str


@dataclass(frozen=True, kw_only=True)
class RunningService:
    """A service that serves: its clients' port on 127.0.0.1, and its processes."""

    port: int
    processes: tuple[ProcessRecord, ...]


class _Detached(subprocess.Popen[bytes]):
    """A child that is meant to outlive us: no warning that it still runs when this object goes away."""

    def __del__(self) -> None:
        pass


def start(
    name: str, command: Sequence[str | Path], *, state_dir: Path, env: Mapping[str, str], cwd: Path | None = None
) -> ProcessRecord:
    """Start a process in a session of its own, so that a terminal's Ctrl-C does not reach it.

    Its output goes to `.pipeline/logs/NAME.log`; the log of the process before it stays as `NAME.log.1`.
    """
    log = log_file(state_dir, name)
    if log.exists():
        os.replace(log, log.with_name(f"{log.name}.1"))
    with log.open("wb") as output:
        child = _Detached(
            [str(word) for word in command],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env={**env, MARK: mark(state_dir, name)},
            cwd=cwd,
            start_new_session=True,
        )
    # A child that ended at once is a zombie, which still has a creation time: nobody but us reaps it.
    create_time = psutil.Process(child.pid).create_time()
    return ProcessRecord(name=name, pid=child.pid, create_time=create_time, log=str(log), mark=mark(state_dir, name))


def log_file(state_dir: Path, name: str) -> Path:
    """Where the output of the project's process of that name goes."""
    return state_dir / "logs" / f"{name}.log"


def mark(state_dir: Path, name: str) -> str:
    """Value of MARK in the environment of the project's process of that name."""
    return f"{state_dir}:{name}"


def find(record: ProcessRecord) -> psutil.Process | None:
    """The recorded process if it still runs, and not another one that has its pid now."""
    try:
        process = psutil.Process(record.pid)
        same = abs(process.create_time() - record.create_time) <= CREATE_TIME_TOLERANCE_S
    except psutil.NoSuchProcess:
        return None
    if not same and _mark_of(process) != record.mark:
        return None
    return None if _gone(process) else process


def marked(state_dir: Path, name: str | None = None) -> list[ProcessRecord]:
    """Running processes of this project (of that name), whether or not they were recorded; not their children."""
    found = {process.pid: process for process in psutil.process_iter() if _is_marked(process, state_dir, name)}
    records = []
    for process in found.values():
        with contextlib.suppress(psutil.NoSuchProcess):
            if process.ppid() not in found and not _gone(process):
                records.append(_record_of(process, state_dir))
    return records


def stop(records: Iterable[ProcessRecord], *, grace_s: float, again_s: float = 0.0) -> list[ProcessRecord]:
    """End these processes and their children; returns those that did not end by themselves in time.

    With `again_s` those that are late are told once more, and have so many seconds before they are killed.
    Only the process itself gets the SIGTERM: what is to become of its children is its own affair until the time is up.
    """
    asked = [(record, process) for record in records if (process := find(record)) is not None]
    family = {process for _, first in asked for process in (first, *_children(first))}
    for _, process in asked:
        _send(process, signal.SIGTERM)
    _wait_gone([process for _, process in asked], grace_s)
    if again_s and (slow := [process for _, process in asked if not _gone(process)]):
        for process in slow:
            _send(process, signal.SIGTERM)
        _wait_gone(slow, again_s)

    late = [(record, process) for record, process in asked if not _gone(process)]
    family |= {child for _, process in late for child in _children(process)}
    # Children of one that ended in time mostly notice within moments.
    rest = _wait_gone(family - {process for _, process in late}, 1.0) | {process for _, process in late}
    for process in rest:
        _send(process, signal.SIGKILL)
    _wait_gone(rest, 10.0)
    return [record for record, _ in late]


def stop_marked(state_dir: Path, name: str | None = None, *, grace_s: float) -> list[ProcessRecord]:
    """End the project's processes (of that name) of which there may be no record; returns what was found."""
    found: list[ProcessRecord] = []
    for _ in range(3):  # one that is just becoming a daemon has another pid when it is looked for again
        if not (left := marked(state_dir, name)):
            break
        found += left
        stop(left, grace_s=grace_s)
    return found


def wait_gone(records: Iterable[ProcessRecord], timeout_s: float) -> None:
    """Wait for processes that were told to end."""
    _wait_gone([process for record in records if (process := find(record)) is not None], timeout_s)


def free_port(preferred: int | None = None) -> int:
    """A port of 127.0.0.1 that nobody uses right now: the preferred one if possible."""
    if preferred and _is_free(preferred):
        return preferred
    while not _is_free(port := PORTS.start + secrets.randbelow(len(PORTS))):
        pass
    return port


def listens(port: int) -> bool:
    """Whether somebody accepts connections on this port of 127.0.0.1."""
    try:
        socket.create_connection(("127.0.0.1", port), timeout=1).close()
    except OSError:
        return False
    return True


def wait_until(
    ready: Callable[[], bool], record: ProcessRecord, *, timeout_s: float, cancelled: threading.Event
) -> str | None:
    """Wait until a process that was just started is ready; what went wrong, or None if it is.

    Raises CancelledError if told to give up.
    """
    deadline = time.monotonic() + timeout_s
    while not ready():
        if find(record) is None:
            return f"{record.name} ended while it started"
        if time.monotonic() > deadline:
            return f"{record.name} was not ready within {timeout_s:.0f} seconds"
        if cancelled.wait(0.03):
            raise CancelledError
    return None


def tail(log: str | Path, *, lines: int = 15, width: int = 400) -> str:
    """The last lines of a log file, for an error."""
    try:
        with Path(log).open("rb") as file:
            file.seek(-min(file.seek(0, os.SEEK_END), 100_000), os.SEEK_END)
            text = file.read().decode(errors="replace")
    except FileNotFoundError:
        return ""
    return "\n".join(line[:width] for line in text.rstrip().splitlines()[-lines:])


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        # As the servers do: connections that wait to be forgotten are no hindrance, a listener is.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True


def _record_of(process: psutil.Process, state_dir: Path) -> ProcessRecord:
    name = _mark_of(process).removeprefix(mark(state_dir, ""))
    log = str(log_file(state_dir, name))
    return ProcessRecord(
        name=name, pid=process.pid, create_time=process.create_time(), log=log, mark=mark(state_dir, name)
    )


def _is_marked(process: psutil.Process, state_dir: Path, name: str | None) -> bool:
    found = _mark_of(process)
    of_project = found.startswith(mark(state_dir, "")) and process.pid != os.getpid()
    return of_project if name is None else of_project and found == mark(state_dir, name)


def _mark_of(process: psutil.Process) -> str:
    try:
        return str(process.environ().get(MARK, ""))
    except (psutil.Error, OSError):  # somebody else's process, or one that just ended
        return ""


def _children(process: psutil.Process) -> list[psutil.Process]:
    try:
        return list(process.children(recursive=True))
    except psutil.NoSuchProcess:
        return []


def _send(process: psutil.Process, number: signal.Signals) -> None:
    with contextlib.suppress(psutil.NoSuchProcess):
        process.send_signal(number)  # psutil refuses if the pid was given to another process


def _wait_gone(processes: Iterable[psutil.Process], timeout_s: float) -> set[psutil.Process]:
    """Wait until these are gone; returns those that are not."""
    deadline = time.monotonic() + timeout_s
    left = {process for process in processes if not _gone(process)}
    while left and time.monotonic() < deadline:
        time.sleep(0.02)
        left = {process for process in left if not _gone(process)}
    return left


def _gone(process: psutil.Process) -> bool:
    """Whether it ended. A zombie counts as ended: not every machine's first process buries the orphans."""
    with contextlib.suppress(psutil.NoSuchProcess, psutil.TimeoutExpired):
        if process.is_running():
            if process.status() != psutil.STATUS_ZOMBIE:
                return False
            process.wait(timeout=0)  # buries it if it is our own child
    return True
