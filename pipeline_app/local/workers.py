"""Detached Celery workers, written down in `.pipeline/workers.json`. Called by `demo`, `stage` and `down`.

They outlive the command that started them. `down` stops them before it stops the services; `stage` asks them by way of
the store, as it asks workers of other machines.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import count
from pathlib import Path
from typing import Any

from pipeline_app import settings
from pipeline_app.errors import RefusedError, UsageError
from pipeline_app.local import files, processes
from pipeline_app.local.processes import ProcessRecord

#: A worker that has not ended in time is told once more, which ends it at once; it needs some seconds for that.
AGAIN_S = 5.0


@dataclass(frozen=True, kw_only=True)
class NewWorker:
    """A worker to be started. Its stage is written `survey.load`."""

    stage: str
    #: None: as the project's settings, or Celery, have it.
    pool: str | None = None
    concurrency: int | None = None
    #: Items of its selectors.
    select: tuple[str, ...] = ()
    skip: tuple[str, ...] = ()
    #: Options of recycling with their values: `--max-jobs` -> `1000`.
    limits: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class WorkerProcess:
    """A detached worker."""

    #: Celery's node name is this and the host: `survey.load@host`.
    name: str
    stage: str
    #: None: as the project's settings, or Celery, have it.
    pool: str | None
    concurrency: int | None
    #: Items of its selectors.
    select: tuple[str, ...] = ()
    skip: tuple[str, ...] = ()
    #: Options of recycling with their values: `--max-jobs` -> `1000`.
    limits: Mapping[str, str] = field(default_factory=dict)
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
    wanted = [NewWorker(stage=stage, pool=pool, concurrency=concurrency) for stage in stages]

    def given(running: Collection[str]) -> Sequence[str]:
        _check_names(names, running)
        return names

    return _start(wanted, given, env or {})


def start_numbered(wanted: Sequence[NewWorker], *, taken: Collection[str] = ()) -> list[WorkerProcess]:
    """Start these workers, each as `survey.load-1` with the next number that no worker has, nor any name in `taken`.

    Returns at once, as `start` does.
    """
    return _start(wanted, lambda running: numbered(wanted, {*taken, *running}), {})


def numbered(wanted: Sequence[NewWorker], taken: Collection[str]) -> list[str]:
    """The names that workers started now would get."""
    used = set(taken)
    names = []
    for new in wanted:
        name = next(name for n in count(1) if (name := f"{new.stage}-{n}") not in used)
        used.add(name)
        names.append(name)
    return names


def stop(names: Collection[str] | None = None, *, grace_s: float = 15.0) -> list[str]:
    """Let these workers (all of the project) finish what they have in hand, and end; their children, too.

    What a worker has not finished within `grace_s` it gives back to the others.
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


def _start(
    wanted: Sequence[NewWorker], names: Callable[[Collection[str]], Sequence[str]], env: Mapping[str, str]
) -> list[WorkerProcess]:
    """All of them, or none. `names` tells their names, given those of the workers that run: nobody else starts any."""
    state_dir = settings.state_dir()
    files.make_state_dir(state_dir)
    with files.lock(state_dir / "workers.lock"):
        before = _running(state_dir)
        chosen = names({worker.name for worker in before})
        started: list[WorkerProcess] = []
        try:
            for new, name in zip(wanted, chosen, strict=True):
                started.append(_start_one(state_dir, new, name, env))
                _write(state_dir, [*before, *started])
        except BaseException:
            _stop(state_dir, started, grace_s=1.0)
            raise
    return started


def _start_one(state_dir: Path, new: NewWorker, name: str, env: Mapping[str, str]) -> WorkerProcess:
    command = [
        *(sys.executable, "-m", "celery", "-A", "pipeline_app", "worker"),
        *("-Q", new.stage, "-n", f"{name}@%h", "--loglevel", "INFO"),
    ]
    if new.pool is not None:
        command += ["-P", new.pool]
    if new.concurrency is not None:
        command += ["-c", str(new.concurrency)]
    for option, items in (("--select", new.select), ("--skip", new.skip)):
        for item in items:
            command.append(f"{option}={item}")
    command += [f"{option}={value}" for option, value in new.limits.items()]
    process = f"worker-{name}"
    told = {settings.WORKER_LOG: str(processes.log_file(state_dir, process))}
    record = processes.start(
        process, command, state_dir=state_dir, env={**os.environ, **env, **told}, cwd=state_dir.parent
    )
    return WorkerProcess(name=name, **vars(new), process=record)


def _stop(state_dir: Path, workers: Collection[WorkerProcess], *, grace_s: float) -> list[str]:
    # The second signal gives back what runs: being killed would be a loss of its jobs.
    killed = processes.stop([worker.process for worker in workers], grace_s=grace_s, again_s=AGAIN_S)
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
    selectors = {name: tuple(written.get(name, ())) for name in ("select", "skip")}
    return WorkerProcess(**{**written, **selectors, "process": ProcessRecord(**written["process"])})


def _write(state_dir: Path, workers: Collection[WorkerProcess]) -> None:
    files.write_json(state_dir / "workers.json", {"workers": [asdict(worker) for worker in workers]})
