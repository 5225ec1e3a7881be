"""How a worker stops: the same on every pool. Celery's own ways differ from pool to pool, and some of them are broken.

    first signal    Nothing new is begun, and what is reserved goes back to its queue at once. Handlers that run may
                    end: after SIGTERM or SIGINT (Ctrl-C) however long they take, after SIGQUIT for at most
                    `worker_soft_shutdown_timeout`. Then Celery shuts down, with nothing left to wait for.
    second signal,  Whatever it is, and at the end of that time: what runs is given back, children are ended, and the
    time is over    process ends without waiting for its threads, which nobody can stop.

The signal handlers only take a note; all else is done by a thread. So it also works while the main thread runs a
handler (solo) or looks for its broker.
"""

from __future__ import annotations

import logging
import os
import signal
import threading
import time
from collections.abc import Callable
from enum import StrEnum
from types import FrameType
from typing import Any

from billiard.common import REMAP_SIGTERM
from celery import signals
from celery.worker import state as worker_state

from pipeline_app.worker.lifeline import Shared

logger = logging.getLogger(__name__)

#: How often the thread looks whether somebody asked, and whether handlers have ended.
LOOK_S = 0.1
#: A stop at once ends within this, whatever becomes of saying goodbye.
LAST_RESORT_S = 6.0


class How(StrEnum):
    """What running handlers may do after the first signal."""

    #: They end, however long it takes.
    WARM = "Warm"
    #: They have a while.
    COLD = "Cold"


class Stopping:
    """Watches for the signals from when the worker is up. `leave` gives back what is claimed, at once."""

    def __init__(self, shared: Shared, leave: Callable[[], bool]) -> None:
        self._shared = shared
        self._leave = leave
        #: What was asked for, in its order.
        self._asked: list[How] = []
        self._consumer: Any = None
        self._patience_s = 0.0

    def watch(self, consumer: Any) -> None:
        """Replace Celery's signal handlers by ours; in the main thread, after Celery has set its own."""
        self._consumer = consumer
        self._patience_s = float(consumer.app.conf.worker_soft_shutdown_timeout)
        if threading.current_thread() is threading.main_thread():
            for number, how in _signals().items():
                signal.signal(number, self._handler(how))
        threading.Thread(target=self._run, name="pipeline-stopping", daemon=True).start()

    def ask(self, how: How) -> None:
        """Stop; asked for a second time, at once. For signal handlers: it takes no lock and logs nothing."""
        self._shared.stop()
        self._asked.append(how)

    @property
    def is_asked(self) -> bool:
        """Whether somebody asked, from outside."""
        return bool(self._asked)

    def drain(self) -> None:
        """End when what runs has ended. Nobody asked for that from outside: who does meanwhile is the first."""
        self._shared.stop()

    def _handler(self, how: How) -> Callable[[int, FrameType | None], None]:
        def note(number: int, frame: FrameType | None) -> None:  # noqa: ARG001 - the signature is Python's
            self.ask(how)

        return note

    def _run(self) -> None:
        until = float("inf")
        said = done = False
        while True:
            time.sleep(LOOK_S)
            if _celery_stops():  # by a way of its own: SIGHUP, another part of the process
                self.drain()
            if self._asked and not said:
                said = True
                self._say(self._asked[0])
                if self._asked[0] is How.COLD:
                    until = time.monotonic() + self._patience_s
            if len(self._asked) > 1 or time.monotonic() > until:
                self._end()
            if self._shared.stopping and not done and not worker_state.reserved_requests:
                done = True
                # Noticed by Celery's loop, or while it looks for the broker.
                worker_state.should_stop = os.EX_OK
                self._consumer.call_soon(lambda: None)

    def _say(self, how: How) -> None:
        running = len(worker_state.active_requests)
        if how is How.WARM:
            logger.warning("Warm shutdown: %d messages may end; a second signal gives them back", running)
        else:
            logger.warning("Cold shutdown: %d messages may end within %g s", running, self._patience_s)
        signals.worker_shutting_down.send(sender=self._consumer.hostname, sig=None, how=str(how), exitcode=os.EX_OK)

    def _end(self) -> None:
        """Give back what runs, and end. Handlers in threads run until the very end: what they record is refused."""
        logger.warning("stopping at once: %d messages are given back", len(worker_state.active_requests))
        threading.Thread(target=_last_resort, name="pipeline-last-resort", daemon=True).start()
        code = os.EX_SOFTWARE
        try:
            code = os.EX_OK if self._leave() else os.EX_UNAVAILABLE
            pidlock = self._consumer.controller.pidlock
            if pidlock:
                pidlock.release()
        except Exception:
            logger.exception("leaving")
        finally:
            os._exit(code)


def _signals() -> dict[signal.Signals, How]:
    """What each signal asks for. Celery lets SIGTERM mean SIGQUIT where only SIGTERM can be sent: in containers."""
    term = How.COLD if REMAP_SIGTERM == "SIGQUIT" else How.WARM
    return {signal.SIGTERM: term, signal.SIGINT: How.WARM, signal.SIGQUIT: How.COLD}


def _celery_stops() -> bool:
    flags = (worker_state.should_stop, worker_state.should_terminate)
    # An exit code of 0 is a reason to stop, too.
    return any(flag is not None and flag is not False for flag in flags)


def _last_resort() -> None:
    time.sleep(LAST_RESORT_S)
    logger.error("could not give back in time, the lease will end")
    os._exit(os.EX_UNAVAILABLE)
