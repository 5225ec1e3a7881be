"""Handlers that a process of their own can import, for jobs that are run alone."""

from __future__ import annotations

import faulthandler
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from pipeline_app import Job, PermanentError, RateLimited


class Doing(BaseModel):
    """What a handler is to do."""

    what: str = "fine"
    #: File that it may use.
    path: str = ""


class UnreadableError(Exception):
    """An error that cannot say what it is."""

    def __str__(self) -> str:
        raise RuntimeError("no text")


def do(doing: Doing, job: Job) -> Any:
    """Does as its input says; where it ends is in the name."""
    return globals()[f"do_{doing.what}"](doing, job)


def do_fine(doing: Doing, job: Job) -> Any:
    seen = {"id": job.id, "run": job.run, "stage": job.stage, "tags": dict(job.tags), "attempt": job.attempt}
    return {**seen, "key": job.key, "pid": os.getpid(), "cwd": str(Path.cwd())}


def do_parent(doing: Doing, job: Job) -> int:
    return os.getppid()


def do_fail(doing: Doing, job: Job) -> Any:
    raise ValueError("three of 3")


def do_permanent(doing: Doing, job: Job) -> Any:
    raise PermanentError("it says so")


def do_limit(doing: Doing, job: Job) -> Any:
    until = datetime(2100, 1, 2, 3, 4, 5, tzinfo=UTC)
    raise RateLimited("too many", until=until, selector={"provider.name": "$x"})


def do_exit(doing: Doing, job: Job) -> Any:
    sys.exit(3)


def do_memory(doing: Doing, job: Job) -> Any:
    raise MemoryError


def do_unreadable(doing: Doing, job: Job) -> Any:
    raise UnreadableError


def do_unserialisable(doing: Doing, job: Job) -> Any:
    return threading.Lock()


def do_large(doing: Doing, job: Job) -> Any:
    return "x" * (15 * 1024 * 1024)


def do_almost_large(doing: Doing, job: Job) -> Any:
    return "x" * (14 * 1024 * 1024)


def do_spend(doing: Doing, job: Job) -> Any:
    job.spend(3, "tokens")
    job.spend(4.5, "tokens")
    raise ValueError("spent all the same")


def do_print(doing: Doing, job: Job) -> Any:
    print("printed " * 200_000)
    sys.stderr.write("written " * 200_000)
    job.log.warning("logged by %s", job.id)
    logging.getLogger("mine").warning("logged by the handler")
    return "printed"


def do_read(doing: Doing, job: Job) -> Any:
    return sys.stdin.read()


def do_leave_a_thread(doing: Doing, job: Job) -> Any:
    threading.Thread(target=time.sleep, args=(60,)).start()
    return "left"


def do_leave_a_process(doing: Doing, job: Job) -> Any:
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"], close_fds=False)
    Path(doing.path).write_text(str(process.pid))
    return "left"


def do_fork_and_die(doing: Doing, job: Job) -> Any:
    pid = os.fork()
    if pid == 0:
        time.sleep(60)
        os._exit(0)
    Path(doing.path).write_text(str(pid))
    os._exit(5)


def do_close_files(doing: Doing, job: Job) -> Any:
    os.closerange(3, 100)
    time.sleep(0.5)
    return "closed"


def do_kill(doing: Doing, job: Job) -> Any:
    os.kill(os.getpid(), signal.SIGKILL)


def do_kill_group(doing: Doing, job: Job) -> Any:
    os.killpg(0, signal.SIGKILL)


def do_end(doing: Doing, job: Job) -> Any:
    print("the last words")
    os._exit(7)


def do_crash(doing: Doing, job: Job) -> Any:
    faulthandler._sigsegv()


def do_grow(doing: Doing, job: Job) -> Any:
    grown = bytearray(os.urandom(1)) * (64 * 1024 * 1024)
    time.sleep(0.5)
    os.kill(os.getpid(), signal.SIGKILL)
    return len(grown)


def do_wait(doing: Doing, job: Job) -> Any:
    Path(doing.path).write_text(str(os.getpid()))
    time.sleep(60)
