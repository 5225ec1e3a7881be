"""Which queues a worker consumes, and how much of each it reserves, when there are more than it could consume at once.

RabbitMQ counts the prefetch of a quorum queue for each consumer. A worker of three hundred partitions would reserve
three hundred times its slots, while others are idle. So it may reserve `bound` messages, whatever the number of queues:

    few queues      all are consumed all the time, each up to `share`
    more            those with work share the bound by their work; some of it is kept for quiet ones, so that what comes
                    there is delivered at once
    more than that  those with work take turns of SLICE_S; who was served longest ago comes first

Pure: the time, the work and what is reserved now are given. Used by `follow.py`.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

#: A queue is consumed for at least so long before another takes its turn, or before its prefetch is changed.
SLICE_S = 1.0
#: A worker may reserve this much, however few slots it has.
LEAST_BOUND = 16
#: This part of the bound is kept for queues without work, if there are so many.
QUIET_PART = 4


@dataclass(frozen=True, kw_only=True)
class Reserved:
    """What the worker consumes and holds un-acknowledged now."""

    #: Queue -> prefetch of its consumer.
    consumed: Mapping[str, int] = field(default_factory=dict)
    #: Queue -> un-acknowledged messages that came by its consumer.
    unacked: Mapping[str, int] = field(default_factory=dict)
    #: Un-acknowledged messages that came by consumers that are cancelled.
    elsewhere: int = 0


class Rotation:
    """One worker's turns. `share` is its prefetch for one queue: its slots, times Celery's multiplier."""

    def __init__(self, share: int) -> None:
        self.share = share
        self.bound = max(2 * share, LEAST_BOUND)
        #: Queue -> when its consumer began, or was changed.
        self._since: dict[str, float] = {}
        #: Queue -> when its consumer ended.
        self._served: dict[str, float] = {}

    def is_tight(self, queues: int) -> bool:
        """Whether so many queues are more than can be consumed at once as one alone would be."""
        return queues * self.share > self.bound

    def plan(
        self, now: float, wanted: Collection[str], work: Mapping[str, int] | None, reserved: Reserved
    ) -> dict[str, int]:
        """Queue -> prefetch of those to consume from now on. What is left out, or has another prefetch, is cancelled.

        `work` has the open messages of queues, counted up to `share`; None if nobody knows.
        """
        if not self.is_tight(len(wanted)):
            chosen = dict.fromkeys(wanted, self.share)
        else:
            demand = {queue: min(self.share, 1 if work is None else work.get(queue, 0)) for queue in wanted}
            chosen = self._shares(self._order(now, demand, reserved), demand)
        planned = self._within_bound(now, chosen, reserved)
        self._note(now, planned, reserved, wanted)
        return planned

    def _order(self, now: float, demand: Mapping[str, int], reserved: Reserved) -> list[str]:
        """Queues by their right to be consumed: with work first, among them whose turn it is or comes next."""

        def rank(queue: str) -> tuple[int, float, str]:
            is_consumed = queue in reserved.consumed
            begun = self._since.get(queue, now)
            if not demand[queue]:
                # Quiet ones that are consumed go on being so: there is no reason for a change.
                return (3, 0.0, queue) if is_consumed else (4, self._served.get(queue, 0.0), queue)
            if is_consumed:
                # Of those whose time is over, the ones that had least of it stay if there is room.
                return (0 if now - begun < SLICE_S else 2, -begun, queue)
            return 1, self._served.get(queue, 0.0), queue

        return sorted(demand, key=rank)

    def _shares(self, order: list[str], demand: Mapping[str, int]) -> dict[str, int]:
        """One for each with work; then more by their work; what is kept for quiet ones; then still more."""
        busy = [queue for queue in order if demand[queue]]
        quiet = [queue for queue in order if not demand[queue]]
        kept = min(len(quiet), self.bound // QUIET_PART)
        shares = dict.fromkeys(busy[: self.bound - kept], 1)
        left = _give(shares, demand, self.bound - kept - len(shares)) + kept
        for queue in quiet[:left]:
            shares[queue] = 1
        _give(shares, demand, max(0, left - len(quiet)))
        return shares

    def _within_bound(self, now: float, chosen: Mapping[str, int], reserved: Reserved) -> dict[str, int]:
        """As much of it as fits now: what was delivered counts until it is acknowledged."""
        left = self.bound - reserved.elsewhere - sum(reserved.unacked.values())
        planned: dict[str, int] = {}
        changes: dict[str, int] = {}
        for queue, prefetch in chosen.items():
            current = reserved.consumed.get(queue)
            if current is not None and self._stays(now, queue, current, prefetch, len(chosen)):
                planned[queue] = current
                left -= current - reserved.unacked.get(queue, 0)
            else:
                changes[queue] = prefetch
        for queue, prefetch in changes.items():
            fitting = min(prefetch, left)
            if fitting > 0:
                planned[queue] = fitting
                left -= fitting
            elif (current := reserved.consumed.get(queue, 0)) and current - reserved.unacked.get(queue, 0) <= left:
                planned[queue] = current
                left -= current - reserved.unacked.get(queue, 0)
        return planned

    def _stays(self, now: float, queue: str, current: int, prefetch: int, queues: int) -> bool:
        """Whether a consumer is left as it is: changing one costs a few round trips, and is not worth a little."""
        if current == prefetch:
            return True
        if now - self._since.get(queue, now) < SLICE_S:
            return True
        # A little more or less than its share; but where all have theirs, nobody keeps too much.
        return self.is_tight(queues) and current < prefetch < 2 * current

    def _note(self, now: float, planned: Mapping[str, int], reserved: Reserved, wanted: Collection[str]) -> None:
        for queue in reserved.consumed.keys() - planned.keys():
            self._served[queue] = now
            self._since.pop(queue, None)
        for queue, prefetch in planned.items():
            if reserved.consumed.get(queue) != prefetch:
                self._since[queue] = now
        for queue in self._served.keys() - set(wanted):
            del self._served[queue]


def _give(shares: dict[str, int], demand: Mapping[str, int], left: int) -> int:
    """Add to the shares evenly, up to the demand of each; returns what is left."""
    while left > 0:
        hungry = [queue for queue, share in shares.items() if share < demand[queue]]
        if not hungry:
            break
        for queue in hungry[:left]:
            shares[queue] += 1
            left -= 1
    return left
