"""Detached Celery workers, written down in `.pipeline/workers.json`. Called by `demo`, `stage` and `down`.

They outlive the command that started them; `stop` is how they end, and `down` calls it before it stops the services.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pipeline_app import settings
from pipeline_app.errors import RefusedError, UsageError
from pipeline_app.local import files, processes
from pipeline_app.local.processes import ProcessRecord


@dataclass(frozen=True, kw_only=True)
class WorkerProcess:
    """A detached worker."""

    #: Celery's node name is this and the host: `survey.load@host`.
    name: str
    stage: str
    pool: str
    concurrency: int
    process: ProcessRecord

    @property
    def pid(self) -> int:
        """Its main process."""
        return self.process.pid

    @property
    def log(self) -> str:
        """Path of its log file."""
        return self.process.log


def start(
    stages: Sequence[str], *, names: Sequence[str], pool: str, concurrency: int, env: Mapping[str, str] | None = None
) -> list[WorkerProcess]:
    """Start a worker for each stage, `survey.load` for one, under the name at the same place of `names`.

    Returns at once: a worker that is ready registers itself in the store. `env` is added to this process's environment.

    Raises RefusedError if a worker of such a name runs, UsageError for a name that cannot be one.
    """
    state_dir = settings.state_dir()
    files.make_state_dir(state_dir)
    with files.lock(state_dir / "workers.lock"):
        before = _running(state_dir)
        _check_names(names, {worker.name for worker in before})
        started: list[WorkerProcess] = []
        try:
            for stage, name in zip(stages, names, strict=True):
                started.append(_start_one(state_dir, stage, name, pool, concurrency, env or {}))
                _write(state_dir, [*before, *started])
        except BaseException:
            _stop(state_dir, started, grace_s=1.0)
            raise
    return started


def stop(names: Collection[str] | None = None, *, grace_s: float = 15.0) -> list[str]:
    """Let these workers (all of the project) finish what they have in hand, and end; their children, too.

    Returns the names of those that had to be killed because they had not ended in time.
    """
    state_dir = settings.state_dir()
    if not state_dir.is_dir():
        return []
    with files.lock(state_dir / "workers.lock"):
        chosen = [worker for worker in _running(state_dir) if names is None or worker.name in names]
        return _stop(state_dir, chosen, grace_s=grace_s)


def running() -> list[WorkerProcess]:
    """The project's detached workers that run."""
    return _running(settings.state_dir())


def _start_one(
    state_dir: Path, stage: str, name: str, pool: str, concurrency: int, env: Mapping[str, str]
) -> WorkerProcess:
    command = [
        *(sys.executable, "-m", "celery", "-A", "pipeline_app", "worker"),
        *("-Q", stage, "-n", f"{name}@%h", "-P", pool, "-c", str(concurrency), "--loglevel", "INFO"),
    ]
    process = processes.start(
        f"worker-{name}", command, state_dir=state_dir, env={**os.environ, **env}, cwd=state_dir.parent
    )
    return WorkerProcess(name=name, stage=stage, pool=pool, concurrency=concurrency, process=process)


def _stop(state_dir: Path, workers: Collection[WorkerProcess], *, grace_s: float) -> list[str]:
    killed = processes.stop([worker.process for worker in workers], grace_s=grace_s)
    _write(state_dir, _running(state_dir))
    return [worker.name for worker in workers if worker.process in killed]


def _check_names(names: Sequence[str], taken: Collection[str]) -> None:
    for name in names:
        if not re.fullmatch(r"[\w.-]+", name):
            raise UsageError(f"a worker cannot be called {name!r}", hint="letters, digits, dot, dash, underscore")
        if name in taken or names.count(name) > 1:
            raise RefusedError(f"a worker called {name} runs already", hint="stop it, or give another name")


def _running(state_dir: Path) -> list[WorkerProcess]:
    written = files.read_json(state_dir / "workers.json").get("workers", [])
    return [worker for worker in map(_from_json, written) if processes.find(worker.process) is not None]


def _from_json(written: dict[str, Any]) -> WorkerProcess:
    return WorkerProcess(**{**written, "process": ProcessRecord(**written["process"])})


def _write(state_dir: Path, workers: Collection[WorkerProcess]) -> None:
    files.write_json(state_dir / "workers.json", {"workers": [asdict(worker) for worker in workers]})
