"""How `hold`, `throttle`, `pause` and `resume` say what they do; and that wrong usage needs no services."""

from __future__ import annotations

import json
from typing import Any

import pytest
from click.testing import CliRunner

from pipeline_app.views.cli import targets
from pipeline_app.views.cli.main import app
from pipeline_app.views.cli.throttle import limits_of


@pytest.mark.parametrize(
    ("counts", "text"),
    [
        ({"waiting": 1120, "pending": 3000, "held": 0}, "4,120 jobs match (1,120 waiting, 3,000 pending)"),
        ({"waiting": 1, "pending": 0}, "1 job matches (1 waiting)"),
    ],
)
def test_what_will_change_is_said_with_numbers(
    counts: dict[str, int], text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    targets.echo_jobs_meant("closes a=1 for all runs", counts)
    assert capsys.readouterr() == (f"closes a=1 for all runs: {text}\n", "")


def test_a_target_without_jobs_is_a_warning(capsys: pytest.CaptureFixture[str]) -> None:
    targets.echo_jobs_meant("closes a=1 for all runs", {"waiting": 0, "pending": 0})
    out, err = capsys.readouterr()
    assert out == "closes a=1 for all runs: 0 jobs match\n"
    assert err.startswith("warning: no job that is on its way matches")


@pytest.mark.parametrize(
    ("told", "alive", "out", "err"),
    [
        (8, 8, "hold h-1 is in force on 8 of 8 workers\n", ""),
        (7, 8, "hold h-1 is in force on 7 of 8 workers\n", "warning: 1 worker did not answer"),
        (0, 2, "hold h-1 is in force on 0 of 2 workers\n", "warning: 2 workers did not answer"),
        (0, 0, "hold h-1 is kept\n", "warning: no worker runs"),
    ],
)
def test_where_it_is_in_force_is_said(
    told: int, alive: int, out: str, err: str, capsys: pytest.CaptureFixture[str]
) -> None:
    targets.echo_in_force({"workers": told, "workers_alive": alive}, "hold h-1")
    printed = capsys.readouterr()
    assert printed.out == out
    assert printed.err.startswith(err)
    assert bool(printed.err) == bool(err)


def test_jobs_and_places_are_named() -> None:
    assert targets.jobs_meant({"b": "2", "a": "1"}, None) == "a=1,b=2 for all runs"
    assert targets.jobs_meant({}, "r1") == "all jobs for run r1"
    # what comes from tags does not steer a terminal
    assert targets.jobs_meant({"a": "\x1b[2J\n"}, "r1") == "a=\\x1b[2J  for run r1"
    assert targets.place("r1", None, None) == "run r1"
    assert targets.place("r1", "load", "kind__odd") == "run r1, stage load, partition kind__odd"


@pytest.mark.parametrize(
    ("row", "text"),
    [
        ({"rate_per_s": 39.0, "burst": 2}, "39/s (burst 2)"),
        ({"concurrency": 1200}, "1,200 at a time"),
        ({"budget": {"amount": 20.0, "unit": "usd", "period_s": 3600.0}}, "20 usd/1h"),
        ({"ordered": True}, "by priority"),
        ({"rate_per_s": 100 / 60, "concurrency": 3}, "100/m (burst 1), 3 at a time"),
    ],
)
def test_limits_are_written_as_they_were_given(row: dict[str, Any], text: str) -> None:
    nothing = {"rate_per_s": None, "burst": 1, "concurrency": None, "budget": None, "ordered": False}
    assert limits_of({**nothing, **row}) == text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("hold set --selector provider", "not a selector: 'provider'"),
        ("hold set --selector a=1 --until -5m", "is in the past"),
        ("hold set --selector a=1 --until +5parsecs", "not a time"),
        ("hold set", "Missing option '--selector'"),
        ("hold clear", "name what to open"),
        ("throttle set --selector a=1", "a throttle has a limit"),
        ("throttle set --selector a=1 --rate -5/s", "a rate is not negative"),
        ("throttle set --selector a=1 --rate 5/parsec", "unknown unit"),
        ("throttle set --selector a=1 --burst 2", "--burst is a part of a rate"),
        ("throttle set --selector a=1 --budget -5/d", "a budget is not negative"),
        ("throttle clear", "name what to clear"),
        ("pause", "Missing argument 'RUN'"),
        ("resume", "Missing argument 'RUN'"),
    ],
)
def test_wrong_usage_is_said_before_anything_is_asked(
    arguments: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Given no services
    monkeypatch.setenv("MONGODB_URL", "mongodb://127.0.0.1:1/x")

    # When it is called wrongly, then that is the error, not that nothing answers
    done = CliRunner().invoke(app, [*arguments.split(), "--json"])
    assert done.exit_code == 2
    assert message in json.loads(done.stderr)["error"]["message"]
