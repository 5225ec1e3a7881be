"""Time limits of handlers. Used by handle for each job of a stage that has such limits, and where a job runs alone.

The soft limit raises SoftTimeLimitExceeded in the handler: by an alarm in the main thread (prefork, solo), by an
exception that is set for its thread (threads), by gevent's own timeout (gevent). The handler may catch it.

At the hard limit nothing is asked of the handler any more, which may never end: a watchdog, one thread for all handlers
of the process, has its job recorded on its behalf. Handler and watchdog may come to the end at the same time: a timer
is taken once, in one atomic step, and who takes it decides. There is no lock in that: an exception on its way into the
handler's thread might strike while it is held, and it would be held for ever.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import logging
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable
from types import FrameType
from typing import Any, Protocol, TypeVar

from billiard.exceptions import SoftTimeLimitExceeded

from pipeline_app.domain.outcome import ErrorRecord, clean_text

logger = logging.getLogger(__name__)

Value = TypeVar("Value")

#: Type of the error of an attempt that ran into the hard limit.
TIME_LIMIT = "TimeLimitExceeded"
#: Frames of a handler's stack that are kept.
STACK_FRAMES = 30

_NEVER = float("inf")


class OvertakenError(Exception):
    """The handler ended after its time: its message was recorded on its behalf."""

    def __init__(self, settled: threading.Event) -> None:
        super().__init__("the time limit was over")
        #: Set when that is done.
        self.settled = settled


def time_limit_error(limit_s: float, stack: str = "") -> ErrorRecord:
    """The error of an attempt that ran longer than it may; `stack` is where the handler was then."""
    return ErrorRecord(type=TIME_LIMIT, message=f"it ran longer than its time limit of {limit_s:g} s", traceback=stack)


def run_within(soft_limit_s: float | None, call: Callable[[], Value]) -> Value:
    """What `call` returns; SoftTimeLimitExceeded is raised in it after so long. For a process's main thread."""
    if soft_limit_s is None:
        return call()
    alarm = _Alarm(soft_limit_s)
    try:
        alarm.arm()
        return call()
    finally:
        alarm.disarm()


class _Timer:
    """Something to do at a time, unless somebody takes it before."""

    def __init__(self, seconds: float, act: Callable[[], None]) -> None:
        self.at = time.monotonic() + seconds
        self.act = act
        self._left = [True]

    def take(self) -> bool:
        """Whether the caller is the one who has it; true once."""
        with contextlib.suppress(IndexError):
            return self._left.pop()
        return False


class Watchdog:
    """The thread that watches over the handlers of this process."""

    def __init__(self) -> None:
        self._timers: dict[_Timer, None] = {}
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None
        self._looks_at = _NEVER

    def add(self, timer: _Timer) -> None:
        """Do it when its time has come. Not before this has returned: it takes the same lock."""
        with self._changed:
            self._timers[timer] = None
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="pipeline-watchdog", daemon=True)
                self._thread.start()
            elif timer.at < self._looks_at:
                self._changed.notify()

    def drop(self, timer: _Timer) -> None:
        """Its time will not come."""
        self._timers.pop(timer, None)

    def _run(self) -> None:
        with self._changed:
            while True:
                now = time.monotonic()
                self._act_on_those_before(now)
                self._looks_at = min((timer.at for timer in self._timers.copy()), default=_NEVER)
                self._changed.wait(None if self._looks_at == _NEVER else max(0.0, self._looks_at - now))

    def _act_on_those_before(self, now: float) -> None:
        # A function of its own: while the thread waits, no variable keeps the last timer and its message.
        for timer in self._timers.copy():
            if timer.at <= now:
                self._timers.pop(timer, None)
                if timer.take():
                    timer.act()


class Watch:
    """One call of a handler under its limits. `overdue` is called with the handler's stack at the hard one."""

    def __init__(
        self, watchdog: Watchdog, soft_s: float | None, hard_s: float | None, overdue: Callable[[str], None]
    ) -> None:
        self._watchdog = watchdog
        self._overdue = overdue
        self._frame = _frame_of_caller()
        self._soft = None if soft_s is None else _soft(watchdog, soft_s)
        self._hard_s = hard_s
        self._settled = threading.Event()

    def run(self, call: Callable[[], Value]) -> Value:
        """What `call` returns.

        Raises what it raises, SoftTimeLimitExceeded among it; OvertakenError if it ends after the hard limit.
        """
        # The timer knows us, and we must not know it: the two would be garbage that only the collector finds.
        hard = None if self._hard_s is None else _Timer(self._hard_s, self._overtake)
        try:
            if hard is not None:
                self._watchdog.add(hard)
            # Last: from here on the exception may come.
            if self._soft is not None:
                self._soft.arm()
            return call()
        finally:
            # Here, and not in a function: the exception may strike where one begins, and the rest must happen.
            try:
                if self._soft is not None:
                    self._soft.disarm()
            finally:
                if hard is not None:
                    self._watchdog.drop(hard)
                    if not hard.take():
                        raise OvertakenError(self._settled)

    def _overtake(self) -> None:
        # Recording may wait for the store: meanwhile others run into their limits, too.
        try:
            threading.Thread(target=self._settle, name="pipeline-overdue", daemon=True).start()
        except RuntimeError:  # no more threads on this machine: then the others have to wait
            self._settle()

    def _settle(self) -> None:
        try:
            self._overdue(_stack(self._frame()))
        except Exception:
            logger.exception("a handler that ran past its time limit")
        finally:
            self._settled.set()


class _Soft(Protocol):
    """A way to raise SoftTimeLimitExceeded in the thread that arms it."""

    def arm(self) -> None: ...

    def disarm(self) -> None:
        """Nothing is raised after this; what is on its way may be raised by it."""


def _soft(watchdog: Watchdog, seconds: float) -> _Soft:
    if _is_green():
        return _GreenTimeout(seconds)
    if threading.current_thread() is threading.main_thread():
        return _Alarm(seconds)
    return _Thrown(watchdog, seconds)


class _Alarm:
    """By a signal, which Python handles in the main thread; also while that waits in a call of the system."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._armed = False
        self._before: Any = None

    def arm(self) -> None:
        self._armed = True
        self._before = signal.signal(signal.SIGALRM, self._ring)
        signal.setitimer(signal.ITIMER_REAL, self._seconds)

    def disarm(self) -> None:
        try:
            self._armed = False
        finally:
            self._restore()

    def _ring(self, number: int, frame: FrameType | None) -> None:  # noqa: ARG002 - the signature is Python's
        if self._armed:
            self._armed = False
            self._restore()
            raise SoftTimeLimitExceeded

    def _restore(self) -> None:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, self._before or signal.SIG_DFL)


class _Thrown:
    """By setting it for the thread, which raises it at its next step in Python; a call of the system ends first."""

    def __init__(self, watchdog: Watchdog, seconds: float) -> None:
        self._watchdog = watchdog
        self._thread = threading.get_ident()
        #: Has an entry once it was set.
        self._thrown: list[bool] = []
        self._timer = _Timer(seconds, functools.partial(_throw, self._thread, self._thrown))

    def arm(self) -> None:
        self._watchdog.add(self._timer)

    def disarm(self) -> None:
        self._watchdog.drop(self._timer)
        if self._timer.take():
            return
        while not self._thrown:
            time.sleep(0.001)
        # It may have struck in the handler; if it has not, it must not strike somewhere else.
        _set_exception(self._thread, None)


def _throw(thread: int, thrown: list[bool]) -> None:
    _set_exception(thread, SoftTimeLimitExceeded)
    thrown.append(True)


def _set_exception(thread: int, exception: type[BaseException] | None) -> None:
    chosen = None if exception is None else ctypes.py_object(exception)
    ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread), chosen)


class _GreenTimeout:
    """By gevent, when the handler lets others run."""

    def __init__(self, seconds: float) -> None:
        from gevent import Timeout  # an extra: it is here where it was patched in

        self._timeout = Timeout(seconds, SoftTimeLimitExceeded)

    def arm(self) -> None:
        self._timeout.start()

    def disarm(self) -> None:
        self._timeout.close()


def _is_green() -> bool:
    monkey = sys.modules.get("gevent.monkey")
    return monkey is not None and bool(monkey.is_module_patched("threading"))


def _frame_of_caller() -> Callable[[], FrameType | None]:
    """Tells, to another thread, where the calling one is."""
    if _is_green():
        from gevent import getcurrent

        caller = getcurrent()
        return lambda: getattr(caller, "gr_frame", None)
    thread = threading.get_ident()
    return lambda: sys._current_frames().get(thread)


def _stack(frame: FrameType | None) -> str:
    """Where a handler is, innermost last, without what called it."""
    frames: list[tuple[FrameType, int]] = []
    while frame is not None and frame.f_code is not Watch.run.__code__:
        frames.append((frame, frame.f_lineno))
        frame = frame.f_back
    if frame is None:
        return ""
    while frames and str(frames[-1][0].f_globals.get("__name__")).startswith("pipeline_app."):
        frames.pop()
    lines = traceback.StackSummary.extract(iter(frames[:STACK_FRAMES])).format()
    return clean_text("Where it was, most recent call last:\n" + "".join(reversed(lines)))
