"""Ends processes with all that they started."""

from __future__ import annotations

import contextlib
import os
from typing import Any

import psutil

#: Handlers in children have this long to clean up after a stop at once.
CHILD_PATIENCE_S = 0.7
#: Killed processes are gone within this; what is stuck in the system is not waited for.
GONE_S = 2.0


def end_tree(pid: int, *, parent: int) -> None:
    """Kill a process and what it started, if it is a child of `parent`."""
    with contextlib.suppress(psutil.Error):
        process = psutil.Process(pid)
        if process.ppid() == parent:
            end_children(pid)
            process.kill()


def end_children(pid: int | None = None) -> None:
    """Kill what a process (this one) has started, and what that has started; no zombies of ours are left."""
    with contextlib.suppress(psutil.Error):
        children = psutil.Process(pid or os.getpid()).children(recursive=True)
        for child in children:
            with contextlib.suppress(psutil.Error):
                child.kill()
        psutil.wait_procs(children, timeout=GONE_S)


def end_pool(pool: Any) -> None:
    """End the children of a prefork pool: first by a signal that lets handlers clean up, soon by one that does not."""
    children = []
    for child in list(pool._pool._pool) if pool._pool is not None else []:
        with contextlib.suppress(psutil.NoSuchProcess):
            children.append(psutil.Process(child.pid))
    for signal_name, patience_s in (("terminate", CHILD_PATIENCE_S), ("kill", 1.0)):
        for process in children:
            with contextlib.suppress(psutil.NoSuchProcess):
                getattr(process, signal_name)()
        _, children = psutil.wait_procs(children, timeout=patience_s)
