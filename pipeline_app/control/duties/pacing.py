"""What is let go at a pace: the duties that one worker at a time leads in small steps, many times a second.

Apart from the sweep, whose larger jobs would make it stumble.
"""

from __future__ import annotations

from collections.abc import Callable

from pipeline_app.control.duties import hold_release, ordering, replaying, throttle_release
from pipeline_app.control.duties.leader import Duty, Leader
from pipeline_app.runtime import Runtime

#: What is done, in this order.
DUTIES: tuple[Duty, ...] = (
    Duty(do=ordering.give_turns),
    Duty(do=throttle_release.release_throttled),
    Duty(do=throttle_release.unlock_ended, every_s=1.0),
    Duty(do=hold_release.probe_held),
    Duty(do=hold_release.release_kept_by_nothing, every_s=0.5),
    Duty(do=replaying.replay_on),
)
EVERY_S = 0.1


def pacing(runtime: Callable[[], Runtime]) -> Leader:
    """A worker's part in the pacing."""
    return Leader(runtime, "pacing", DUTIES, EVERY_S)
