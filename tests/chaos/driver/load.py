"""The jobs of a chaos run: most go through, some fail as handlers do. What must have become of each follows from it."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

RUN = "chaos"
STAGES = ("first", "second", "third")
#: Attempts that every stage allows.
ATTEMPTS = 3


@dataclass(frozen=True, kw_only=True)
class Fate:
    """What must have become of a job."""

    state: str = "terminal"
    #: Kind of the dead letter.
    reason: str | None = None
    #: Where it ends.
    stage: str = STAGES[-1]
    #: Stage -> attempts that fail there, in one generation.
    failures: dict[str, int]


def fate(number: int) -> Fate:
    """Of a hundred jobs one is refused for good, one fails until nobody tries any more, and three fail at first."""
    if number % 100 == 7:
        return Fate(state="dead_lettered", reason="permanent", stage="first", failures={"first": 1})
    if number % 100 == 11:
        return Fate(state="dead_lettered", reason="exhausted", stage="second", failures={"second": ATTEMPTS})
    if number % 33 == 3:
        return Fate(failures={STAGES[number % 3]: 1 + number % 2})
    return Fate(failures={})


def job_line(number: int, pause_s: float, chance: random.Random) -> dict[str, Any]:
    """The job of that number; its handlers take `pause_s` in the mean."""
    expected = fate(number)
    payload = {
        "n": number,
        "pause_s": round(chance.uniform(0.5 * pause_s, 1.5 * pause_s), 3),
        "permanent_in": expected.stage if expected.reason == "permanent" else None,
        "failures": expected.failures,
        "trail": [],
    }
    return {"job_id": str(number), "payload": payload, "tags": {"kind": "ab"[number % 2]}}
