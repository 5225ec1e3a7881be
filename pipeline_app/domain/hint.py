"""What a message in RabbitMQ carries: where to look, never the work itself."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

#: Raised when the meaning of a hint changes; a worker parks what it does not know.
VERSION = 1
#: Ids and names of ours are shorter; it is AMQP's own limit for short texts, too.
MAX_TEXT = 255


@dataclass(frozen=True, kw_only=True)
class Hint:
    """Names the message document of a chunk. The partition is there for the router."""

    run: str
    stage: str
    partition: str
    message: str

    def as_dict(self) -> dict[str, Any]:
        """The one argument of a stage's Celery task."""
        return {
            "v": VERSION,
            "run": self.run,
            "stage": self.stage,
            "partition": self.partition,
            "message": self.message,
        }

    @classmethod
    def read(cls, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Hint | str:
        """The hint in a task's arguments, or what is wrong with them."""
        if len(args) != 1 or kwargs or not isinstance(args[0], Mapping):
            return "the arguments are not those of a stage"
        table = args[0]
        if table.get("v") != VERSION:
            return f"its version is {table.get('v')!r}, this worker knows {VERSION}"
        values = {name: table.get(name) for name in ("run", "stage", "partition", "message")}
        for name, value in values.items():
            if not is_text(value):
                return f"{name} is missing"
        return cls(**{name: str(value) for name, value in values.items()})


def is_text(value: object) -> bool:
    """Whether it is text that the store can look for: not too long, and of characters only."""
    if not isinstance(value, str) or not 0 < len(value) <= MAX_TEXT or "\x00" in value:
        return False
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True
