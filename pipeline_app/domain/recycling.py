"""The limits at which a worker begins anew, and how people write them: `--max-jobs`, `--max-age`, `--max-memory`.

`celery worker` takes them as options; the commands of `stage` take the same, for the workers that they start.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

from pipeline_app.domain.durations import seconds
from pipeline_app.errors import UsageError

#: How often a worker looks at them.
LOOK_S = 1.0

_SIZES = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


@dataclass(frozen=True, kw_only=True)
class Limit:
    """One of them."""

    #: As click calls it, `max_jobs`.
    name: str
    metavar: str
    help: str
    #: Raises UsageError or ValueError for what it cannot read.
    read: Callable[[str], float]

    @property
    def option(self) -> str:
        """`--max-jobs`."""
        return f"--{self.name.replace('_', '-')}"


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise UsageError(f"not a number of jobs: {text!r}")
    return int(text)


def _age(text: str) -> float:
    found = seconds(text)
    if found < LOOK_S:
        raise UsageError(f"an age is at least {LOOK_S:g} s, not {text!r}")
    return found


def size(text: str) -> int:
    """Bytes in `512MB`, `1.5GiB` or a number of bytes. Raises UsageError."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMG]I?B|)", text.strip().upper())
    if found is None or float(found[1]) == 0:
        raise UsageError(f"not a size: {text!r}; write 512MB, 2GB or 1.5GiB")
    return int(float(found[1]) * _SIZES[found[2]])


LIMITS = (
    Limit(
        name="max_jobs",
        metavar="NUMBER",
        help="Begin anew after so many jobs, in all processes of the worker.",
        read=_count,
    ),
    Limit(
        name="max_age",
        metavar="DURATION",
        help="Begin anew after so long, such as 1h; up to a tenth earlier.",
        read=_age,
    ),
    Limit(
        name="max_memory",
        metavar="SIZE",
        help="Begin anew beyond this, such as 512MB, with all its processes.",
        read=size,
    ),
)
