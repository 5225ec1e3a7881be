"""The lock and the JSON files of `.pipeline/`. Called by services.py, workers.py and the modules of each service."""

from __future__ import annotations

import fcntl
import json
import os
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

from pipeline_app.errors import RefusedError, UsageError
from pipeline_app.local.processes import CancelledError

#: How long somebody else's `up` or `down` is waited for.
LOCK_WAIT_S = 120.0


def make_state_dir(folder: Path) -> None:
    """Make `.pipeline/`, which no version control should keep."""
    try:
        (folder / "logs").mkdir(parents=True, exist_ok=True)
        (folder / ".gitignore").write_text("*\n")
    except OSError as exc:
        raise UsageError(f"cannot write to {folder}: {exc.strerror}", hint="call it in a folder of your own") from exc


def read_json(path: Path) -> dict[str, Any]:
    """The object in the file; empty if there is no such file or it is damaged."""
    try:
        found = json.loads(path.read_text())
    except (FileNotFoundError, ValueError):
        return {}
    return cast(dict[str, Any], found) if isinstance(found, dict) else {}


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Replace the file in one move: a reader sees the old one or the new one."""
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=path.name, suffix=".tmp")
    try:
        with os.fdopen(descriptor, "w") as file:
            json.dump(content, file, indent=2)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


@contextmanager
def lock(path: Path, *, cancelled: threading.Event | None = None) -> Iterator[None]:
    """Keep every other process and thread out of this folder's services (or workers) meanwhile.

    The kernel lets go of the lock when its process ends, however it ends.

    Raises RefusedError if another one keeps it for too long, CancelledError if told to give up.
    """
    give_up = cancelled or threading.Event()
    deadline = time.monotonic() + LOCK_WAIT_S
    with path.open("w") as file:
        while not _locked(file.fileno()):
            if give_up.wait(0.05):
                raise CancelledError
            if time.monotonic() > deadline:
                raise RefusedError(f"another command has been at work on {path.parent} for {LOCK_WAIT_S:.0f} seconds")
        yield


def _locked(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
