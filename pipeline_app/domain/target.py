"""What a hold, a pause or a throttle applies to, and how a worker finds those that apply to a job.

A worker asks before every handler, so a look costs the same with a thousand holds as with one: the table is cut down
to a stage's partition once, and there a job's tags are looked up, not the selectors gone through.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

from pipeline_app.domain.selector import matches, written

T = TypeVar("T")

#: Places that a table keeps cut down; beyond it begins anew.
REMEMBERED = 10_000


@dataclass(frozen=True, kw_only=True)
class Target:
    """The jobs that something applies to: those that match all that is given."""

    run: str | None = None
    #: Name of a stage's task, such as `survey.load`.
    stage: str | None = None
    partition: str | None = None
    selector: Mapping[str, str] = field(default_factory=dict)

    def digest(self, prefix: str) -> str:
        """An id that is the same for the same target: who closes it a thousand times makes one hold."""
        text = json.dumps([self.run, self.stage, self.partition, sorted(self.selector.items())])
        return prefix + hashlib.sha256(text.encode()).hexdigest()[:10]

    def holds_in(self, run: str, stage: str, partition: str) -> bool:
        """Whether it can apply to jobs of that place, whatever their tags."""
        return self.run in (None, run) and self.stage in (None, stage) and self.partition in (None, partition)

    def covers(self, run: str, stage: str, partition: str, tags: Mapping[str, str]) -> bool:
        """Whether it applies to a job there with these tags."""
        return self.holds_in(run, stage, partition) and matches(self.selector, tags)

    def includes(self, other: Target) -> bool:
        """Whether it applies to every job that `other` can apply to."""
        places = ((self.run, other.run), (self.stage, other.stage), (self.partition, other.partition))
        return all(mine in (None, theirs) for mine, theirs in places) and matches(self.selector, other.selector)

    def as_dict(self) -> dict[str, Any]:
        """For documents: tags may have dots and dollars, which keys of documents should not."""
        pairs = [[key, self.selector[key]] for key in sorted(self.selector)]
        return {"run": self.run, "stage": self.stage, "partition": self.partition, "selector": pairs}

    @classmethod
    def of(cls, document: Mapping[str, Any]) -> Target:
        """The target in a document."""
        place = {name: document[name] for name in ("run", "stage", "partition")}
        return cls(**place, selector=dict(document["selector"]))

    def __str__(self) -> str:
        parts = [written(self.selector)] if self.selector else []
        parts += [f"{name} {value}" for name, value in (("partition", self.partition), ("stage", self.stage)) if value]
        parts += [f"run {self.run}"] if self.run else []
        return ", ".join(parts) or "everything"


class Place(Generic[T]):
    """What can apply to the jobs of one run, stage and partition."""

    def __init__(self, entries: Iterable[tuple[Target, T]]) -> None:
        self._always: list[T] = []
        #: Keys of selectors -> their values -> what they stand for: thousands of selectors have few sets of keys.
        self._by_keys: dict[tuple[str, ...], dict[tuple[str | None, ...], list[T]]] = {}
        for target, what in entries:
            if target.selector:
                keys = tuple(sorted(target.selector))
                values = tuple(target.selector[key] for key in keys)
                self._by_keys.setdefault(keys, {}).setdefault(values, []).append(what)
            else:
                self._always.append(what)
        self.is_empty = not self._always and not self._by_keys

    def matching(self, tags: Mapping[str, str]) -> Iterator[T]:
        """All that applies to a job with these tags."""
        yield from self._always
        for keys, by_values in self._by_keys.items():
            yield from by_values.get(tuple(map(tags.get, keys)), ())


class Table(Generic[T]):
    """All that applies to anything, by place."""

    def __init__(self, entries: Iterable[tuple[Target, T]] = ()) -> None:
        self.entries = list(entries)
        self._places: dict[tuple[str, str, str], Place[T]] = {}

    def at(self, run: str, stage: str, partition: str) -> Place[T]:
        """What can apply there."""
        place = self._places.get((run, stage, partition))
        if place is None:
            if len(self._places) >= REMEMBERED:
                self._places.clear()
            fitting = [(target, what) for target, what in self.entries if target.holds_in(run, stage, partition)]
            place = self._places[run, stage, partition] = Place(fitting)
        return place
