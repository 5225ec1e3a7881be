"""What the tests of replays share: a handler with a bug, and a replay from its start to its end without a worker."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from pipeline_app import PermanentError, Pipeline
from pipeline_app.control.duties import replaying
from pipeline_app.control.replays import replay
from pipeline_app.domain.selection import Selection
from pipeline_app.domain.states import JobState
from pipeline_app.runtime import Runtime
from pipeline_app.store.client import Document
from tests.integration.helpers import begin, lines, prove, pump
from tests.project import eventually

TERMINAL = Selection(states=(JobState.TERMINAL,))


class Broken:
    """A handler with a bug, until that is mended."""

    def __init__(self) -> None:
        self.mended = False
        #: What it was called with.
        self.seen: list[Any] = []

    def handler(self, name: str = "fetch") -> Callable[[Any], Any]:
        def fetch(value: Any) -> Any:
            self.seen.append(value)
            if not self.mended:
                raise PermanentError("a bug")
            return {"of": value}

        fetch.__name__ = name
        return fetch


def ask(rt: Runtime, selection: Selection | None = None, **options: Any) -> replay.Survey:
    """How many a replay would take."""
    return replay.survey(rt, replay.request(rt, "r", selection or Selection(), **options))


def start(rt: Runtime, selection: Selection | None = None, **options: Any) -> Document:
    """Start a replay; nobody carries it out yet."""
    of_start = {name: options.pop(name) for name in ("pace", "halt_after", "reason", "actor") if name in options}
    return replay.start(rt, replay.request(rt, "r", selection or Selection(), **options), **of_start)


def carry_out(rt: Runtime, operation: str) -> Document:
    """Let the duty go on until the replay goes on no further."""

    def ended() -> Document | None:
        replaying.replay_on(rt)
        row = replay.show(rt, operation)
        return None if row["state"] == "running" else row

    found: Document = eventually(ended)
    return found


def run_replay(rt: Runtime, selection: Selection | None = None, **options: Any) -> Document:
    """A replay from its start to the end of its jobs."""
    row = carry_out(rt, start(rt, selection, **options)["operation"])
    pump(rt)
    return row


def with_dead_jobs(rt: Runtime, chosen: Pipeline, number: int, **fields: Any) -> None:
    begin(rt, chosen, lines(number, **fields))
    pump(rt)
    prove(rt, dead_lettered=number)
