"""Mistakes in RabbitMQ: queues declared otherwise, and limits that take messages away from us."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from pipeline_app.control.check.finding import Severity, Subject, Trouble, some
from pipeline_app.domain.partition import queue_stage
from pipeline_app.errors import BrokerError
from pipeline_app.transport.declared import declared_otherwise, server_version

#: From this version on a quorum queue gives up on a message after some deliveries, unless it is told otherwise.
DELIVERY_LIMIT_SINCE = 4
#: A limit on deliveries below this is reached by what our workers give back in an ordinary year.
FEW_DELIVERIES = 1000
#: Policies that take messages out of a queue that nobody has handled.
_DROPPING = ("message-ttl", "expires", "max-length", "max-length-bytes")
#: Workers that cannot acknowledge a message while its handler runs.
_LATE_POOLS = ("solo",)


def declarations(subject: Subject) -> Iterator[Trouble]:
    """Queues and exchanges that are there with other arguments than ours: nothing can be published to them."""
    settings = subject.rt.settings
    for name, refusal in declared_otherwise(settings.amqp_url, settings.queue_type, subject.queues).items():
        yield Trouble(
            what=f"{name} was declared otherwise: {refusal.splitlines()[0]}",
            hint="set queue_type to what it is, or delete it: the sweep publishes its messages again",
            severity=Severity.ERROR,
        )


def mirrored_queues(subject: Subject) -> Iterator[Trouble]:
    """Classic queues that are mirrored: RabbitMQ gave that up, and it loses messages when nodes part."""
    found = [name for name, limits in subject.policies().items() if "ha-mode" in limits and limits["type"] == "classic"]
    if found:
        yield Trouble(
            what=f"classic mirrored queues: {some(found)}",
            hint="delete the queues and set queue_type to quorum: the sweep publishes their messages again",
        )


def dropping_policies(subject: Subject) -> Iterator[Trouble]:
    """Policies that throw messages out of our queues; the sweep brings them back, again and again."""
    for limit in _DROPPING:
        found = [name for name, limits in subject.policies().items() if _drops(limits, limit)]
        if found:
            yield Trouble(
                what=f"a policy with {limit} takes messages out of {some(found)}",
                hint="remove it for our queues, or bound runs by: pipeline-app run init --bound N",
            )


def _drops(limits: dict[str, Any], limit: str) -> bool:
    refuses = limit.startswith("max-length") and str(limits.get("overflow", "")).startswith("reject-publish")
    return limit in limits and not refuses


def delivery_limit(subject: Subject) -> Iterator[Trouble]:
    """Quorum queues that give up on a message after some deliveries, though nothing is wrong with it."""
    if subject.rt.settings.queue_type != "quorum":
        return
    limits = {name: row.get("delivery-limit") for name, row in subject.policies().items() if row["type"] == "quorum"}
    low = [name for name, limit in limits.items() if limit is not None and 0 <= limit < FEW_DELIVERIES]
    hint = 'set a policy: rabbitmqctl set_policy pipeline "." \'{"delivery-limit": -1}\' --apply-to quorum_queues'
    if low:
        few = min(limits[name] or 0 for name in low)
        yield Trouble(what=f"messages are parked after {few} deliveries: {some(low)}", hint=hint)
    version = server_version(subject.rt.settings.amqp_url) or "0"
    unset = [name for name, limit in limits.items() if limit is None]
    if unset and gives_up_by_itself(version):
        yield Trouble(what=f"RabbitMQ {version} parks messages after 20 deliveries: {some(unset)}", hint=hint)


def gives_up_by_itself(version: str) -> bool:
    """Whether this version of RabbitMQ has a limit on deliveries where nobody set one."""
    return int(version.partition(".")[0]) >= DELIVERY_LIMIT_SINCE


def consumer_timeout(subject: Subject) -> Iterator[Trouble]:
    """A consumer timeout that ends before messages are acknowledged: they are delivered again and again."""
    timeouts = _timeouts(subject)
    known = {name: limit for name, limit in timeouts.items() if limit is not None}
    after = subject.rt.settings.acknowledge_after_s
    short = {name: limit for name, limit in known.items() if limit <= after}
    if short:
        yield Trouble(
            what=f"the consumer timeout ({min(short.values()):.0f} s) comes before messages are acknowledged, "
            f"{after:.0f} s after they came: {some(list(short))}",
            hint="raise consumer_timeout in rabbitmq.conf, or set PIPELINE_ACKNOWLEDGE_AFTER_S to half of it",
            severity=Severity.ERROR,
        )
    late = _late_stages(subject)
    for stage, limit in late.items():
        first = min((known[name] for name in known.keys() - short.keys() if queue_stage(name) == stage), default=None)
        if first is not None and limit >= first:
            yield Trouble(
                what=f"a solo worker runs {stage}: it cannot acknowledge before the handler ends, which may take "
                f"{'as long as it likes' if limit == float('inf') else f'{limit:.0f} s'}, and the consumer timeout is "
                f"{first:.0f} s",
                hint="use another pool for this stage, or raise consumer_timeout in rabbitmq.conf",
            )
    if len(known) < len(timeouts):
        yield Trouble(
            what="RabbitMQ's own consumer timeout cannot be asked from here (its default is 1800 s)",
            hint="rabbitmqctl eval 'application:get_env(rabbit, consumer_timeout).' shows it, in milliseconds",
            severity=Severity.UNKNOWN,
        )


def _timeouts(subject: Subject) -> dict[str, float | None]:
    """Queue -> its consumer timeout in seconds, None if it is not known: by policy, else the broker's own."""
    timeouts: dict[str, float | None] = dict.fromkeys(subject.queues, subject.consumer_timeout_s())
    with contextlib.suppress(BrokerError):
        for name, limits in subject.policies().items():
            if (limit := limits.get("consumer-timeout")) is not None:
                timeouts[name] = limit / 1000
    return timeouts


def _late_stages(subject: Subject) -> dict[str, float]:
    """Stage that a worker runs which acknowledges late -> its time limit in seconds, endless without one."""
    stages = {name for row in subject.workers if row["pool"] in _LATE_POOLS for name in row["stages"]}
    limits = {f"{p.name}.{s.name}": s.time_limit_s for p in subject.rt.pipelines.values() for s in p.stages}
    return {name: limits.get(name) or float("inf") for name in stages}
