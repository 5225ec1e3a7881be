"""What a chaos run says at its end: what was done, what came of it, and what was proved."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Sequence

from tests.chaos.checker import Proof
from tests.chaos.evidence import Evidence, seconds

#: Lines of the journal that tell of no fault.
NO_FAULTS = frozenset(
    {
        "started",
        "seeded",
        "told to stop",
        "thawed",
        "restored",
        "broker back",
        "primary again",
        "store back",
        "publishes taken",
    }
)


def report(evidence: Evidence, proof: Proof, *, took_s: float) -> str:
    """For people."""
    faults = Counter(fault.what for fault in evidence.faults if fault.what not in NO_FAULTS)
    states = Counter(row["state"] for row in evidence.jobs.values())
    outcomes = Counter(row["outcome"] for row in evidence.attempts)
    lines = [
        f"{took_s:.0f} s; injected: " + (_counted(faults) or "nothing"),
        f"per minute: {sum(faults.values()) / took_s * 60:.1f} faults, {len(evidence.jobs) / took_s * 60:,.0f} jobs",
        f"jobs: {_counted(states)}; attempts: {_counted(outcomes)}",
        f"executions that were cut off: {sum(e.how is None for e in evidence.executions.values())}, most losses of one"
        f" job in a stage: {_most_losses(evidence)}",
        f"from the fault until a lost job was in the queue again: {_told(returns(evidence))}",
        f"from the fault until it ran again, behind what was in the queue before: {_told(waits(evidence))}",
        proof.text(),
        "PROVED" if proof.holds else "BROKEN",
    ]
    return "\n".join(lines)


def returns(evidence: Evidence) -> list[float]:
    """For each attempt that was lost with its worker: seconds from the fault until its jobs had a new message."""
    found = []
    for row in evidence.events:
        worker = evidence.worker_of(row["worker"]) if row["event"] in ("lost", "given_back") else None
        faults = [fault for fault in evidence.faults_of.get(worker or "", ()) if fault.at <= seconds(row["at"])]
        if faults:
            found.append(seconds(row["at"]) - faults[-1].at)
    return sorted(found)


def waits(evidence: Evidence) -> list[float]:
    """For each execution that was cut off: seconds from the fault until the next one of its job started."""
    found = []
    for executions in evidence.by_step.values():
        for first, second in itertools.pairwise(executions):
            if first.how is not None:
                continue
            faults = [f for f in evidence.faults_of.get(first.worker, ()) if f.mono >= first.started]
            if faults:
                found.append(second.started - faults[0].mono)
    return sorted(found)


def _most_losses(evidence: Evidence) -> int:
    lost = Counter((row["job"], row["stage"]) for row in evidence.attempts if row["outcome"] == "lost")
    return max(lost.values(), default=0)


def _told(times: Sequence[float]) -> str:
    if not times:
        return "none was"
    middle, late = times[len(times) // 2], times[int(len(times) * 0.95)]
    return f"median {middle:.1f} s, 95 of 100 within {late:.1f} s, at most {times[-1]:.1f} s ({len(times)} times)"


def _counted(counts: Counter[str]) -> str:
    return ", ".join(f"{number:,} {what}" for what, number in sorted(counts.items()))
