"""The connection of a process that uses the package from Python: made at first use, one for each process."""

from __future__ import annotations

import os
import threading

from pipeline_app.application import client_runtime
from pipeline_app.runtime import Runtime

_lock = threading.Lock()
#: By process id: what is connected must not be used in a forked child.
_runtimes: dict[int, Runtime] = {}


def connected() -> Runtime:
    """This process's runtime, at the addresses of the settings."""
    with _lock:
        rt = _runtimes.get(os.getpid())
        if rt is None:
            rt = _runtimes[os.getpid()] = client_runtime()
        return rt
