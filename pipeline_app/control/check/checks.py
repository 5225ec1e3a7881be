"""All checks, in the order in which people read them. Asked by `pipeline-app check`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from pipeline_app.control.check import configured, mongodb, rabbitmq, work
from pipeline_app.control.check.finding import Finding, Look, Severity, Subject, Trouble
from pipeline_app.errors import PipelineError, UnreachableError
from pipeline_app.runtime import Runtime
from pipeline_app.transport.depth import depths
from pipeline_app.transport.topology import PARKED_EXCHANGE

STORE, BROKER = "MongoDB", "RabbitMQ"
BOTH = (STORE, BROKER)


@dataclass(frozen=True)
class Check:
    """One question, and what has to answer for it."""

    look: Look
    #: What is said if all is well.
    fine: str
    needs: tuple[str, ...] = ()
    #: Whether it makes no sense on the embedded broker.
    rabbitmq_only: bool = False

    @property
    def name(self) -> str:
        """How people call it."""
        return self.look.__name__


CHECKS = (
    Check(configured.guest, "AMQP_URL has a user of its own, or a broker on this machine"),
    Check(configured.default_queue, "it does not go away with one node", rabbitmq_only=True),
    Check(configured.result_backend, "no result backend fills up"),
    Check(mongodb.indexes, "every index is there", needs=(STORE,)),
    Check(mongodb.oplog, "members may be away for a day", needs=(STORE,)),
    Check(mongodb.snapshot_window, "a verification may take five minutes", needs=(STORE,)),
    Check(mongodb.clocks, "no clock differs by more than a second", needs=(STORE,)),
    Check(rabbitmq.declarations, "queues and exchanges are declared as ours", needs=BOTH, rabbitmq_only=True),
    Check(rabbitmq.consumer_timeout, "messages are acknowledged before it", needs=(STORE,), rabbitmq_only=True),
    Check(rabbitmq.mirrored_queues, "no classic queue is mirrored", needs=BOTH, rabbitmq_only=True),
    Check(rabbitmq.dropping_policies, "no policy drops messages", needs=BOTH, rabbitmq_only=True),
    Check(rabbitmq.delivery_limit, "no queue gives up on messages", needs=BOTH, rabbitmq_only=True),
    Check(work.definitions, "workers and runs have the definitions of this project", needs=(STORE,)),
    Check(work.versions, "all workers are of this version", needs=(STORE,)),
    Check(work.unconsumed, "every queue with work is consumed", needs=BOTH, rabbitmq_only=True),
    Check(work.parked, "nothing was put aside", needs=BOTH, rabbitmq_only=True),
)


def check(rt: Runtime, *, consumer_timeout_s: Callable[[], float | None] = lambda: None) -> list[Finding]:
    """What all checks find. A service that does not answer is an error, and what needs it is unknown."""
    subject = Subject(rt, consumer_timeout_s)
    services = {
        STORE: _reach("mongodb", rt.store.synchronise),
        # Not the publisher's ping: that declares what is missing.
        BROKER: _reach("rabbitmq", lambda: depths(rt.settings.amqp_url, [PARKED_EXCHANGE.name])),
    }
    away = {name for name, found in services.items() if found.severity is not Severity.OK}
    findings = list(services.values())
    for one in CHECKS:
        if not (one.rabbitmq_only and rt.settings.broker_is_embedded):
            findings += _findings(one, subject, away)
    return findings


def _reach(name: str, ask: Callable[[], object]) -> Finding:
    try:
        ask()
    except PipelineError as exc:
        return Finding(check=name, severity=Severity.ERROR, what=exc.message, hint=exc.hint)
    return Finding(check=name, severity=Severity.OK, what="answers")


def _findings(one: Check, subject: Subject, away: set[str]) -> Iterator[Finding]:
    silent = [name for name in one.needs if name in away]
    if silent:
        yield Finding(check=one.name, severity=Severity.UNKNOWN, what=f"{' and '.join(silent)} must answer first")
        return
    troubles: list[Trouble] = []
    try:
        troubles.extend(one.look(subject))
    except UnreachableError as exc:
        troubles.append(Trouble(what=exc.message, hint=exc.hint, severity=Severity.UNKNOWN))
    for trouble in troubles:
        yield Finding(check=one.name, severity=trouble.severity, what=trouble.what, hint=trouble.hint)
    if not troubles:
        yield Finding(check=one.name, severity=Severity.OK, what=one.fine)
