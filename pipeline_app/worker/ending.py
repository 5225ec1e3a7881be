"""Ends processes with all that they started."""

from __future__ import annotations

import contextlib
import os

import psutil

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
