"""Messages whose handlers run long are acknowledged before these have ended, and nothing is reserved behind them.

RabbitMQ closes the channel of a consumer that keeps a message un-acknowledged for longer than its `consumer_timeout`
(half an hour by default), with all that came by it. Once a message is not open in the store any more, its hint is of no
use: whoever got it again would drop it, and the claim, covered by the lease, is what keeps the work safe. So from then
on it may be acknowledged at any time; it is done after a while only because most handlers are faster than that.

The event loop looks at what runs (`look`), a thread asks the store (`ask`), and the next look acknowledges.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable
from typing import Any
from weakref import WeakKeyDictionary

from pipeline_app.domain.states import MessageState
from pipeline_app.flow.consume import StageRequest
from pipeline_app.store import messages
from pipeline_app.store.client import Store

logger = logging.getLogger(__name__)


class Early:
    """Which of a worker's messages have been with it for longer than `after_s`."""

    def __init__(self, after_s: float) -> None:
        self.after_s = after_s
        self._candidates: tuple[Any, ...] = ()
        #: Ids of candidates that are not open any more.
        self._settled: frozenset[str] = frozenset()
        #: Request that waits for a slot -> since when.
        self._waiting: WeakKeyDictionary[Any, float] = WeakKeyDictionary()

    def look(self, active: Iterable[Any]) -> int:
        """Acknowledge what the store has said may be; returns how many handlers run long. For the event loop."""
        now = time.time()
        long = [r for r in active if r.time_start is not None and now - r.time_start >= self.after_s]
        for request in self._candidates:
            if request.id in self._settled and not request.acknowledged:
                logger.info("acknowledged while its handler runs: message=%s task=%s", request.id, request.name)
                request.acknowledge()
        self._candidates = tuple(r for r in long if isinstance(r, StageRequest) and not r.acknowledged)
        return len(long)

    def ask(self, store: Store) -> None:
        """Ask which candidates are not open any more. For a thread. Raises StoreError."""
        ids = [request.id for request in self._candidates]
        if ids:
            unsettled = (MessageState.OPEN, MessageState.DRAFT)
            found = messages.states(store, ids)
            self._settled = frozenset(id_ for id_ in ids if found.get(id_) not in unsettled)

    def stale(self, waiting: Iterable[Any]) -> list[Any]:
        """Those that have waited for a slot as long. For the event loop, at each look."""
        now = time.monotonic()
        return [request for request in waiting if now - self._waiting.setdefault(request, now) >= self.after_s]
