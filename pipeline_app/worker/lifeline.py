"""A worker's lease, kept by a thread of its main process, and what its processes share.

The thread renews the lease for as long as the process lives, however long handlers run, and tells the rest of the
process whether the store answers, which partitions there are, and that flags (a cancelled run) have changed. It stops
the worker when its record asks for that, by the signals that a person on this machine would send. The children of a
prefork pool see no remote control: they read the version and the incarnation from shared memory.

Under gevent the thread is a greenlet like everything else (a thread of the system would share gevent's locks, logging's
first, with a hub that is not its own): a handler that does not yield for LEASE_S costs the worker its lease there.
"""

from __future__ import annotations

import logging
import os
import signal
import threading
import time
from collections.abc import Callable, Sequence
from multiprocessing.sharedctypes import RawArray, RawValue

import psutil

from pipeline_app.errors import StoreError
from pipeline_app.runtime import new_incarnation
from pipeline_app.store import partitions, workers
from pipeline_app.store.client import CALL_TIMEOUT_S, Document, Store

logger = logging.getLogger(__name__)

#: How often the thread looks for what has changed.
TICK_S = 0.5
#: How often it looks for new partitions, and whether the worker is to stop.
PARTITIONS_S = 1.0
#: What is asked for others is given up after this.
ASK_LIMIT_S = 2.0


class Shared:
    """Memory that the main process writes and its children read; made before they are forked."""

    def __init__(self) -> None:
        self._names = [RawArray("c", 128), RawArray("c", 128)]
        self._current = RawValue("i", 0)
        self._version = RawValue("q", -1)
        self._stopping = RawValue("b", 0)
        self._leased_at = RawValue("d", 0.0)
        self.incarnation = new_incarnation()

    @property
    def incarnation(self) -> str:
        """Name of the lease that covers the worker's claims."""
        return bytes(self._names[self._current.value].value).decode()

    @incarnation.setter
    def incarnation(self, name: str) -> None:
        # Into the half that nobody reads, then switch: a child never sees half a name.
        other = 1 - self._current.value
        self._names[other].value = name.encode()
        self._current.value = other

    @property
    def version(self) -> int:
        """Version of the flags that workers keep in memory."""
        return int(self._version.value)

    @version.setter
    def version(self, version: int) -> None:
        self._version.value = version

    @property
    def stopping(self) -> bool:
        """Whether the worker was told to stop: from then on nothing is begun."""
        return bool(self._stopping.value)

    def stop(self) -> None:
        """From now on nothing is begun."""
        self._stopping.value = 1

    @property
    def leased(self) -> bool:
        """Whether the lease can still be valid. It is not in a process that stood still for longer than a lease."""
        return bool(time.monotonic() - self._leased_at.value < workers.LEASE_S)

    def lease_begins(self, asked_at: float) -> None:
        """The lease was renewed when somebody asked for it at that time of the monotonic clock, or later."""
        self._leased_at.value = asked_at


class Lifeline:
    """Keeps a worker registered. `describe` gives the fields of its record that are not the lease's own."""

    def __init__(
        self, url: str, shared: Shared, pipelines: Sequence[str], describe: Callable[[], Document]
    ) -> None:
        self._url = url
        self._shared = shared
        self._pipelines = list(pipelines)
        self._describe = describe
        self._stopped = False
        self._registered = False
        self._running = False
        self._renewed_at = 0.0
        #: Signals that were sent because the record asked for it.
        self._signals = 0
        #: Called each second with the thread's own client, as long as the store answers. May raise StoreError,
        #: which says nothing about the store's health.
        self.each_second: list[Callable[[Store], None]] = []
        #: Whether the store answered lately; while it does not, nothing is consumed.
        self.healthy = False
        #: Partition documents, as they were when the store last answered.
        self.partitions: list[Document] = []

    def start(self) -> None:
        """Register at once if the store answers, and go on in a thread."""
        store = Store(self._url, process="lifeline")
        try:
            store.synchronise()
            self._tick(store, 0)
        except StoreError as exc:
            logger.warning("waiting for the store: %s", exc)
        finally:
            store.close()
        threading.Thread(target=self._run, name="pipeline-lifeline", daemon=True).start()

    def end(self, store: Store) -> None:
        """Say goodbye: no sign of life after this."""
        self._stopped = True
        # Its last renewal must not come after the end.
        deadline = time.monotonic() + CALL_TIMEOUT_S + 1
        while self._running and time.monotonic() < deadline:
            time.sleep(0.02)
        if self._registered:
            workers.end(store, self._shared.incarnation, "stopped")

    def _run(self) -> None:
        # A client of its own: it never waits for a connection that handlers use.
        store = Store(self._url, process="lifeline")
        ticks = 0
        self._running = True
        while not self._stopped:
            try:
                self._tick(store, ticks)
                if not self.healthy:
                    logger.info("the store answers: worker=%s", self._shared.incarnation)
                self.healthy = True
            except StoreError as exc:
                if self.healthy:
                    logger.warning("the store is away, consuming pauses: %s", exc)
                self.healthy = False
            except Exception:
                # Whatever it is, a thread that ends here would cost the worker its lease.
                logger.exception("lifeline")
            ticks += 1
            time.sleep(TICK_S)
        store.close()
        self._running = False

    def _tick(self, store: Store, ticks: int) -> None:
        self._renew_in_time(store)
        self._shared.version = workers.version(store, workers.FLAGS)
        if ticks % round(PARTITIONS_S / TICK_S) == 0:
            self._renew_in_time(store)
            self.partitions = partitions.of_pipelines(store, self._pipelines)
            self._renew_in_time(store)
            self._obey(workers.stop_wanted(store, self._shared.incarnation))
            for call in self.each_second:
                self._renew_in_time(store)
                self._ask(store, call)
        self.healthy = True

    def _renew_in_time(self, store: Store) -> None:
        """Before every question: the lease must not end for the time that others take to be answered."""
        if not self._registered or time.monotonic() - self._renewed_at >= workers.RENEW_S:
            self._renew(store)
            self._renewed_at = time.monotonic()

    def _ask(self, store: Store, call: Callable[[Store], None]) -> None:
        """What others want to know each second. A store that is slow with that is not away."""
        try:
            with store.limited(ASK_LIMIT_S):
                call(store)
        except StoreError as exc:
            logger.info("not known in time: %s", exc)

    def _obey(self, wanted: str | None) -> None:
        """Stop the worker as its record asks. A second signal ends what runs: never send one too many."""
        if wanted is None:
            return
        if self._signals == 0:
            self._signals = 1
            if not self._shared.stopping:
                logger.info("asked to stop (%s): worker=%s", wanted, self._shared.incarnation)
                os.kill(os.getpid(), signal.SIGTERM)
        elif self._signals == 1 and wanted == workers.NOW:
            self._signals = 2
            os.kill(os.getpid(), signal.SIGTERM)

    def _renew(self, store: Store) -> None:
        asked_at = time.monotonic()
        fields: Document = {"rss_bytes": memory_of_tree()}
        if self._shared.stopping:
            fields["state"] = "stop_requested"
        if self._registered and workers.renew(store, self._shared.incarnation, fields):
            self._shared.lease_begins(asked_at)
            return
        if self._registered:
            # What was asked of the old incarnation is meant for the process.
            self._obey(workers.stop_wanted(store, self._shared.incarnation))
            # The sweep gave our work to others: what runs now is refused, what is claimed from here on is ours again.
            # Known to the store before anything is claimed under it.
            name = new_incarnation()
            workers.register(store, name, {**self._describe(), **fields})
            self._shared.incarnation = name
            logger.warning("the lease had ended; new incarnation: worker=%s", name)
        else:
            workers.register(store, self._shared.incarnation, {**self._describe(), **fields})
        self._shared.lease_begins(asked_at)
        self._registered = True


def memory_of_tree() -> int:
    """Resident bytes of this process and its children."""
    me = psutil.Process(os.getpid())
    total = 0
    for process in (me, *me.children(recursive=True)):
        try:
            total += process.memory_info().rss
        except psutil.Error:  # it ended in between
            continue
    return total
