"""Which queues a worker consumes when there are more than it could consume at once."""

from __future__ import annotations

from collections.abc import Mapping

import pytest

from pipeline_app.worker.rotation import LEAST_BOUND, SLICE_S, Reserved, Rotation


class Broker:
    """Queues with messages, and one worker that follows a rotation; every queue's consumer has its own prefetch."""

    def __init__(self, share: int, queues: int, messages: Mapping[str, int]) -> None:
        self.rotation = Rotation(share)
        self.wanted = [f"q{n:03d}" for n in range(queues)]
        self.messages = dict(messages)
        self.consumed: dict[str, int] = {}
        self.unacked: dict[str, int] = {}
        self.elsewhere = 0
        self.now = 100.0
        #: Queue -> when a message of it was delivered first.
        self.delivered: dict[str, float] = {}
        self.most = 0
        self.changes = 0

    def step(self, *, knows: bool = True, seconds: float = 0.2) -> dict[str, int]:
        """One look, and what the broker delivers upon it."""
        work = {queue: min(number, self.rotation.share) for queue, number in self.messages.items() if number}
        reserved = Reserved(consumed=self.consumed, unacked=self.unacked, elsewhere=self.elsewhere)
        plan = self.rotation.plan(self.now, self.wanted, work if knows else None, reserved)
        for queue, prefetch in list(self.consumed.items()):
            if plan.get(queue) != prefetch:
                self.elsewhere += self.unacked.pop(queue, 0)
                self.changes += 1
        self.consumed = plan
        for queue, prefetch in plan.items():
            room = prefetch - self.unacked.get(queue, 0)
            taken = min(room, self.messages.get(queue, 0))
            if taken > 0:
                self.messages[queue] -= taken
                self.unacked[queue] = self.unacked.get(queue, 0) + taken
                self.delivered.setdefault(queue, self.now)
        self.most = max(self.most, sum(self.unacked.values()) + self.elsewhere)
        self.now += seconds
        return plan

    def acknowledge(self, number: int) -> None:
        """So many handlers end, those of consumers that are gone first."""
        for _ in range(number):
            if self.elsewhere:
                self.elsewhere -= 1
            elif busy := [queue for queue, held in self.unacked.items() if held]:
                self.unacked[busy[0]] -= 1


def test_few_queues_are_all_consumed() -> None:
    """Given few queues, then each is consumed as if it were the only one, whatever is in it."""
    broker = Broker(share=2, queues=8, messages={})
    assert broker.step(knows=False) == dict.fromkeys(broker.wanted, 2)
    broker.messages = {"q000": 100}
    assert broker.step() == dict.fromkeys(broker.wanted, 2)
    assert broker.changes == 0


def test_more_queues_share_by_their_work() -> None:
    """Given more queues, then one with work has what its slots need, and quiet ones are consumed all the same."""
    broker = Broker(share=8, queues=6, messages={"q003": 1000})
    for _ in range(20):
        plan = broker.step()
        broker.acknowledge(4)
    assert plan.keys() == set(broker.wanted)
    assert plan["q003"] >= 8
    assert broker.most <= broker.rotation.bound == 16


@pytest.mark.parametrize("share", [1, 2, 8, 50])
def test_never_more_than_the_bound(share: int) -> None:
    """Given hundreds of queues full of messages, then never more than the bound is un-acknowledged, and all come."""
    broker = Broker(share=share, queues=300, messages={f"q{n:03d}": 3 for n in range(300)})
    for _ in range(3000):
        broker.step()
        broker.acknowledge(7)
        if not any(broker.messages.values()):
            break
    assert not any(broker.messages.values())
    assert broker.most <= broker.rotation.bound == max(2 * share, LEAST_BOUND)


def test_who_was_served_longest_ago_comes_first() -> None:
    """Given hundreds of queues with endless work, then every one has its turn before any has a third."""
    broker = Broker(share=2, queues=300, messages=dict.fromkeys((f"q{n:03d}" for n in range(300)), 10**6))
    turns = 0
    while len(broker.delivered) < 300:
        broker.step()
        broker.acknowledge(100)
        turns += 1
        assert turns < 3 * (300 / LEAST_BOUND) * (SLICE_S / 0.2)


def test_a_quiet_queue_among_busy_ones() -> None:
    """Given busy queues, when a message comes to one that was quiet, then that is consumed in the next slice."""
    broker = Broker(share=2, queues=300, messages=dict.fromkeys((f"q{n:03d}" for n in range(200)), 10**6))
    while len(broker.delivered) < 200:
        broker.step()
        broker.acknowledge(10)
    began = broker.now
    broker.messages["q299"] = 1
    while "q299" not in broker.delivered:
        broker.step()
        broker.acknowledge(10)
    assert broker.delivered["q299"] - began <= SLICE_S + 0.2


def test_slow_handlers_are_not_given_more() -> None:
    """Given handlers that do not end, then no consumer is added, however much work there is."""
    broker = Broker(share=2, queues=300, messages=dict.fromkeys((f"q{n:03d}" for n in range(300)), 10))
    for _ in range(100):
        broker.step()
    assert broker.most <= broker.rotation.bound
    assert len(broker.delivered) <= broker.rotation.bound


def test_one_queue_alone_has_all_slots() -> None:
    """Given hundreds of queues of which one has work, then it has what its slots need."""
    broker = Broker(share=8, queues=300, messages={"q123": 10**6})
    for _ in range(30):
        plan = broker.step()
        broker.acknowledge(8)
    assert plan["q123"] == 8


def test_nothing_is_changed_without_need() -> None:
    """Given steady work in some queues, then their consumers stay as they are."""
    broker = Broker(share=8, queues=12, messages=dict.fromkeys(["q001", "q002"], 10**6))
    for _ in range(20):
        broker.step()
        broker.acknowledge(8)
    before = broker.changes
    for _ in range(50):
        broker.step()
        broker.acknowledge(8)
    assert broker.changes == before


def test_nobody_knows_where_work_is() -> None:
    """Given that the store was not asked yet, then queues take turns all the same."""
    broker = Broker(share=2, queues=100, messages={"q099": 1})
    for _ in range(200):
        broker.step(knows=False)
    assert "q099" in broker.delivered
