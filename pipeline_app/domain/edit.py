"""Changes to what a job is given, made when it is replayed: `--set a.b=value`, or another payload in its place."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from pipeline_app.errors import UsageError

#: MongoDB nests documents no deeper.
MAX_DEPTH = 100

_HINT = "write a.b=VALUE: VALUE is JSON, or else a text"


class NotEditableError(Exception):
    """The edit cannot be made in this input."""


@dataclass(frozen=True, kw_only=True)
class Edit:
    """What is put in the place of an input, and what is set in it."""

    #: (path, value), in the order in which they are set.
    set: tuple[tuple[tuple[str, ...], Any], ...] = ()
    #: Whether `payload` takes the place of the whole input.
    replaces: bool = False
    payload: Any = None

    @classmethod
    def parse(cls, items: Iterable[str], *, replaces: bool = False, payload: Any = None) -> Edit | None:
        """The edit that `a.b=value` and so on make together; None if there is none.

        Raises UsageError for an item without `=` or with an empty part in its path, and for a path that is given twice.
        """
        found: dict[tuple[str, ...], Any] = {}
        for item in items:
            path, equals, text = item.partition("=")
            parts = tuple(path.split("."))
            if not equals or not all(parts) or len(parts) > MAX_DEPTH:
                raise UsageError(f"not an edit: {item:.200}", hint=_HINT)
            if parts in found:
                raise UsageError(f"{path} is set twice", hint=_HINT)
            found[parts] = _value(text)
        return cls(set=tuple(found.items()), replaces=replaces, payload=payload) if found or replaces else None

    def apply(self, value: Any) -> Any:
        """The input as it becomes; `value` stays as it is. Levels of a path that are missing are made.

        Raises NotEditableError if a path leads through something that is no mapping.
        """
        made = self.payload if self.replaces else value
        for path, new in self.set:
            made = _with(made, path, new)
        return made

    def as_dict(self) -> dict[str, Any]:
        """For documents."""
        row: dict[str, Any] = {"set": [{"path": list(path), "value": value} for path, value in self.set]}
        return row | ({"payload": self.payload} if self.replaces else {})

    @classmethod
    def of(cls, document: Mapping[str, Any]) -> Edit:
        """The edit in a document."""
        return cls(
            set=tuple((tuple(row["path"]), row["value"]) for row in document["set"]),
            replaces="payload" in document,
            payload=document.get("payload"),
        )


def _value(text: str) -> Any:
    try:
        return json.loads(text, parse_constant=_no_constant)
    except (ValueError, RecursionError):
        return text


def _no_constant(name: str) -> Any:
    """NaN and infinity are no JSON: they are taken for texts."""
    raise ValueError(name)


def _with(value: Any, path: tuple[str, ...], new: Any) -> Any:
    if not isinstance(value, Mapping):
        raise NotEditableError(f"{path[0]} cannot be set in a {type(value).__name__}")
    inner = new if len(path) == 1 else _with(value.get(path[0], {}), path[1:], new)
    return {**value, path[0]: inner}
