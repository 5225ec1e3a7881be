"""The checker is tested by a product that is broken on purpose: each variant is caught, by the promise that it breaks.

The variants are in `driver/app/broken.py`. The product as it is passes the same runs: `test_chaos.py`.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from tests.chaos.driver.run import chaos_with
from tests.chaos.driver.schedule import Entry, Plan
from tests.services import TestServices

pytestmark = pytest.mark.timeout(300)

TWO_WORKERS = (("prefork", 2), ("threads", 2))
DOUBLES = Entry(kind="doubles", number=8, every_s=1.0)
FREEZE = Entry(kind="freezes", number=1, every_s=1.0)

#: Variant -> the run in which it shows, and the invariants that must find it.
CAUGHT: dict[str, tuple[Plan, set[str]]] = {
    "acknowledge_before_record": (
        Plan(jobs=100, workers=TWO_WORKERS),
        {"recorded_before_acknowledged"},
    ),
    "forward_before_record": (
        Plan(jobs=100, workers=TWO_WORKERS),
        {"forwarded_when_durable"},
    ),
    "claim_without_compare": (
        Plan(jobs=6, workers=TWO_WORKERS, faults=(DOUBLES,), pause_s=2.0),
        {"one_at_a_time", "nothing_runs_again_without_reason"},
    ),
    "lease_without_renewal": (
        Plan(jobs=4, workers=TWO_WORKERS, pause_s=16.0),
        {"one_at_a_time", "only_faults_lose_attempts"},
    ),
    "late_outputs_overwrite": (
        Plan(jobs=30, workers=TWO_WORKERS, faults=(FREEZE,), pause_s=0.5),
        {"what_is_recorded_was_done"},
    ),
}


@pytest.mark.parametrize("variant", CAUGHT)
def test_a_broken_variant_is_caught(variant: str, tmp_path: Path, services: TestServices) -> None:
    """Given the product with one promise undone, when it runs, then the invariant of that promise is broken."""
    plan, invariants = CAUGHT[variant]
    own = replace(services, amqp_url=services.new_vhost())
    result = chaos_with(replace(plan, variant=variant), tmp_path / "project", own, print, rest_s=30.0)

    print(result.text)
    found = {name for name, broken in result.proof.breaches.items() if broken}
    assert invariants <= found
