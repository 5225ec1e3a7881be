"""What holds for every command: --json, help with examples, exit codes; and that help loads nothing heavy."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from importlib.metadata import entry_points

import click
import pytest
from click.testing import CliRunner, Result

from pipeline_app.errors import NotFoundError, StoreError, UsageError
from pipeline_app.views.cli.common import Command, Group, json_option
from pipeline_app.views.cli.main import app


def leaves(group: click.Group, path: tuple[str, ...] = ()) -> Iterator[tuple[str, click.Command]]:
    """Every command, by the words that it is called with."""
    for name, command in group.commands.items():
        if isinstance(command, click.Group):
            yield from leaves(command, (*path, name))
        else:
            yield " ".join((*path, name)), command


COMMANDS = dict(leaves(app))


def call(*arguments: str) -> Result:
    return CliRunner().invoke(app, arguments)


def test_the_commands_are_those_that_are_promised() -> None:
    runs = {"init", "seed", "status", "wait", "watch", "list", "results", "verify", "cancel"}
    others = {"demo", "up", "down", "services", "try", "workers", "failures", "attempts", "events", "job", "why"}
    assert set(COMMANDS) >= {f"run {name}" for name in runs} | others


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_json_and_examples(name: str) -> None:
    done = call(*name.split(), "--help")
    assert done.exit_code == 0
    assert "--json" in done.output
    assert "Examples:\n" in done.output
    # An example is a line that can be copied.
    assert f"\n    pipeline-app {name}" in done.output


def test_the_list_of_commands_is_not_cut() -> None:
    for group in ([], ["run"]):
        listed = call(*group, "--help").output.partition("Commands:\n")[2].split("\n\n")[0]
        assert "..." not in listed


@pytest.mark.parametrize("arguments", [["nonsense"], ["run", "nonsense"], ["run", "status"], ["job", "r"], ["up", "x"]])
def test_wrong_usage_is_exit_code_2_with_one_error_object(arguments: list[str]) -> None:
    done = call(*arguments, "--json")
    assert done.exit_code == 2
    assert done.stdout == ""
    error = json.loads(done.stderr)["error"]
    assert error["code"] == "usage"
    assert error["message"]


def test_wrong_usage_for_people_shows_the_usage() -> None:
    done = call("run", "stats")
    assert done.exit_code == 2
    assert "Usage: " in done.stderr
    assert done.stdout == ""


def run_raising(exc: BaseException, *arguments: str) -> Result:
    """A command of the kind that ours are, which raises that."""

    @click.group(cls=Group)
    def group() -> None:
        """A group."""

    @group.command(cls=Command)
    @json_option
    def fail(as_json: bool) -> None:
        raise exc

    return CliRunner().invoke(group, ["fail", *arguments])


@pytest.mark.parametrize(
    ("exc", "code", "name"),
    [
        (NotFoundError("no such run", hint="list them"), 1, "not_found"),
        (UsageError("not like that"), 2, "usage"),
        (StoreError("no answer"), 3, "store_unreachable"),
        (ValueError("a bug"), 4, "bug"),
        (KeyboardInterrupt(), 130, "interrupted"),
    ],
)
def test_errors_become_exit_codes(exc: BaseException, code: int, name: str) -> None:
    # When a command raises it
    for_programs, for_people = run_raising(exc, "--json"), run_raising(exc)

    # Then the exit code says what kind of error it is, and nothing is on standard output
    assert for_programs.exit_code == for_people.exit_code == code
    assert for_programs.stdout == for_people.stdout == ""
    assert json.loads(for_programs.stderr)["error"]["code"] == name
    assert for_people.stderr.startswith("error: ")


def test_a_bug_shows_no_traceback_until_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PIPELINE_TRACEBACK", raising=False)
    exc = ValueError("no answer from amqp://joe:secret@broker//\nsecond line")

    # Without the variable: one line, the place, a hint how to see more, and never a password
    quiet = run_raising(exc)
    assert "Traceback" not in quiet.stderr
    assert "amqp://joe:***@broker// second line (test_cli_commands.py:" in quiet.stderr.splitlines()[0]
    assert "PIPELINE_TRACEBACK=1" in quiet.stderr
    assert "secret" not in quiet.stderr

    # With it: the traceback
    monkeypatch.setenv("PIPELINE_TRACEBACK", "1")
    assert "Traceback (most recent call last)" in run_raising(ValueError("x")).stderr


def test_celery_gets_the_same_objects_except_where_it_has_its_own() -> None:
    # Given what is installed for `celery`
    plugins = {point.name: point for point in entry_points(group="celery.commands")}

    # Then every command of ours is there, as the same object, except `events`, which Celery has
    for name, command in app.commands.items():
        if name != "events":
            assert plugins[name].load() is command
    assert "events" not in plugins or "pipeline_app" not in plugins["events"].value


def test_help_loads_neither_celery_nor_drivers() -> None:
    # Given a fresh interpreter that loads every command
    script = (
        "import sys; from pipeline_app.views.cli import main;"
        "print([name for name in ('celery', 'kombu', 'pymongo', 'rich', 'pydantic_settings') if name in sys.modules])"
    )

    # When it is asked what else that loaded
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)

    # Then nothing that takes long
    assert done.stdout.strip() == "[]"
