"""The soak, shortened: that it holds its load and prints what it should, and that it finds a leak."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

pytestmark = pytest.mark.timeout(400)


def soak(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "benchmarks.soak", *arguments]
    # What it keeps if its verdict is bad goes with the test's folder.
    env = {**os.environ, "TMPDIR": str(folder)}
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=380, check=False)


def test_it_holds_a_load_and_prints_what_it_sees(tmp_path: Path) -> None:
    """Given half a minute, when it is over, then all jobs came to rest and add up, and there were figures."""
    done = soak(tmp_path, "--minutes", "0.5", "--rate", "10", "--every", "5")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "verdict: well, but too short" in done.stdout
    at_rest, seeded = re.findall(r"jobs/s  ([\d,]+) of ([\d,]+) at rest  0 hints ready  lag [\d.]+ s", done.stdout)[-1]
    assert at_rest == seeded
    assert int(seeded) >= 50
    for name in ("mongod", "rabbitmq", "prefork", "prefork child", "threads", "seeder"):
        assert re.search(rf"^ +{name} +\d+  RSS +[\d.]+  USS +[\d.]+ MiB", done.stdout, re.MULTILINE), name


def test_it_finds_a_leak(tmp_path: Path) -> None:
    """Given a handler that keeps something of each job, when the soak is over, then it names the processes that run
    the handler, and no others.
    """
    done = soak(
        tmp_path, "--minutes", "0.6", "--warm-up", "0.2", "--rate", "20", "--leak-kb", "400", "--growth", "0.25"
    )
    assert done.returncode == 1, done.stdout + done.stderr
    names = set(re.findall(r"^(.+) \d+ grew by", done.stderr, re.MULTILINE))
    assert "threads" in names
    assert names <= {"threads", "prefork child"}
