"""`python -m tests.chaos.driver --kills 1000 --jobs 100000`: a chaos run; exit code 1 if anything broke.

With `--minutes` and no numbers, faults of every kind come for as long.
"""

from __future__ import annotations

import argparse
import signal
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

from tests.chaos.driver.run import chaos
from tests.chaos.driver.schedule import KINDS, Plan, mixed, numbered


def main() -> int:
    arguments = _arguments()
    # Told to stop, it ends what it started.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("told to stop"))
    numbers = {kind.replace("-", "_"): getattr(arguments, kind.replace("-", "_")) for kind in KINDS}
    faults = numbered(**numbers) or (mixed() if arguments.minutes else ())
    if arguments.every:
        faults = tuple(replace(entry, every_s=arguments.every) for entry in faults)
    plan = Plan(
        jobs=arguments.jobs,
        faults=faults,
        seconds=arguments.minutes * 60 if arguments.minutes else None,
        seed=arguments.seed,
        pause_s=arguments.pause,
        times=arguments.times,
    )
    say(f"seed {plan.seed}, {plan.jobs:,} jobs, {plan.members} mongod, {len(plan.workers)} workers; {plan.faults}")
    if arguments.folder is not None:
        arguments.folder.mkdir(parents=True)
        return _run(plan, arguments.folder)
    with tempfile.TemporaryDirectory(prefix="chaos-") as folder:
        return _run(plan, Path(folder))


def _run(plan: Plan, folder: Path) -> int:
    result = chaos(plan, folder, say)
    say(result.text)
    return 0 if result.holds else 1


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", type=int, default=2000, help="jobs in all; with --minutes, at most")
    for kind, (made, every_s) in KINDS.items():
        what = (made.__doc__ or "").splitlines()[0]
        parser.add_argument(f"--{kind}", type=int, default=0, help=f"{what} About every {every_s:.0f} s.")
    parser.add_argument("--minutes", type=float, help="how long faults of every kind come")
    parser.add_argument("--every", type=float, help="seconds between two faults of one kind, in the mean")
    parser.add_argument("--pause", type=float, default=0.05, help="seconds that a handler takes in the mean")
    parser.add_argument("--times", type=int, default=1, help="messages carry so many times as many jobs")
    parser.add_argument("--seed", type=int, default=1, help="of the random numbers")
    parser.add_argument("--folder", type=Path, help="a new folder that is kept, with logs and witness")
    return parser.parse_args()


def say(text: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {text}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
