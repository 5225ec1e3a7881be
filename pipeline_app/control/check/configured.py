"""Mistakes that can be seen in the settings alone."""

from __future__ import annotations

import ipaddress
from collections.abc import Iterator
from typing import Any
from urllib.parse import urlsplit

from pipeline_app.control.check.finding import Severity, Subject, Trouble

#: Result backends that forget by themselves what is older than `result_expires`.
_FORGETFUL = ("redis", "rediss", "sentinel", "rpc", "cache", "memcached", "memory", "dynamodb")


def guest(subject: Subject) -> Iterator[Trouble]:
    """RabbitMQ's user of the factory, at a broker on another machine."""
    for address in subject.rt.settings.amqp_url.split(";"):
        parts = urlsplit(address.strip())
        if not parts.scheme.startswith("amqp") or _is_local(parts.hostname or "localhost"):
            continue
        if (parts.username or "guest") == "guest":
            yield Trouble(
                what=f"AMQP_URL logs in at {parts.hostname} as guest, whose password everybody knows",
                hint="make a user of your own: docs/security.md has the commands",
                severity=Severity.ERROR,
            )


def _is_local(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def default_queue(subject: Subject) -> Iterator[Trouble]:
    """Celery's default queue on one node of a cluster: while that is away, no worker gets past declaring it."""
    conf = subject.rt.app.conf
    own = [queue for queue in conf.task_queues or () if queue.name == conf.task_default_queue]
    if ";" not in subject.rt.settings.amqp_url or not own or _is_quorum(own[0].queue_arguments):
        return
    yield Trouble(
        what=f"the queue {conf.task_default_queue} of tasks that are no stages goes away with one node of the cluster",
        hint='set task_default_queue_type = "quorum" in celeryconfig.py, and delete the queue if it is there',
    )


def _is_quorum(arguments: dict[str, Any] | None) -> bool:
    return (arguments or {}).get("x-queue-type") == "quorum"


def result_backend(subject: Subject) -> Iterator[Trouble]:
    """Results of the user's own tasks in a place that nobody empties; stages store none there."""
    conf = subject.rt.app.conf
    backend = str(conf.result_backend or "disabled")
    kind = backend.partition("://")[0].partition("+")[0]
    if kind.startswith("disabled"):
        return
    if not conf.result_expires:
        yield Trouble(
            what=f"the result backend ({kind}) keeps every result for ever: result_expires is not set",
            hint="set result_expires in celeryconfig.py, or leave result_backend out: the store has what stages made",
        )
    elif kind not in _FORGETFUL:
        yield Trouble(
            what=f"the result backend ({kind}) is emptied by celery beat only",
            hint="run one `celery -A pipeline_app beat`, or leave result_backend out: the store has what stages made",
        )
