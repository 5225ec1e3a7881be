"""Check the model with spin: as it is it must hold, and each broken variant must fail by the property that names it.

    python docs/model/check.py [--long] [NAME ...]

Called by `make model`, by `make model LONG=1` with more faults, and by tests/acceptance/test_model.py. Needs spin and a
C compiler. Ends with 1 if anything is not as expected.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

MODEL = Path(__file__).with_name("protocol.pml")
#: What pan says when a path is longer than it may be: then it has not seen everything.
TRUNCATED = "max search depth too small"


@dataclass(frozen=True, kw_only=True)
class Check:
    """One way to look at the model."""

    name: str
    #: What protocol.pml is made with.
    defines: Sequence[str] = ()
    #: The property that must fail; None if all must hold.
    fails: str | None = None
    #: Look for cycles, too: without any, every run comes to its end.
    cycles: bool = False
    #: Only asked for by `--long`: minutes, and some gigabytes.
    long: bool = False


CHECKS = (
    Check(name="one job", defines=["FAULTS=2"]),
    Check(name="one job, every run ends", defines=["FAULTS=1"], cycles=True),
    Check(name="one job, long handlers acknowledged early", defines=["FAULTS=1", "EARLY_ACK"], cycles=True),
    Check(name="one job, two leaders", defines=["FAULTS=1", "LEADERS=2"]),
    Check(name="a chunk of two jobs", defines=["FAULTS=1", "JOBS=2", "CHUNK=2"]),
    Check(name="two jobs", defines=["FAULTS=1", "JOBS=2", "STAGES=1"]),
    # A broker that loses and doubles nothing: then even the duty that looks for lost hints is not needed.
    Check(name="a reliable broker alone", defines=["FAULTS=1", "RELIABLE", "NO_FORGOTTEN"], cycles=True),
    Check(name="one job, three faults", defines=["FAULTS=3"], long=True),
    Check(name="one job, two faults, every run ends", defines=["FAULTS=2", "EARLY_ACK"], cycles=True, long=True),
    Check(name="one job, three workers", defines=["FAULTS=2", "WORKERS=3"], long=True),
    Check(name="one job, two leaders, two faults", defines=["FAULTS=2", "LEADERS=2"], long=True),
    Check(name="a chunk of two jobs, two faults", defines=["FAULTS=2", "JOBS=2", "CHUNK=2"], long=True),
    Check(name="two jobs, two faults", defines=["FAULTS=2", "JOBS=2", "STAGES=1"], long=True),
    # The five that the chaos tests break, too.
    Check(name="acknowledged first", defines=["ACK_FIRST"], fails="known_before_acknowledged"),
    Check(name="forwarded first", defines=["FORWARD_FIRST"], fails="recorded_before_forwarded"),
    Check(name="claim without compare-and-set", defines=["NO_CAS"], fails="one_at_a_time"),
    Check(name="lease without renewal", defines=["NO_RENEWAL"], fails="one_at_a_time"),
    Check(name="outputs of a late worker", defines=["LATE_OUTPUT"], fails="outputs_are_the_recorders"),
    # What the first two lead to when nobody looks for lost hints.
    Check(
        name="acknowledged first, and nobody looks",
        defines=["ACK_FIRST", "RELIABLE", "NO_FORGOTTEN", "NO_ORDER_RULES"],
        fails="nothing_lost",
    ),
    Check(
        name="forwarded first, and nobody looks",
        defines=["FORWARD_FIRST", "RELIABLE", "NO_FORGOTTEN", "NO_ORDER_RULES"],
        fails="nothing_lost",
    ),
    # With somebody who looks, they cost time and no job.
    Check(name="acknowledged first, and somebody looks", defines=["ACK_FIRST", "NO_ORDER_RULES"]),
    Check(name="forwarded first, and somebody looks", defines=["FORWARD_FIRST", "NO_ORDER_RULES"]),
    # And the other guards. Of the claim's token and what a job names, either keeps a record from happening twice.
    Check(name="record without the claim's token alone", defines=["NO_TOKEN"]),
    Check(name="record without token and guard", defines=["NO_TOKEN", "NO_GUARD"], fails="recorded_once"),
    Check(name="record of jobs that moved on", defines=["NO_GUARD"], fails="cancelled_for_good"),
    Check(name="nobody looks for unpublished messages", defines=["NO_UNPUBLISHED", "FAULTS=0"], fails="nothing_lost"),
    Check(name="nobody looks for lost hints", defines=["NO_FORGOTTEN"], fails="nothing_lost"),
    Check(name="nobody gives back", defines=["NO_GIVE_BACK"], fails="nothing_lost"),
)


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What spin found."""

    #: The property that failed first, `cycle`, or None.
    failed: str | None
    states: int
    seconds: float


def ask(check: Check) -> Answer:
    """Let spin look at every state. Raises RuntimeError if it cannot."""
    begin = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="pipeline-model-") as name:
        folder = Path(name)
        _run(folder, "spin", *(f"-D{define}" for define in check.defines), "-a", str(MODEL))
        kind = ["-DNP"] if check.cycles else ["-DSAFETY"]
        compiler = os.environ.get("CC", "cc")
        # What fails does so soon: it would take longer to compile it well.
        effort = "-O0" if check.fails else "-O1"
        _run(folder, compiler, effort, "-w", *kind, "-DNOFAIR", "-DCOLLAPSE", "-DMEMLIM=12000", "-o", "pan", "pan.c")
        # -E: that processes wait at the end is what Judge is there for.
        said = _run(folder, "./pan", "-E", "-m1000000", *(["-l"] if check.cycles else []))
    errors, states = re.search(r"errors: (\d+)", said), re.search(r"(\d+) states, stored", said)
    if errors is None or states is None or TRUNCATED in said or "out of memory" in said:
        raise RuntimeError(f"spin did not come to an end:\n{said[-2000:]}")
    failed = None
    if errors[1] != "0":
        found = re.search(r"assertion violated \(?(\w+)", said)
        failed = found[1] if found else "cycle" if "non-progress cycle" in said else said[:200]
    return Answer(failed=failed, states=int(states[1]), seconds=time.monotonic() - begin)


def _run(folder: Path, *command: str) -> str:
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)  # noqa: S603 - our own words
    if done.returncode or "Error:" in done.stdout:
        raise RuntimeError(f"{command[0]} failed:\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
    return done.stdout


def main() -> None:
    """Print what spin says to each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help="only those whose name has this in it")
    parser.add_argument("--long", action="store_true", help="those that take minutes, too")
    options = parser.parse_args()
    wrong = 0
    for check in CHECKS:
        if (check.long and not options.long) or (options.names and not any(n in check.name for n in options.names)):
            continue
        answer = ask(check)
        as_expected = answer.failed == check.fails
        wrong += not as_expected
        verdict = f"fails: {answer.failed}" if answer.failed else "holds"
        expected = "" if as_expected else f"   EXPECTED: {check.fails or 'holds'}"
        print(f"{check.name:46} {verdict:34} {answer.states:>11,} states {answer.seconds:6.1f} s{expected}", flush=True)
    if wrong:
        sys.exit(f"{wrong} not as expected")


if __name__ == "__main__":
    main()
