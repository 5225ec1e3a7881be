"""Tell every worker that flags have changed: a hold, a pause, a throttle, a cancelled run.

MongoDB has the truth, and every worker looks whether its version has changed twice a second; a word by Celery's remote
control makes it a matter of milliseconds, and tells who has heard it.
"""

from __future__ import annotations

import logging

from pipeline_app.errors import BrokerError
from pipeline_app.runtime import Runtime
from pipeline_app.store import workers

logger = logging.getLogger(__name__)

#: Name of the command that workers understand; see `pipeline_app.worker.follow`.
COMMAND = "pipeline_flags"
#: Who asks how many have heard it waits this long for the last of them.
ANSWERS_S = 1.0


def announce(rt: Runtime, *, count: bool = False) -> tuple[int, int]:
    """Announce a change; returns how many workers have heard it (with `count`), and how many live.

    Those that have not heard it see it within a second by themselves. Raises StoreError.
    """
    version = workers.bump(rt.store, workers.FLAGS)
    alive = len(workers.alive(rt.store)) if count else 0
    if rt.settings.broker_is_embedded or (count and not alive):
        return 0, alive
    try:
        told = rt.publisher.broadcast(COMMAND, {"version": version}, answers=alive, timeout_s=ANSWERS_S)
    except BrokerError as exc:
        logger.info("not announced: %s; workers look by themselves", exc)
        return 0, alive
    return told, alive
