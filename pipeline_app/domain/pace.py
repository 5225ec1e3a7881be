"""How fast a replay may go: a rate that may grow from a tenth to the whole, and how much of it is due now."""

from __future__ import annotations

from dataclasses import dataclass

#: What was not taken for longer than this is not made up for: the target would see a burst.
BURST_S = 0.5
#: A ramp begins with this part of the rate.
RAMP_FROM = 0.1


@dataclass(frozen=True, kw_only=True)
class Pace:
    """A rate."""

    per_s: float
    #: Seconds in which the rate grows to the whole, evenly.
    ramp_s: float = 0.0

    def at(self, since_s: float) -> float:
        """The rate when it has gone on for so long."""
        if since_s >= self.ramp_s:
            return self.per_s
        return self.per_s * (RAMP_FROM + (1 - RAMP_FROM) * since_s / self.ramp_s)

    def credit(self, left: float, elapsed_s: float, since_s: float) -> float:
        """How many may go now, if `left` were left `elapsed_s` ago; one may always gather, however slow the rate."""
        rate = self.at(since_s)
        return min(left + rate * max(0.0, elapsed_s), max(1.0, rate * BURST_S))
