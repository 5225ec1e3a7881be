"""A job's handler in a process of its own: the same outcome as in the worker's, and evidence where that dies."""

from __future__ import annotations

import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from pipeline_app import Pipeline, Retry, Stage
from pipeline_app.control.results import results
from pipeline_app.control.seed import seeding
from pipeline_app.domain.handler import import_object
from pipeline_app.domain.job import job_key
from pipeline_app.domain.states import DeadKind, JobState
from pipeline_app.flow import alone, alone_process
from pipeline_app.flow.handle import job_of
from pipeline_app.runtime import Runtime
from tests.integration import alone_handlers
from tests.integration.helpers import attempts, begin, claimed, job, outcomes, pipeline, prove, pump
from tests.project import Project, eventually


def suspect(rt: Runtime, *job_ids: str, losses: int = 1) -> None:
    """Let jobs have lost their process before."""
    keys = [job_key("r", job_id) for job_id in job_ids]
    rt.store.db.job_states.update_many({"_id": {"$in": keys}}, {"$set": {"losses": losses}})


def run_alone(project: Project, *jobs: dict[str, Any], **options: Any) -> Runtime:
    """A run of suspects with these payloads, in one chunk, gone as far as they go by themselves."""
    options = {"chunk": 20, "retry": Retry(attempts=2, backoff="1h"), **options}
    chosen = pipeline(Stage(alone_handlers.do, **options))
    rt = project.runtime(chosen)
    begin(rt, chosen, [{"job_id": row["what"], "payload": row} for row in jobs])
    suspect(rt, *(row["what"] for row in jobs))
    pump(rt)
    return rt


def is_gone(pid: int) -> bool:
    """Whether there is no such process, or what is left of it waits only to be read."""
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


WAYS = ("fail", "permanent", "limit", "exit", "memory", "unreadable", "unserialisable", "large", "fine", "spend")


def test_the_same_outcome_as_in_the_worker(project: Project) -> None:
    """Given jobs that end in every way, when some of them are run alone, then what is recorded differs in nothing."""
    chosen = pipeline(Stage(alone_handlers.do, chunk=50, retry=Retry(attempts=2, backoff="1h", jitter=0)))
    rt = project.runtime(chosen)
    ways: dict[str, Any] = {way: {"what": way} for way in WAYS} | {"invalid": {"what": 1}}
    # Tags of their own: a target that one of them closes is not closed for the others.
    begin(
        rt,
        chosen,
        [
            {"job_id": f"{way}-{where}", "payload": payload, "tags": {"quota_pool": "q", "way": way, "where": where}}
            for way, payload in ways.items()
            for where in ("away", "here")
        ],
    )
    suspect(rt, *(f"{way}-away" for way in ways))

    pump(rt)

    here, away = ({way: told(rt, f"{way}-{where}") for way in ways} for where in ("here", "away"))
    assert away == here
    assert {way: row["state"] for way, row in here.items()} == {
        **dict.fromkeys(("fail", "exit", "memory", "unreadable", "spend"), JobState.RETRY_WAITING),
        **dict.fromkeys(("permanent", "unserialisable", "large", "invalid"), JobState.DEAD_LETTERED),
        "limit": JobState.HELD,
        "fine": JobState.TERMINAL,
    }
    assert here["limit"]["deferrals"] == 1
    prove(rt, retry_waiting=10, dead_lettered=8, held=2, terminal=2)


def told(rt: Runtime, job_id: str) -> dict[str, Any]:
    """What the store says of a job and its attempt, but for what is of this job alone."""
    (attempt,) = attempts(rt, job=job_id)
    error = {k: v for k, v in attempt.get("error", {}).items() if k != "traceback"}
    found = job(rt, job_id)
    fields = ("state", "reason", "failures", "deferrals", "error_group", "waits_for")
    return {
        **{name: found.get(name) for name in fields},
        "outcome": attempt["outcome"],
        "error": error,
        "attempt": attempt["attempt"],
        "raised in": [line for line in attempt.get("error", {}).get("traceback", "").splitlines() if "in do_" in line],
    }


def test_what_a_handler_finds_there(project: Project) -> None:
    """Given a suspect, then its handler has the same job, folder and modules around it, in another process."""
    rt = run_alone(project, {"what": "fine"}, {"what": "read"})

    prove(rt, terminal=2)
    found = {row["job_id"]: row["result"] for row in results(rt, "r")}
    assert found["read"] == "", "nothing is to be read"
    document = job(rt, "fine")
    assert found["fine"].pop("pid") != os.getpid()
    assert len(found["fine"].pop("key")) == 32
    assert found["fine"] == {
        "id": "fine", "run": "r", "stage": "do", "tags": document["tags"], "attempt": 1, "cwd": str(Path.cwd()),
    }  # fmt: skip


def test_what_a_handler_spent_there(project: Project) -> None:
    """Given a handler that reports what it spent and fails, then the report reaches the worker's job."""
    chosen = pipeline(alone_handlers.do)
    rt = project.runtime(chosen)
    begin(rt, chosen, [{"job_id": "spend", "payload": {"what": "spend"}}])
    (work,) = claimed(rt)
    given = job_of(work, "spend")

    with pytest.raises(alone.FailedAloneError, match="spent all the same"):
        alone.run(rt, work, chosen.first, given)

    assert given.spent == {"tokens": 7.5}


def test_much_in_and_out(project: Project, capfd: pytest.CaptureFixture[str]) -> None:
    """Given an input and a result near the limit and much printed, then all of it arrives where it should."""
    path = "p" * (14 * 1024 * 1024)
    rt = run_alone(project, {"what": "almost_large", "path": path}, {"what": "print"}, chunk=1)

    prove(rt, terminal=2)
    sizes = {row["job_id"]: len(row["result"]) for row in results(rt, "r")}
    assert sizes == {"almost_large": 14 * 1024 * 1024, "print": len("printed")}
    out, err = capfd.readouterr()
    assert out.count("printed ") == err.count("written ") == 200_000
    assert "logged by print" in err
    assert "logged by the handler" in err


def test_what_a_handler_leaves_behind(project: Project, tmp_path: Path) -> None:
    """Given handlers that leave a thread and a process running, then their own process ends with the answer."""
    file = tmp_path / "pid"
    begin_s = time.monotonic()
    rt = run_alone(project, {"what": "leave_a_thread"}, {"what": "leave_a_process", "path": str(file)})
    left = int(file.read_text())
    try:
        assert time.monotonic() - begin_s < 30
        prove(rt, terminal=2)
        assert not is_gone(left), "what it started is none of ours"
    finally:
        os.kill(left, signal.SIGKILL)
    eventually(lambda: not nursery().children())


@pytest.mark.parametrize(
    ("what", "message", "number", "name", "code"),
    [
        ("kill", "its process was killed by signal 9 (SIGKILL)", 9, "SIGKILL", None),
        ("kill_group", "its process was killed by signal 9 (SIGKILL)", 9, "SIGKILL", None),
        ("crash", "its process was killed by signal 11 (SIGSEGV)", 11, "SIGSEGV", None),
        ("end", "its process ended with exit code 7", None, None, 7),
        ("close_files", "its process ended with exit code 1", None, None, 1),
    ],
)
def test_evidence_of_a_process_that_died(
    project: Project, capfd: pytest.CaptureFixture[str], what: str, message: str, number: int | None, name: str | None,
    code: int | None,
) -> None:  # fmt: skip
    """Given a suspect whose process dies, then it is known how; it goes on until its budget is spent, then it ends."""
    rt = run_alone(project, {"what": what}, {"what": "fine"}, losses=3)

    prove(rt, terminal=1, dead_lettered=1)
    found = job(rt, what)
    assert (found["reason"], found["losses"], found["failures"]) == (DeadKind.WORKER_LOST, 3, 0)
    ledger = attempts(rt, job=what)
    assert outcomes(ledger) == ["lost", "lost"]
    for row in ledger:
        error = row["error"]
        assert (error["type"], error["message"]) == ("WorkerLost", message)
        assert found["error_group"] == error["group"]
        evidence = error["evidence"]
        assert 10 << 20 < evidence.pop("rss_bytes") <= evidence.pop("peak_rss_bytes") < 200 << 20
        assert is_gone(evidence.pop("pid"))
        assert evidence == {
            "signal": number, "signal_name": name, "exit_code": code,
            "worker": rt.incarnation(), "host": socket.gethostname(), "alone": True,
        }  # fmt: skip
    assert ("in do_crash" in ledger[0]["error"]["traceback"]) == (what == "crash")
    assert ("the last words" in capfd.readouterr().out) == (what == "end")


def test_memory_at_the_time(project: Project) -> None:
    """Given a process that had grown when it was killed, then the evidence says how much memory it had."""
    rt = run_alone(project, {"what": "grow"}, losses=2)

    (lost,) = attempts(rt)
    assert lost["error"]["evidence"]["peak_rss_bytes"] > 64 << 20


def test_a_process_whose_channel_somebody_holds_open(project: Project, tmp_path: Path) -> None:
    """Given a handler that forked before its process died, then that is seen, and the fork is ended, too."""
    file = tmp_path / "pid"
    rt = run_alone(project, {"what": "fork_and_die", "path": str(file)}, losses=2)

    prove(rt, dead_lettered=1)
    eventually(lambda: is_gone(int(file.read_text())))


MADE = """
import os

from pipeline_app import Pipeline, Stage

if os.environ.get("END_AT_IMPORT"):
    os._exit(4)


def adding(number):
    def add(n: int) -> int:
        return n + number

    return add


chosen = Pipeline(__name__, [Stage(adding(5), name="first"), Stage(adding(70), name="second")])
"""


@pytest.fixture
def made_pipeline(project: Project, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Pipeline]:
    """Writes and imports a module with a pipeline of handlers that cannot be imported by name."""

    def make(name: str) -> Pipeline:
        monkeypatch.syspath_prepend(str(project.folder))
        project.write(f"{name}.py", MADE)
        return import_object(f"{name}:chosen")  # type: ignore[no-any-return]

    return make


def test_a_handler_that_only_its_pipeline_knows(
    project: Project, made_pipeline: Callable[[str], Pipeline]
) -> None:
    """Given handlers made by a function, then they are found by way of the pipelines of the project."""
    chosen = made_pipeline("made_alone")
    rt = project.runtime(chosen, pipelines=("handlers.survey:survey", "made_alone:chosen"))
    begin(rt, chosen, [{"job_id": "j", "payload": 1}])
    suspect(rt, "j")

    pump(rt)

    prove(rt, terminal=1)
    assert [row["result"] for row in results(rt, "r")] == [76]


def test_a_handler_that_cannot_be_found(project: Project, made_pipeline: Callable[[str], Pipeline]) -> None:
    """Given a handler that another process cannot find, then its job has failed, and does not run in the worker."""
    chosen = made_pipeline("made_away")
    rt = project.runtime(chosen)
    begin(rt, chosen, [{"job_id": "j", "payload": 1}])
    suspect(rt, "j")

    pump(rt)

    prove(rt, retry_waiting=1)
    (failed,) = attempts(rt)
    assert failed["error"]["type"] == "pipeline_app.errors.DefinitionError"
    assert job(rt, "j")["losses"] == 1


def test_a_process_that_ends_before_the_handler_begins(
    project: Project, made_pipeline: Callable[[str], Pipeline], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Given an application that ends its process while it is imported, then that is a failure and no loss."""
    chosen = made_pipeline("made_to_end")
    rt = project.runtime(chosen, pipelines=("made_to_end:chosen",))
    begin(rt, chosen, [{"job_id": "j", "payload": 1}])
    suspect(rt, "j")
    monkeypatch.setenv("END_AT_IMPORT", "1")

    pump(rt)

    prove(rt, retry_waiting=1)
    (failed,) = attempts(rt)
    assert failed["outcome"] == "failed"
    assert failed["error"]["message"] == "its process ended with exit code 4 before the handler began"
    assert failed["error"]["evidence"]["exit_code"] == 4
    assert job(rt, "j")["losses"] == 1


def test_a_machine_that_can_start_no_process_for_a_while(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    """Given that no process can be started, when one can be again, then the job runs and nothing was counted."""
    alone_process.end_nursery()
    python = sys.executable
    monkeypatch.setattr(sys, "executable", "/nowhere/python")
    threading.Timer(1.0, lambda: setattr(sys, "executable", python)).start()

    rt = run_alone(project, {"what": "fine"})

    prove(rt, terminal=1)
    assert outcomes(attempts(rt)) == ["ok"]


def nursery() -> psutil.Process:
    """The process that this one's jobs are forked by."""
    (found,) = (child for child in psutil.Process().children() if "alone_nursery" in " ".join(child.cmdline()))
    return found


def test_many_share_one_nursery(project: Project) -> None:
    """Given many suspects, then the application is imported once for all of them, and each has a process of its own."""
    rt = run_alone(project, {"what": "fine"})
    born = nursery().create_time()

    alone_again(rt, 10)

    prove(rt, terminal=11)
    assert len({row["result"]["pid"] for row in results(rt, "r")} - {os.getpid(), nursery().pid}) == 11
    assert nursery().create_time() == born


def test_a_nursery_that_was_killed(project: Project) -> None:
    """Given a nursery that somebody killed, then the next job has another one, and nothing is counted."""
    rt = run_alone(project, {"what": "fine"})
    killed = nursery()
    killed.kill()
    eventually(lambda: is_gone(killed.pid))

    alone_again(rt, 1)

    assert outcomes(attempts(rt)) == ["ok", "ok"]
    assert nursery().pid != killed.pid


def alone_again(rt: Runtime, number: int) -> None:
    """Some more suspects in the same run."""
    seeding.seed(rt, "r", [{"job_id": f"more-{n}", "payload": {"what": "fine"}} for n in range(number)])
    suspect(rt, *(f"more-{n}" for n in range(number)))
    pump(rt)


THREADED = """
import threading

from tests.integration.alone_handlers import do
from pipeline_app import Pipeline, Stage

threading.Thread(target=threading.Event().wait, daemon=True).start()
chosen = Pipeline("threaded", [Stage(do)])
"""


def test_an_application_with_threads_of_its_own(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    """Given an application that starts a thread when it is imported, then its jobs are no forks of such a process."""
    monkeypatch.syspath_prepend(str(project.folder))
    project.write("threaded.py", THREADED)
    chosen = import_object("threaded:chosen")
    rt = project.runtime(chosen, pipelines=("threaded:chosen",))
    begin(rt, chosen, [{"job_id": "j", "payload": {"what": "parent"}}])
    suspect(rt, "j")

    pump(rt)

    assert [row["result"] for row in results(rt, "r")] == [os.getpid()]
    alone_process.end_nursery()
