"""What the driver did: which faults, to whom, when. Part of the witness: the checker excuses nothing else."""

from __future__ import annotations

import json
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any


class Journal:
    """Appends a line for everything that is done to the run; safe to share between threads."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("a")
        self._lock = threading.Lock()
        self.counts: Counter[str] = Counter()

    def write(self, what: str, **more: Any) -> None:
        """Note that this happens now."""
        line = {"what": what, "at": time.time(), "mono": time.monotonic(), **more}
        with self._lock:
            self.counts[what] += 1
            self._file.write(json.dumps(line) + "\n")
            self._file.flush()

    def close(self) -> None:
        """Nothing more is done."""
        self._file.close()
