"""Group commit: what several threads ask for at the same time is done in one go.

Whoever comes while nothing is under way does the work, for itself and for all that come meanwhile; there is no thread
of its own and no waiting for company. In a process with one thread it costs a lock.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Sequence
from typing import Generic, TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


class _Place(Generic[Item, Result]):
    """One caller's item, and what became of it."""

    def __init__(self, item: Item) -> None:
        self.item = item
        self.woken = threading.Event()
        self.done = False
        self.result: Result | None = None
        self.error: BaseException | None = None


class Group(Generic[Item, Result]):
    """Shares calls of `work`, which takes a list of items and gives as many results, in order.

    The items of one call weigh at most `limit` together, or it is one item.
    """

    def __init__(
        self,
        work: Callable[[Sequence[Item]], Sequence[Result]],
        *,
        limit: int = 64,
        weight: Callable[[Item], int] = lambda item: 1,
    ) -> None:
        self._work = work
        self._limit = limit
        self._weight = weight
        self._lock = threading.Lock()
        self._waiting: deque[_Place[Item, Result]] = deque()
        self._led = False

    def submit(self, item: Item) -> Result:
        """The result for `item`; raises what `work` raised for the items that it was done with."""
        place: _Place[Item, Result] = _Place(item)
        with self._lock:
            lead, self._led = not self._led, True
            if not lead:
                self._waiting.append(place)
        if lead:
            self._lead(place)
        else:
            place.woken.wait()
            if not place.done:
                self._lead(place)
        error, place.error = place.error, None
        if error is not None:
            try:
                raise error
            finally:
                # It leads to this frame: kept in it, the two would be garbage that only the collector finds.
                del error
        return place.result  # type: ignore[return-value]  # set whenever done without an error

    def _lead(self, own: _Place[Item, Result]) -> None:
        """Do the own item and what waits, then pass the lead on; a successor is out of the list, so nobody takes it."""
        with self._lock:
            room = self._limit - self._weight(own.item)
            others: list[_Place[Item, Result]] = []
            while self._waiting and self._weight(self._waiting[0].item) <= room:
                others.append(self._waiting.popleft())
                room -= self._weight(others[-1].item)
        try:
            self._do([own, *others])
        finally:
            for place in others:
                place.woken.set()
            with self._lock:
                successor = self._waiting.popleft() if self._waiting else None
                self._led = successor is not None
            if successor is not None:
                successor.woken.set()

    def _do(self, places: Sequence[_Place[Item, Result]]) -> None:
        try:
            results = self._work([place.item for place in places])
            for place, result in zip(places, results, strict=True):
                place.result = result
        except BaseException as exc:  # noqa: BLE001 - it is raised again, in the thread of each caller
            for place in places:
                place.error = exc
        for place in places:
            place.done = True
