"""A short chaos run with some of everything; `make chaos` has the long ones. CHAOS_SEED sets its random numbers."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.chaos.driver.run import chaos
from tests.chaos.driver.schedule import Entry, Plan

SEED = int(os.environ.get("CHAOS_SEED", "1"))

#: Kind of fault -> how many, and how often.
FAULTS = {
    "kills": (4, 6.0),
    "child-kills": (2, 8.0),
    "freezes": (1, 5.0),
    "restarts": (1, 8.0),
    "step-downs": (2, 8.0),
    "cuts": (2, 8.0),
    "refusals": (1, 8.0),
    "doubles": (5, 4.0),
}


@pytest.mark.timeout(600)
def test_a_short_run_with_some_of_everything(tmp_path: Path) -> None:
    """Given a run under way, when workers and services fail in every way, then all that must hold holds."""
    faults = tuple(Entry(kind=kind, number=number, every_s=every_s) for kind, (number, every_s) in FAULTS.items())

    plan = Plan(jobs=600, faults=faults, seed=SEED, workers=(("prefork", 2), ("threads", 3)) * 2)

    result = chaos(plan, tmp_path, print)

    print(result.text)
    assert result.holds
