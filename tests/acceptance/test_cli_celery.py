"""The same commands under `celery -A pipeline_app`, and the same things done from Python."""

from __future__ import annotations

import json
from pathlib import Path

from tests.nodes import NodeProject
from tests.project import eventually

#: A project whose own Celery task hears of results, and a script that uses it from Python.
NOTIFY = '''
from celery import shared_task


@shared_task(name="notify")
def notify(results, greeting):
    with open("notified.log", "a") as log:
        for row in results:
            log.write(f"{greeting} {row['job_id']} {row['result']['square']} {len(row['key'])}\\n")
    return len(results)


@shared_task(name="count")
def count(number):
    with open("counted.log", "a") as log:
        log.write(f"{number}\\n")
'''

SCRIPT = """
import json

from notify import count, notify
from pipeline_app import cancel, chain, create_run, results, seed, status, wait
from pipeline_app.errors import RunExistsError
from stages import demo

create_run("p1", demo, then=chain(demo) | notify.s("hello") | count.s())
try:
    create_run("p1", "demo")
except RunExistsError:
    pass
else:
    raise AssertionError("it was made twice")
added = seed("p1", ({"job_id": f"j{n}", "payload": {"n": n}} for n in range(7))).added
last = wait("p1", timeout_s=60)
assert last.is_past(None)
rows = list(results("p1"))
create_run("p2", "demo")
seed("p2", [{"job_id": "a", "payload": {"n": 1}, "delay_s": 600}])
print(json.dumps({"added": added, "rows": rows, "state": status("p1").state, "cancelled": cancel("p2")}))
"""


def test_celery_runs_the_same_commands(project: NodeProject) -> None:
    # Given a run
    project.seed("r1", [{"job_id": "a", "payload": {"n": 1}}])

    # When it is asked about under celery, then the answer is that of pipeline-app
    celery = ("celery", "-A", "pipeline_app")
    done = project.run(*celery, "run", "status", "r1", "--json")
    assert done.returncode == 0, done.stderr
    ours = project.json("run", "status", "r1")
    assert {**json.loads(done.stdout), "as_of": ""} == {**ours, "as_of": ""}

    # and so are the exit codes
    missing = project.run(*celery, "run", "status", "nope", "--json")
    assert (missing.returncode, json.loads(missing.stderr)["error"]["code"]) == (1, "not_found")
    assert project.run(*celery, "run", "seed").returncode == 2
    assert project.run(*celery, "failures", "r1", "--limit", "0", "--json").returncode == 2

    # and Celery's own `events` is still Celery's
    assert "Event-stream utilities" in project.run("celery", "events", "--help").stdout


def test_another_celery_app_is_refused(project: NodeProject) -> None:
    # Given a Celery app that is none of ours, or none at all
    project.write("other.py", "from celery import Celery\n\napp = Celery('other')\n")
    for arguments in (("-A", "other"), ()):
        done = project.run("celery", *arguments, "workers", "--json")

        # Then the command does not pretend to belong to it
        assert done.returncode == 2
        assert done.stdout == ""
        assert json.loads(done.stderr)["error"]["hint"] == "call it as: celery -A pipeline_app workers ..."


def test_a_run_from_python_with_tasks_of_one_s_own_behind_it(project: NodeProject) -> None:
    # Given a project with Celery tasks of its own, which its worker serves
    project.write("celeryconfig.py", 'pipelines = ["stages:demo"]\nimports = ["notify"]\n')
    project.write("notify.py", NOTIFY)
    script = project.write("use.py", SCRIPT)
    with project.node():
        # When a script makes a run of the pipeline's chain with those tasks behind it
        done = project.run("python", script.name, env={"PYTHONWARNINGS": "error::ResourceWarning"})
        assert done.returncode == 0, done.stderr
        made = json.loads(done.stdout)

        # Then the tasks hear of every result, in chunks
        notified = project.folder / "notified.log"
        eventually(lambda: len(lines(notified)) == 7)
        eventually(lambda: sum(map(int, lines(project.folder / "counted.log"))) == 7)
    assert sorted(lines(notified)) == [f"hello j{n} {n * n} 32" for n in range(7)]

    # and the functions gave what the commands give
    assert (made["added"], made["state"], made["cancelled"]) == (7, "complete", 1)
    assert {row["job_id"]: row["result"]["square"] for row in made["rows"]} == {f"j{n}": n * n for n in range(7)}


def lines(path: Path) -> list[str]:
    return path.read_text().splitlines() if path.exists() else []


def test_handlers_do_not_load_what_only_users_of_runs_need(project: NodeProject) -> None:
    # When the package is imported, as every handler does
    script = "import sys, pipeline_app; print('celery' in sys.modules, 'pymongo' in sys.modules, dir(pipeline_app))"
    done = project.run("python", "-c", script)

    # Then nothing that connects is loaded, although its names are there
    assert done.stdout.startswith("False False ")
    for name in ("create_run", "seed", "wait", "results", "status", "cancel", "chain"):
        assert f"'{name}'" in done.stdout
    assert project.run("python", "-c", "import pipeline_app; pipeline_app.nope").returncode == 1
