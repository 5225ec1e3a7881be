"""`--dry-run` of every command that changes jobs: the whole database is as it was."""

from __future__ import annotations

from tests.integration.helpers import everything
from tests.nodes import NodeProject


def test_dry_runs_change_nothing(project: NodeProject) -> None:
    # Given jobs, a dead letter, a replay that nobody carries out, a hold, a throttle and a pause
    project.seed("r1", [{"job_id": f"j{n}", "payload": {"n": n}, "tags": {"kind": "odd"}} for n in range(4)])
    rt = project.runtime()
    died = {"state": "dead_lettered", "reason": "permanent", "message": None, "error_group": "0123456789"}
    rt.store.db.job_states.update_one({"_id": "r1/j0"}, {"$set": died})
    replay = project.json("replay", "start", "r1", "--yes")["operation"]
    project.json("hold", "set", "--selector", "kind=odd")
    project.json("throttle", "set", "--selector", "kind=odd", "--rate", "5/s")
    project.json("pause", "r1", "--stage", "second")
    before = everything(rt)

    # When each command is only tried
    for command in (
        ("hold", "set", "--selector", "kind=odd", "--until", "+1h"),
        ("hold", "clear", "--selector", "kind=odd"),
        ("throttle", "set", "--selector", "kind=odd", "--rate", "7/s"),
        ("throttle", "clear", "--selector", "kind=odd"),
        ("pause", "r1"),
        ("resume", "r1", "--stage", "second"),
        ("cancel", "r1", "--job", "j1"),
        ("move", "r1", "--to", "second", "--job", "j1"),
        ("priority", "r1", "5", "--job", "j1"),
        ("run", "cancel", "r1"),
        ("replay", "start", "r1"),
        ("replay", "pause", replay),
        ("replay", "resume", replay),
        ("replay", "cancel", replay),
    ):
        done = project.cli(*command, "--dry-run")

        # Then it says so, and nothing was changed
        assert done.returncode == 0, (command, done.stderr)
        assert done.stdout.splitlines()[-1] == "nothing was changed: this is a dry run", command
        assert everything(rt) == before, command
