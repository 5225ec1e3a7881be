"""`failures`, `attempts`, `events`, `job`, `why`, `workers`: what people ask when something is not as it should be."""

from __future__ import annotations

import json
import signal
from typing import Any

import pytest

from tests.nodes import NodeProject
from tests.project import eventually

ATTEMPT = {
    "job_id",
    "stage",
    "generation",
    "attempt",
    "outcome",
    "started_at",
    "duration_s",
    "worker",
    "code_version",
    "error",
}
GROUP = {
    "group",
    "stage",
    "type",
    "message",
    "frame",
    "count",
    "dead_lettered",
    "retrying",
    "first_at",
    "last_at",
    "sample_job",
}
WORKER = {
    "worker",
    "host",
    "pid",
    "pool",
    "concurrency",
    "queues",
    "stages",
    "select",
    "skip",
    "state",
    "started_at",
    "heartbeat_at",
    "running_jobs",
    "rss_bytes",
    "log",
}


def job(job_id: str, *, n: Any = 1, tags: dict[str, str] | None = None, line: Any = None, **payload: Any) -> Any:
    """A job line for the pipeline of the project."""
    return {"job_id": job_id, "payload": {"n": n, **payload}, "tags": tags or {}, **(line or {})}


def finish(project: NodeProject, *jobs: Any) -> None:
    """A run `r1` of these jobs, to its end."""
    project.seed("r1", list(jobs))
    with project.node():
        project.json("run", "wait", "r1", "--timeout", "60")


def why(project: NodeProject, job_id: str, **options: Any) -> dict[str, Any]:
    found: dict[str, Any] = project.json("why", "r1", job_id, **options)
    assert list(found) == ["run", "job_id", "state", "reason", "waits_for", "hint"]
    return found


def test_failures_say_what_each_job_died_of(project: NodeProject) -> None:
    # Given jobs that die in every way that a handler's job can
    finish(
        project,
        job("fine"),
        job("a permanent one", permanent=True),
        job("exhausted", fail=9),
        job("invalid", n="many"),
        job("expired", line={"expires_at": "2020-01-01T00:00:00Z"}),
    )

    # When they are listed
    found = project.json("failures", "last")

    # Then each has its kind, its attempts and its error
    assert [set(row) for row in found] == [
        {"job_id", "stage", "partition", "attempts", "at", "kind", "group", "error"} for _ in range(4)
    ]
    rows = {row["job_id"]: row for row in found}
    assert {name: (row["kind"], row["attempts"]) for name, row in rows.items()} == {
        "a permanent one": ("permanent", 1),
        "exhausted": ("exhausted", 3),
        "invalid": ("invalid_input", 1),
        "expired": ("expired", 0),
    }
    assert rows["exhausted"]["error"]["type"] == "ValueError"
    assert rows["exhausted"]["error"]["message"] == "attempt 3 of 1"
    assert "Traceback" in rows["exhausted"]["error"]["traceback"]
    assert rows["expired"]["error"] == {
        "type": "expired",
        "message": "its expires_at passed before it was started",
        "traceback": "",
    }
    assert [row["at"] for row in found] == sorted(row["at"] for row in found)

    # and filters leave the others out
    assert [row["job_id"] for row in project.json("failures", "r1", "--job", "invalid")] == ["invalid"]
    assert len(project.json("failures", "r1", "--limit", "2")) == 2
    assert project.json("failures", "r1", "--stage", "second") == []
    assert project.json("failures", "r1", "--job", "fine") == []

    # and people see a table, and with --job the traceback
    table = project.cli("failures", "r1").stdout
    assert "PermanentError: it says so" in table
    text = project.cli("failures", "r1", "--job", "exhausted").stdout
    assert 'raise ValueError(f"attempt {job.attempt} of {item.n}")' in text


def test_failures_in_groups(project: NodeProject) -> None:
    # Given jobs that die in two ways, some that wait for a retry, and one that is fine
    stages = (project.folder / "stages.py").read_text().replace('backoff="0.2s"', 'backoff="10m"')
    project.write("stages.py", stages)
    project.seed(
        "r1",
        [
            job("fine"),
            *(job(f"permanent {n}", permanent=True) for n in range(3)),
            *(job(f"retried {n}", n=n, fail=1) for n in range(4)),
            job("expired", line={"expires_at": "2020-01-01T00:00:00Z"}),
        ],
    )
    with project.node():
        eventually(lambda: failed_jobs(project) == 8)

    # When they are listed in groups
    found = project.json("failures", "last", "--grouped")

    # Then the largest is first, with a sample and where it came from
    assert [set(row) for row in found] == [GROUP] * 3
    retried, permanent, expired = found
    assert (retried["count"], retried["dead_lettered"], retried["retrying"]) == (4, 0, 4)
    assert (retried["type"], retried["frame"], retried["stage"]) == ("ValueError", "stages:first", "first")
    assert retried["message"] == f"attempt 1 of {retried['sample_job'][-1]}"
    assert (permanent["count"], permanent["dead_lettered"], permanent["retrying"]) == (3, 3, 0)
    assert (permanent["message"], permanent["frame"]) == ("it says so", "stages:first")
    assert permanent["sample_job"].startswith("permanent ")
    assert permanent["first_at"].endswith("Z")
    assert permanent["first_at"] <= permanent["last_at"]
    assert (expired["group"], expired["type"], expired["frame"]) == ("expired", "expired", None)

    # and people see a table and how to go on, and its commands work
    text = project.cli("failures", "r1", "--grouped").stdout
    table, _, steps = text.partition("\n\n")
    assert table.splitlines()[0].split("  ")[0] == "group"
    assert [line.split()[0] for line in table.splitlines()[1:]] == [row["group"] for row in found]
    assert "PermanentError: it says so" in table
    assert f"pipeline-app job r1 '{retried['sample_job']}'" in steps
    assert project.json("job", "r1", retried["sample_job"])["state"] == "retry_waiting"

    # and from a group one comes to its jobs
    listed = project.json("failures", "r1", "--error", permanent["group"])
    assert {row["job_id"] for row in listed} == {f"permanent {n}" for n in range(3)}
    assert {row["group"] for row in listed} == {permanent["group"]}
    assert project.json("failures", "r1", "--error", "0000000000") == []
    assert "no dead letters" in project.cli("failures", "r1", "--error", retried["group"]).stdout

    # and filters and limits hold for groups, too
    assert len(project.json("failures", "r1", "--grouped", "--limit", "2")) == 2
    assert len(project.json("failures", "r1", "--grouped", "--stage", "first")) == 3
    assert project.json("failures", "r1", "--grouped", "--stage", "second") == []
    assert project.cli("failures", "r1", "--grouped", "--stage", "second").stdout == "no failures\n"


def failed_jobs(project: NodeProject) -> int:
    """Jobs of the run that are dead or wait for a retry."""
    states = project.json("run", "status", "r1")["states"]
    return int(states["dead_lettered"] + states["retry_waiting"])


@pytest.mark.parametrize("option", [("--job", "a"), ("--error", "0000000000")])
def test_groups_are_not_of_one_job_or_one_group(project: NodeProject, option: tuple[str, str]) -> None:
    done = project.cli("failures", "r1", "--grouped", *option, "--json")
    assert done.returncode == 2
    assert "not jobs" in json.loads(done.stderr)["error"]["message"]
    assert done.stdout == ""


def test_groups_of_what_is_not_there_are_not_found(project: NodeProject) -> None:
    project.json("run", "init", "r1", "--pipeline", "demo")
    for arguments in (("nope",), ("r1", "--stage", "nope")):
        done = project.cli("failures", *arguments, "--grouped", "--json")
        assert done.returncode == 1
        assert json.loads(done.stderr)["error"]["code"] == "not_found"


def test_attempts_are_listed_oldest_first(project: NodeProject) -> None:
    # Given a job that fails twice before it succeeds, and another one
    finish(project, job("a", fail=2), job("b"))

    # When its attempts are listed
    found = project.json("attempts", "r1", "--job", "a")

    # Then every execution is there, in order
    assert [set(row) for row in found] == [ATTEMPT] * 5
    assert [(row["stage"], row["attempt"], row["outcome"]) for row in found] == [
        ("first", 1, "failed"),
        ("first", 2, "failed"),
        ("first", 3, "ok"),
        ("second", 1, "ok"),
        ("third", 1, "ok"),
    ]
    assert found[0]["error"]["message"] == "attempt 1 of 1"
    assert found[2]["error"] is None

    # and those of the run, a stage, the last ones
    assert len(project.json("attempts", "r1")) == 8
    assert {row["job_id"] for row in project.json("attempts", "r1", "--stage", "third")} == {"a", "b"}
    assert [row["stage"] for row in project.json("attempts", "r1", "--job", "a", "--limit", "2")] == ["second", "third"]


def test_events_tell_a_job_s_way(project: NodeProject) -> None:
    # Given a run that is done
    finish(project, job("a"), job("b"))

    # When the events are listed as JSON lines
    lines = [json.loads(line) for line in project.cli("events", "r1", "--json").stdout.splitlines()]

    # Then they begin with the seeding and name the jobs that each concerned
    assert lines[0]["event"] == "seeded"
    assert (lines[0]["job_count"], lines[0]["jobs"]) == (2, ["a", "b"])
    assert [row["at"] for row in lines] == sorted(row["at"] for row in lines)
    assert {row["stage"] for row in lines if row["event"] == "recorded"} == {"first", "second", "third"}

    # and those of one job name only that
    of_a = [json.loads(line) for line in project.cli("events", "r1", "--job", "a", "--json").stdout.splitlines()]
    assert {tuple(row["jobs"]) for row in of_a} == {("a",)}
    only = project.cli("events", "r1", "--stage", "third", "--limit", "1", "--json").stdout.splitlines()
    assert [json.loads(line)["stage"] for line in only] == ["third"]


def test_a_job_s_timeline(project: NodeProject) -> None:
    # Given a job whose id needs escaping, that failed once
    finish(project, job("dir/ü 1%", fail=1, tags={"kind": "x", "provider": "y"}))

    # When it is shown
    found = project.json("job", "r1", "dir/ü 1%")

    # Then everything that is known of it is there
    assert (found["job_id"], found["state"], found["stage"]) == ("dir/ü 1%", "terminal", "third")
    assert found["tags"] == {"kind": "x", "provider": "y"}
    assert found["partition"] == "kind__x"
    assert found["payload"] == {"n": 1, "fail": 1}
    assert [row["outcome"] for row in found["attempts"]] == ["failed", "ok", "ok", "ok"]
    assert [row["stage"] for row in found["outputs"]] == ["first", "second", "third"]
    assert found["outputs"][-1]["value"] == {"n": 1, "square": 1, "done": True}
    assert found["events"][0]["event"] == "seeded"

    # and people see it as a timeline with the last error
    text = project.cli("job", "r1", "dir/ü 1%").stdout
    assert text.index("seeded") < text.index("attempt 1: failed") < text.index("attempt 2: ok")
    assert "ValueError: attempt 1 of 1" in text


@pytest.mark.parametrize("command", ["job", "why"])
def test_an_unknown_job_is_not_found(project: NodeProject, command: str) -> None:
    project.json("run", "init", "r1", "--pipeline", "demo")
    done = project.cli(command, "r1", "nope", "--json")
    assert done.returncode == 1
    assert json.loads(done.stderr)["error"]["message"] == "run r1 has no job 'nope'"


@pytest.mark.parametrize("command", ["failures", "attempts", "events"])
def test_a_filter_that_names_nothing_is_not_found(project: NodeProject, command: str) -> None:
    project.json("run", "init", "r1", "--pipeline", "demo")
    for option in (("--job", "nope"), ("--stage", "nope")):
        done = project.cli(command, "r1", *option, "--json")
        assert done.returncode == 1
        assert json.loads(done.stderr)["error"]["code"] == "not_found"


def test_why_before_any_worker_runs(project: NodeProject) -> None:
    # Given jobs that are delayed and pending, and no worker
    project.seed("r1", [job("later", line={"delay_s": 3600}), job("now")])

    # Then the delayed one waits for its time
    found = why(project, "later")
    assert (found["state"], found["waits_for"]["kind"]) == ("waiting", "delay")
    assert found["waits_for"]["due_at"].endswith("Z")
    assert "no worker runs" in found["hint"]

    # and the other one for a worker: its queue has it, and nothing consumes that
    found = eventually(lambda: (now := why(project, "now"))["waits_for"]["kind"] == "queue" and now)
    assert found["state"] == "pending"
    assert (found["waits_for"]["queue"], found["waits_for"]["consumers"]) == ("demo.first", 0)
    # Hints of other tests' runs may be there, too.
    assert found["waits_for"]["ready"] >= 1
    assert found["hint"] == "start a worker: celery -A pipeline_app worker -Q demo.first"

    # and if the broker is away, that is the answer
    found = why(project, "now", env={"AMQP_URL": "amqp://joe:secret@127.0.0.1:1//"})
    assert found["waits_for"]["kind"] == "broker"
    assert "joe:***@" in found["reason"]


def test_why_of_what_could_not_be_published(project: NodeProject) -> None:
    # Given a job that was seeded while the broker was away
    project.json("run", "init", "r1", "--pipeline", "demo")
    away = {"AMQP_URL": "amqp://127.0.0.1:1//"}
    project.json("run", "seed", "r1", "--jobs", "-", input=json.dumps(job("a")), env=away)

    # Then that is what it waits for
    found = why(project, "a")
    assert (found["state"], found["waits_for"]["kind"]) == ("pending", "publish")
    assert "no worker runs" in found["hint"]


def test_why_while_a_worker_has_it(project: NodeProject) -> None:
    # Given a worker that is busy with a job
    project.seed("r1", [job("long", sleep_s=20), job("retried", fail=1)])
    with project.node() as worker:
        eventually(lambda: why(project, "long")["state"] == "running")

        # Then the job waits for its handler, on that worker
        found = why(project, "long")
        assert found["waits_for"]["kind"] == "handler"
        assert "first runs it on" in found["reason"]
        assert project.json("job", "r1", "long")["state"] == "running"
        assert project.json("run", "status", "r1")["states"]["running"] >= 1
        (listed,) = project.json("workers")
        assert listed["running_jobs"] >= 1
        # and when the worker is gone, it waits for the end of the lease
        worker.kill()
        found = eventually(lambda: (now := why(project, "long"))["waits_for"]["kind"] == "lease" and now, timeout=30)
    assert found["state"] == "running"
    assert "the sweep of any worker" in found["hint"]


def test_why_between_two_tries(project: NodeProject) -> None:
    # Given a job that failed and waits long for its next try
    stages = (project.folder / "stages.py").read_text().replace('backoff="0.2s"', 'backoff="10m"')
    project.write("stages.py", stages)
    project.seed("r1", [job("a", fail=1)])
    with project.node():
        eventually(lambda: why(project, "a")["state"] == "retry_waiting")
        found = why(project, "a")

    # Then the answer has the time, the number of failures and the error
    assert found["waits_for"]["kind"] == "retry"
    assert found["waits_for"]["failures"] == 1
    assert found["waits_for"]["error"]["message"] == "attempt 1 of 1"
    assert "it failed once in first (ValueError: attempt 1 of 1); its next try is due at " in found["reason"]
    assert found["hint"] is None


def test_why_of_jobs_at_rest(project: NodeProject) -> None:
    finish(project, job("fine"), job("dead", permanent=True))
    assert (why(project, "fine")["state"], why(project, "fine")["waits_for"]) == ("terminal", None)
    dead = why(project, "dead")
    assert (dead["state"], dead["waits_for"]) == ("dead_lettered", None)
    assert "(permanent): pipeline_app.errors.PermanentError: it says so" in dead["reason"]
    (group,) = project.json("failures", "r1", "--grouped")
    assert dead["hint"] == (
        "pipeline-app failures r1 --job dead shows the whole error; "
        f"--error {group['group']} instead of --job lists those that died alike"
    )


def test_why_of_a_cancelled_job(project: NodeProject) -> None:
    project.seed("r1", [job("a")])
    project.json("run", "cancel", "r1")
    found = why(project, "a")
    assert (found["state"], found["waits_for"]) == ("cancelled", None)
    assert found["reason"].startswith("its run was cancelled at ")


def test_why_of_a_run_with_another_definition(project: NodeProject) -> None:
    # Given a run that was made before the pipeline was changed
    project.seed("r1", [job("a")])
    stages = (project.folder / "stages.py").read_text().replace("Stage(second, chunk=2)", "Stage(second, chunk=3)")
    project.write("stages.py", stages)

    # When a worker with the new code comes to the job
    with project.node():
        eventually(lambda: why(project, "a")["state"] == "waiting")
        found = why(project, "a")

    # Then it waits for one with the old code, and says so
    assert found["waits_for"]["kind"] == "definition"
    assert found["hint"] == "start a worker with the code that the run was made with"


def test_why_of_a_file_whose_seeder_died(project: NodeProject) -> None:
    # Given a whole batch that was never closed: its seeder was killed between two pages
    project.json("run", "init", "r1", "--pipeline", "demo")
    db = project.runtime().store.db
    lines = [json.dumps(job(f"j{n}")) for n in range(3)]
    project.json("run", "seed", "r1", "--jobs", str(project.write("jobs.jsonl", "\n".join(lines))))
    db.seed_batches.update_one({}, {"$set": {"state": "interrupted"}})
    db.messages.update_many({}, {"$set": {"state": "draft"}})

    # Then its jobs wait for it, and the remedy is named
    found = why(project, "j0")
    assert (found["waits_for"]["kind"], found["waits_for"]["batch_state"]) == ("seed_batch", "interrupted")
    assert "--skip-existing" in found["hint"]


def test_workers_are_listed_while_they_run_and_after(project: NodeProject) -> None:
    # Given no worker, then one
    assert project.json("workers") == []
    assert "no workers" in project.cli("workers").stdout
    with project.worker("-Q", "demo.second", concurrency=3) as worker:
        (found,) = project.json("workers")
        assert set(found) == WORKER
        assert (found["pid"], found["pool"], found["concurrency"]) == (worker.process.pid, "threads", 3)
        assert (found["queues"], found["stages"]) == (["demo.second"], ["demo.second"])
        assert (found["state"], found["running_jobs"]) == ("running", 0)
        assert found["rss_bytes"] > 1_000_000

    # Then it is stopped, and one that is killed becomes stale
    assert [row["state"] for row in project.json("workers")] == ["stopped"]
    with project.worker() as worker:
        worker.process.send_signal(signal.SIGKILL)
        eventually(lambda: "stale" in {row["state"] for row in project.json("workers")}, timeout=30)
