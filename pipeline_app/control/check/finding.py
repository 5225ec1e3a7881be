"""What a check finds, and what it may look at."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from enum import StrEnum
from functools import cached_property
from typing import Any

from pipeline_app.errors import BrokerError
from pipeline_app.runtime import Runtime
from pipeline_app.store import partitions, workers
from pipeline_app.store.client import Document
from pipeline_app.transport.management import Management


class Severity(StrEnum):
    """How bad it is."""

    #: Work is lost, stands still or is done in vain.
    ERROR = "error"
    #: It may come to that.
    WARNING = "warning"
    OK = "ok"
    #: It could not be asked.
    UNKNOWN = "unknown"


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One line of the answer."""

    #: Name of the check.
    check: str
    severity: Severity
    what: str
    #: What to do about it.
    hint: str | None = None


@dataclass(frozen=True, kw_only=True)
class Trouble:
    """What a check found to be wrong, or could not ask."""

    what: str
    hint: str | None = None
    severity: Severity = Severity.WARNING


class Subject:
    """What is checked; what several checks ask is asked once."""

    def __init__(self, rt: Runtime, consumer_timeout_s: Callable[[], float | None]) -> None:
        self.rt = rt
        #: RabbitMQ's own consumer timeout, where there is a way to ask for it; None if nobody knows.
        self.consumer_timeout_s = consumer_timeout_s
        self._answer: list[dict[str, Any]] | BrokerError | None = None

    @cached_property
    def queues(self) -> list[str]:
        """Every queue that a stage has."""
        return partitions.queues(self.rt.store)

    @cached_property
    def workers(self) -> list[Document]:
        """Workers with a lease."""
        return workers.alive(self.rt.store)

    def policies(self) -> dict[str, dict[str, Any]]:
        """Our queues that are there -> what policies and arguments say of each. Raises BrokerError."""
        if self._answer is None:
            try:
                self._answer = Management(self.rt.settings.amqp_url, self.rt.settings.management_url).queues()
            except BrokerError as exc:
                self._answer = exc
        if isinstance(self._answer, BrokerError):
            raise self._answer
        ours = set(self.queues)
        return {row["name"]: _limits(row) for row in self._answer if row["name"] in ours}


def _limits(queue: dict[str, Any]) -> dict[str, Any]:
    """A queue's limits by their names in policies; an argument `x-delivery-limit` is the limit `delivery-limit`."""
    arguments = {name.removeprefix("x-"): value for name, value in (queue.get("arguments") or {}).items()}
    return {**arguments, **(queue.get("effective_policy_definition") or {}), "type": queue.get("type", "classic")}


def some(names: Iterable[str]) -> str:
    """The first few of them."""
    known = sorted(names)
    more = f" and {len(known) - 3} more" if len(known) > 3 else ""
    return ", ".join(known[:3]) + more


#: Yields what is wrong; nothing if all is well.
Look = Callable[[Subject], Iterator[Trouble]]
