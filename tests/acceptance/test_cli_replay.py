"""`pipeline-app replay ...` as people use it: real processes, a real RabbitMQ, a real MongoDB."""

from __future__ import annotations

import json
import signal
import subprocess
from typing import Any

import pytest
from click.testing import CliRunner

from pipeline_app.control.replays import replay
from pipeline_app.control.sight.status import status
from pipeline_app.views.cli.main import app
from tests.acceptance.test_cli_runs import error
from tests.integration.helpers import everything
from tests.nodes import NodeProject
from tests.project import eventually

ROW = [
    "operation",
    "run",
    "state",
    "selection",
    "from_stage",
    "rate_per_s",
    "halt_after",
    "matched",
    "released",
    "skipped",
    "failed",
    "terminal",
    "actor",
    "reason",
    "created_at",
    "ended_at",
    "why",
]
MENDED = ("--set", "permanent=false")


def dead_jobs(project: NodeProject, number: int) -> None:
    """A run `r1` whose jobs died in the first stage."""
    rows = [
        {"job_id": f"j{n:03}", "payload": {"n": n, "permanent": True}, "tags": {"kind": "odd" if n % 2 else "even"}}
        for n in range(number)
    ]
    project.seed("r1", rows)
    with project.node():
        project.json("run", "wait", "r1", "--timeout", "60")


def states(project: NodeProject) -> dict[str, int]:
    found = project.json("run", "status", "r1")["states"]
    return {state: number for state, number in found.items() if number}


def test_a_replay_from_the_dry_run_to_the_end(project: NodeProject) -> None:
    # Given dead letters
    dead_jobs(project, 7)
    before = everything(project.runtime())

    # When somebody asks what a replay would do
    found = project.json("replay", "start", "r1", "--selector", "kind=odd", *MENDED, "--dry-run")
    text = project.cli("replay", "start", "r1", "--selector", "kind=odd", *MENDED, "--rate", "200/s", "--dry-run")

    # Then it is counted, said, and nothing is changed
    assert found == {
        "matched": 3,
        "not_due": 0,
        "would_replay": 3,
        "no_input": 0,
        "not_editable": 0,
        "by_stage": {"first": 3},
        "by_status": {"dead_lettered": 3},
        "by_partition": {"kind__odd": 3},
    }
    assert text.returncode == 0
    assert "3 jobs match\nreplays 3 jobs, each from its stage, at 200/s\n  by stage: first 3\n" in text.stdout
    assert text.stdout.endswith("nothing was changed: this is a dry run\n")
    assert everything(project.runtime()) == before
    assert project.json("replay", "list") == []

    # When it is started without a worker, then that is said
    started = project.json("replay", "start", "r1", "--selector", "kind=odd", *MENDED, "--reason", "bad payload")
    assert (started["state"], started["would_replay"], started["released"]) == ("running", 3, 0)
    assert "no worker runs" in started["warnings"][0]
    # and when a worker runs, it is carried out
    with project.node():
        eventually(lambda: states(project) == {"terminal": 3, "dead_lettered": 4})
        # and another one can be waited for, as text
        waited = project.cli("replay", "start", "r1", "--yes", "--wait", "--job", "j000", "--job", "j002", *MENDED)
        assert waited.returncode == 0, waited.stderr
        assert "replayed 2 of 2 jobs, done" in waited.stdout
        eventually(lambda: states(project) == {"terminal": 5, "dead_lettered": 2})

    # Then both are listed, and the account of the run is exact
    rows = project.json("replay", "list", "last")
    assert [list(row) for row in rows] == [ROW, ROW]
    assert [(row["state"], row["released"], row["terminal"], row["reason"]) for row in rows] == [
        ("done", 3, 3, "bad payload"),
        ("done", 2, 2, ""),
    ]
    assert "@" in rows[0]["actor"]
    assert "bad payload" in project.cli("replay", "list").stdout
    verified = project.json("run", "verify", "r1")
    assert (verified["ok"], verified["exact"]) == (True, True)
    # and what was edited is shown beside the payload
    job = project.json("job", "r1", "j001")
    assert (job["payload"]["permanent"], job["generation"]) == (True, 1)
    assert job["outputs"][0] == {
        "stage": "(edit)",
        "message": rows[0]["operation"],
        "value": {"n": 1, "permanent": False},
    }
    assert "replayed" in project.cli("job", "r1", "j001").stdout


def test_a_replay_halts_and_goes_on(project: NodeProject) -> None:
    # Given dead letters of a bug that is still there
    dead_jobs(project, 60)

    with project.node():
        # When they are replayed with a limit, and somebody waits
        done = project.cli(
            "replay", "start", "r1", "--rate", "40/s", "--halt-after", "5", "--wait", "--yes", timeout=60
        )

        # Then it halts by itself, and the answer is no
        assert done.returncode == 1
        assert "attempts of replayed jobs failed again" in done.stderr
        (row,) = project.json("replay", "list", "r1")
        assert (row["state"], row["ended_at"]) == ("halted", None)
        assert 5 <= row["released"] < 60
        assert f"pipeline-app replay resume {row['operation']}" in done.stderr

        # When it is resumed, it halts again; cancelled, it has ended
        assert project.json("replay", "resume", row["operation"])["state"] == "running"
        eventually(lambda: project.json("replay", "list", "r1")[0]["state"] == "halted")
        ended = project.cli("replay", "cancel", row["operation"])
        assert "cancelled replay" in ended.stdout
        assert "jobs not yet" in ended.stdout
        refused = error(project.cli("replay", "resume", row["operation"], "--json"))
        assert (refused["code"], refused["message"]) == ("refused", f"replay {row['operation']} is cancelled")


def test_a_replay_outlives_its_operator_and_can_be_paused(project: NodeProject) -> None:
    # Given a replay whose operator follows it
    dead_jobs(project, 300)
    rt = project.runtime()

    def released() -> int:
        (row,) = replay.listing(rt)
        return int(row["released"])

    with project.node():
        operator = subprocess.Popen(
            ["pipeline-app", "replay", "start", "r1", *MENDED, "--rate", "20/s", "--wait", "--yes"],
            cwd=project.folder,
            env=project.env,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        try:
            eventually(lambda: replay.listing(rt) and released() > 5)
            assert operator.poll() is None
        finally:
            # When the operator is killed
            operator.send_signal(signal.SIGKILL)
            operator.wait(30)
        at_the_kill = released()

        # Then it goes on, until it is paused
        eventually(lambda: released() > at_the_kill + 20)
        operation = replay.listing(rt)[0]["operation"]
        paused = project.cli("replay", "pause", operation)
        at_pause = released()
        assert paused.returncode == 0
        assert f"paused replay {operation} of run r1: {at_pause} of 300 jobs, paused; " in paused.stdout
        assert f"{300 - at_pause} jobs not yet" in paused.stdout
        eventually(lambda: status(rt, "r1", queues=False).states["terminal"] == at_pause)
        assert released() == at_pause < 300

        # and, when it is resumed, to the end
        assert "resumed" in project.cli("replay", "resume", operation).stdout
        eventually(lambda: replay.show(rt, operation)["state"] == "done")
        eventually(lambda: status(rt, "r1", queues=False).states["terminal"] == 300)
    assert project.json("run", "verify", "r1")["ok"]


def test_another_payload_and_another_stage(project: NodeProject) -> None:
    # Given dead letters, and a file with a good payload
    dead_jobs(project, 2)
    path = project.write("good.json", json.dumps({"n": 7}))

    with project.node():
        # When they are replayed with it, and then once more from the last stage
        project.json("replay", "start", "r1", "--payload", str(path), "--wait")
        eventually(lambda: states(project) == {"terminal": 2})
        again = ("replay", "start", "r1", "--status", "terminal", "--from-stage", "third", "--set", "n=8")
        project.json(*again, "--wait")
        eventually(lambda: states(project) == {"terminal": 2})
        eventually(lambda: [row["terminal"] for row in project.json("replay", "list")] == [2, 2])

    # Then the result is what both make of it
    rows = [json.loads(line) for line in project.cli("run", "results", "r1", "--json").stdout.splitlines()]
    assert [row["result"] for row in rows] == [{"n": 8, "square": 49, "done": True}] * 2
    assert project.json("run", "verify", "r1")["ok"]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--selector", "kind"], "not a selector"),
        (["--status", "dead"], "no state 'dead'"),
        (["--status", "running"], "cannot be replayed"),
        (["--since", "yesterday"], "not a time"),
        (["--since", "-1h", "--until", "-2h"], "--since is not before --until"),
        (["--rate", "-5/s"], "not negative"),
        (["--rate", "5/fortnight"], "fortnight"),
        (["--ramp", "60s"], "--rate"),
        (["--rate", "5/s", "--ramp", "x"], "not a duration"),
        (["--halt-after", "0"], "halt-after"),
        (["--set", "n"], "not an edit"),
        (["--payload", "none.json"], "none.json"),
        (["--payload", __file__], "not JSON"),
    ],
)
def test_wrong_usage(arguments: list[str], says: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # Given no services: wrong usage is said before anybody is asked
    monkeypatch.setenv("MONGODB_URL", "mongodb://127.0.0.1:1/none")
    done = CliRunner().invoke(app, ["replay", "start", "r1", *arguments, "--json"])
    assert (done.exit_code, done.stdout) == (2, "")
    found = json.loads(done.stderr)["error"]
    assert found["code"] in {"usage", "definition"}
    assert says in found["message"]


def test_what_is_refused(prepared: NodeProject) -> None:
    for arguments, code, says in (
        (["--stage", "fourth"], "not_found", "no stage 'fourth'"),
        (["--from-stage", "fourth"], "not_found", "no stage 'fourth'"),
        (["--job", "nobody"], "not_found", "no job 'nobody'"),
        (["--error", "none"], "not_found", "no job of run r1 matches"),
        (["--status", "waiting"], "refused", "none of the 1 jobs that match would be replayed: 1 not due"),
    ):
        done = prepared.cli("replay", "start", "r1", *arguments, "--json")
        found = error(done)
        assert (done.returncode, found["code"]) == (1, code)
        assert says in found["message"]


@pytest.fixture
def prepared(project: NodeProject) -> NodeProject:
    """A run with a job that is not due."""
    project.seed("r1", [{"job_id": "a", "payload": {"n": 1}, "delay_s": 600}])
    return project


def test_a_dry_run_that_would_do_nothing_says_no(prepared: NodeProject) -> None:
    found: dict[str, Any] = prepared.json("replay", "start", "r1", "--dry-run", code=1)
    assert (found["matched"], found["would_replay"]) == (0, 0)
    found = prepared.json("replay", "start", "r1", "--status", "waiting", "--dry-run", code=1)
    assert (found["matched"], found["not_due"]) == (1, 1)
    found = prepared.json("replay", "start", "r1", "--status", "waiting", "--force", "--dry-run")
    assert found["would_replay"] == 1


def test_runs_and_replays_that_are_not_there(prepared: NodeProject) -> None:
    for arguments in (
        ["start", "nowhere"],
        ["list", "nowhere"],
        ["pause", "r-0"],
        ["resume", "r-0"],
        ["cancel", "r-0"],
    ):
        assert error(prepared.cli("replay", *arguments, "--json"))["code"] == "not_found"
    prepared.json("run", "cancel", "r1", "--yes")
    assert error(prepared.cli("replay", "start", "r1", "--json"))["hint"] == "make another run"
    assert prepared.cli("replay", "list").stdout == "nothing was replayed yet\n"
