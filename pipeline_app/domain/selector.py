"""Selectors: `key=value`, matched against a job's tags; of several all must match."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from pipeline_app.errors import UsageError


def parse_selector(items: Iterable[str]) -> dict[str, str]:
    """The selector that `provider=openai` and so on make together.

    Raises UsageError for an item without `=`, without a key, or that contradicts another.
    """
    found: dict[str, str] = {}
    for item in items:
        key, equals, value = item.partition("=")
        if not equals or not key:
            raise UsageError(f"not a selector: {item!r}", hint="write KEY=VALUE, such as provider=openai")
        if found.setdefault(key, value) != value:
            raise UsageError(f"no job has both {key}={found[key]} and {key}={value}", hint="use two commands")
    return found


def check_selector(selector: Mapping[str, str]) -> dict[str, str]:
    """`selector` from a program. Raises UsageError if it is not a mapping of texts."""
    if not isinstance(selector, Mapping) or not all(
        isinstance(key, str) and key and isinstance(value, str) for key, value in selector.items()
    ):
        raise UsageError(f"a selector is a mapping of tags to values, not {selector!r}")
    return dict(selector)


def matches(selector: Mapping[str, str], tags: Mapping[str, str]) -> bool:
    """Whether a job with these tags is meant."""
    return all(tags.get(key) == value for key, value in selector.items())


def written(selector: Mapping[str, str]) -> str:
    """`provider=openai,quota_pool=gpt`, in one order."""
    return ",".join(f"{key}={selector[key]}" for key in sorted(selector))


@dataclass(frozen=True, kw_only=True)
class Selectors:
    """Which partitions of its stages a worker serves, by their tags."""

    #: All of them must match.
    select: Mapping[str, str] = field(default_factory=dict)
    #: Each of them excludes what it matches.
    skip: frozenset[tuple[str, str]] = frozenset()

    @classmethod
    def parse(cls, select: Iterable[str], skip: Iterable[str]) -> Selectors:
        """From `key=value` items. Raises UsageError."""
        pairs = [pair for item in skip for pair in parse_selector([item]).items()]
        return cls(select=parse_selector(select), skip=frozenset(pairs))

    def admit(self, tags: Mapping[str, str]) -> bool:
        """Whether a partition with these tags is served."""
        return matches(self.select, tags) and not any(tags.get(key) == value for key, value in self.skip)

    def written(self) -> tuple[list[str], list[str]]:
        """The items of `select` and of `skip`, in one order."""
        return [f"{key}={self.select[key]}" for key in sorted(self.select)], [f"{k}={v}" for k, v in sorted(self.skip)]

    def __bool__(self) -> bool:
        return bool(self.select or self.skip)
