"""How a process ended, in words and as data: the evidence that is kept for a job whose process died under it.

Used where a job runs alone (`flow/alone.py`), for a pool's lost children (`worker/janitor.py`) and by the sweep.
"""

from __future__ import annotations

import re
import signal
from dataclasses import dataclass
from typing import Any

from pipeline_app.domain.outcome import ErrorRecord

#: The type of such an error in the ledger, like the name of an exception.
WORKER_LOST = "WorkerLost"

#: How billiard writes what became of a child.
_STATUS = re.compile(r"\b(signal|exitcode) (\d+)")


@dataclass(frozen=True)
class End:
    """The end of a process, one of the two."""

    signal: int | None = None
    exit_code: int | None = None

    @classmethod
    def of_code(cls, code: int) -> End:
        """From a return code, where a negative one stands for a signal."""
        return cls(signal=-code) if code < 0 else cls(exit_code=code)

    @classmethod
    def of_text(cls, text: str) -> End:
        """From what the pool says of a lost child, such as `signal 9 (SIGKILL)`; unknown if it says nothing."""
        found = _STATUS.search(text)
        if found is None:
            return cls()
        number = int(found[2])
        return cls(signal=number) if found[1] == "signal" else cls(exit_code=number)

    @property
    def signal_name(self) -> str | None:
        """Such as `SIGKILL`."""
        try:
            return None if self.signal is None else signal.Signals(self.signal).name
        except ValueError:  # real-time signals have no names
            return None

    def __str__(self) -> str:
        if self.signal is not None:
            return f"was killed by signal {self.signal}" + (f" ({self.signal_name})" if self.signal_name else "")
        return "ended" if self.exit_code is None else f"ended with exit code {self.exit_code}"

    def as_dict(self) -> dict[str, Any]:
        """For documents and JSON."""
        return {"signal": self.signal, "signal_name": self.signal_name, "exit_code": self.exit_code}


def worker_lost(message: str, *, type: str = WORKER_LOST, traceback: str = "", **evidence: Any) -> ErrorRecord:
    """The error of an attempt that was lost with its process."""
    return ErrorRecord(type=type, message=message, traceback=traceback, evidence=evidence)
