"""What is let go at a pace: the duties that one worker at a time leads in small steps, many times a second.

Apart from the sweep, whose larger jobs would make it stumble.
"""

from __future__ import annotations

from collections.abc import Callable

from pipeline_app.control.leader import Duty, Leader
from pipeline_app.runtime import Runtime

#: What is done, in this order.
DUTIES: tuple[Duty, ...] = ()
EVERY_S = 0.1


def pacing(runtime: Callable[[], Runtime]) -> Leader:
    """A worker's part in the pacing."""
    return Leader(runtime, "pacing", DUTIES, EVERY_S)
