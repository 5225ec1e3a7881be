"""The leader of the sweep after an outage: right after it every lease looks ended, and none is."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta

import pytest

from pipeline_app.application import prepare
from pipeline_app.control.duties import leader
from pipeline_app.control.duties.leader import Duty, Leader
from pipeline_app.runtime import Runtime
from tests.integration.helpers import double, pipeline
from tests.integration.proxy import MongoProxy
from tests.project import Project, eventually

CALM_S = 1.5


@contextmanager
def leading(rt: Runtime, *duties: Duty) -> Iterator[Leader]:
    made = Leader(lambda: rt, "test", duties, 0.05)
    made.start()
    try:
        yield made
    finally:
        made.stop()


class Rounds:
    """Counts the rounds of a duty, and whether one of them that needs calm came too early."""

    def __init__(self) -> None:
        self.hasty = 0
        self.calm = 0

    def at_once(self, rt: Runtime) -> None:
        self.hasty += 1

    def in_calm(self, rt: Runtime) -> None:
        self.calm += 1


def behind(project: Project, proxy: MongoProxy) -> Runtime:
    rt = project.runtime(pipeline(double), mongodb_url=proxy.address(project.mongodb_url))
    prepare(rt)
    return rt


@pytest.mark.parametrize("take_away", [MongoProxy.cut, MongoProxy.freeze], ids=["gone", "silent"])
def test_calm_begins_when_the_store_answers_again(
    project: Project, mongo_proxy: MongoProxy, monkeypatch: pytest.MonkeyPatch, take_away: Callable[[MongoProxy], None]
) -> None:
    """Given an outage longer than the calm that a duty needs, when it ends, then that duty still waits for the calm."""
    monkeypatch.setattr(leader, "SLOW_S", 1.0)
    rounds = Rounds()
    duties = (Duty(do=rounds.at_once), Duty(do=rounds.in_calm, calm_s=CALM_S))
    with leading(behind(project, mongo_proxy), *duties):
        eventually(lambda: rounds.calm >= 2)
        take_away(mongo_proxy)
        threading.Event().wait(CALM_S + 3)  # the outage
        before = rounds.hasty, rounds.calm
        mongo_proxy.restore()
        eventually(lambda: rounds.hasty > before[0] + 1)

        assert rounds.calm <= before[1] + 1, "one may have been under way"
        eventually(lambda: rounds.calm > before[1] + 2)


def test_a_duty_that_waits_for_the_broker(project: Project, caplog: pytest.LogCaptureFixture) -> None:
    """Given a duty that cannot reach the broker, then it is tried less and less often, others go on, and it is said."""
    rt = project.runtime(pipeline(double), amqp_url="amqp://guest:guest@127.0.0.1:1/")
    prepare(rt)
    tried: list[int] = []
    rounds = Rounds()

    def publish(rt: Runtime) -> None:
        tried.append(rounds.hasty)
        rt.publisher.ping()

    with leading(rt, Duty(do=publish), Duty(do=rounds.at_once)):
        eventually(lambda: rounds.hasty >= 60)

    assert 2 <= len(tried) <= 6
    said = [record.message for record in caplog.records if "waits for the broker since" in record.message]
    assert len(said) == 1


def test_who_was_overtaken_does_no_further_duty(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    """Given a duty that took so long that another leads by now, then the duties behind it are that one's."""
    monkeypatch.setattr(leader, "RENEW_S", 0.0)
    rt = project.runtime(pipeline(double))
    prepare(rt)
    rounds = Rounds()

    def long(rt: Runtime) -> None:
        later = rt.store.now() + timedelta(seconds=60)
        rt.store.db.leases.update_one({"_id": "test"}, {"$set": {"holder": "another", "until": later}})

    Leader(lambda: rt, "test", (Duty(do=rounds.at_once), Duty(do=long), Duty(do=rounds.in_calm)), 0.05).round(rt)

    assert (rounds.hasty, rounds.calm) == (1, 0)
