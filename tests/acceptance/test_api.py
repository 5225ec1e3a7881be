"""The Python API, as a program of somebody's own uses it beside a worker."""

from __future__ import annotations

import json
import sys

from tests.nodes import NodeProject

PROGRAM = """
import json
import time

import pipeline_app as p

p.create_run("r", "demo")
held = p.hold({"kind": "a"}, until="+1h", reason="maintenance")
p.throttle({"kind": "b"}, rate="1000/s", concurrency=5)
seeded = p.seed("r", [{"job_id": f"j{n}", "payload": {"n": n}, "tags": {"kind": "ab"[n % 2]}} for n in range(20)])
while p.status("r").states["terminal"] < 10:
    time.sleep(0.05)
p.pause("r", stage="second")
cleared = p.clear_hold(held["hold"], at_once=True)
while p.status("r").states["waiting"] < 10:
    time.sleep(0.05)
moved = p.move("r", "third", jobs=["j0"])
p.cancel("r", jobs=["j2"])
p.set_priority("r", 5, selector={"kind": "a"})
p.resume("r", stage="second")
p.clear_throttle(selector={"kind": "b"})
after = p.wait("r", timeout_s=60).states
again = p.replay("r", jobs=["j1"], status=["terminal"], edits=["n=100"], dry_run=True)
operation = p.replay("r", jobs=["j1"], status=["terminal"], edits=["n=100"], rate="100/s")
while p.replays("r")[0]["state"] != "done" or p.wait("r", timeout_s=60).states["terminal"] < 19:
    time.sleep(0.05)
results = {row["job_id"]: row["result"] for row in p.results("r")}
print(json.dumps({
    "held": [held["state"], held["reason"]], "cleared": cleared[0]["held_jobs"], "moved": moved, "after": after,
    "would": again["would_replay"], "operation": operation["state"], "j1": results["j1"], "holds": p.holds(),
    "throttled": [row["ordered"] for row in p.throttles()], "groups": p.failure_groups("r"),
    "verified": p.verify("r", repair=True).ok,
}))
"""


def test_containing_and_repairing_from_python(project: NodeProject) -> None:
    program = project.write("program.py", PROGRAM)
    with project.node():
        done = project.run(sys.executable, str(program), timeout=100)

    assert done.returncode == 0, done.stderr[-3000:]
    told = json.loads(done.stdout)
    assert told["held"] == ["active", "maintenance"]
    assert (told["cleared"], told["moved"], told["would"], told["operation"]) == (10, 1, 1, "running")
    assert {state: number for state, number in told["after"].items() if number} == {"terminal": 19, "cancelled": 1}
    assert told["j1"] == {"n": 100, "square": 10_000, "done": True}
    assert (told["holds"], told["throttled"], told["groups"], told["verified"]) == ([], [], [], True)
