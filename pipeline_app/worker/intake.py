"""What may reach a stage's task at all: looked at in the main process, before Celery makes anything of a message.

Celery trusts what is in its queues. A task's name that is no text ends the worker, a body that cannot be read costs a
slot of a pool of threads for good, a time in the message keeps it un-acknowledged until then. Such messages are none of
ours: they are rejected, and so get into the parked queue. Called by follow.py, for every message that is delivered.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import Any

from pipeline_app.domain.hint import is_text
from pipeline_app.flow.consume import StageTask
from pipeline_app.transport.topology import EXCHANGE

logger = logging.getLogger(__name__)

#: Headers by which Celery would wait, drop or count: nothing of ours has any of them.
_NOT_OURS = ("eta", "expires", "group")
#: What Celery uses of the others without looking; a name that is a list costs a thread.
_TYPES: dict[str, tuple[type, ...]] = {
    **dict.fromkeys(("parent_id", "shadow", "argsrepr", "kwargsrepr", "origin", "lang"), (str,)),
    **dict.fromkeys(("retries", "group_index", "replaced_task_nesting"), (int,)),
    "ignore_result": (bool,),
    "stamps": (dict,),
    "stamped_headers": (list,),
}


def guard(consumer: Any, handle: Callable[[Any], object]) -> Callable[[Any], None]:
    """What Celery's consumer does with a message, without what can end the worker."""
    lost = (*consumer.connection_errors, *consumer.channel_errors)

    def on_message(message: Any) -> None:
        try:
            problem = flaw(message) if _is_for_a_stage(consumer.app.tasks, message) else None
            if problem is None:
                handle(message)
                return
        except lost:
            raise
        except Exception as exc:  # noqa: BLE001 - whatever it is, the message must not come again and again
            problem = f"{type(exc).__name__}: {exc}"
        queue = (message.delivery_info or {}).get("routing_key")
        logger.error("parked: a message that is none of ours: queue=%s: %.300s", queue, problem)
        if not message.acknowledged:
            message.reject(requeue=False)

    return on_message


def flaw(message: Any) -> str | None:
    """Why this message of kombu's cannot be one for a stage; None if it can. Odd data may make it raise anything."""
    headers = message.headers
    if not isinstance(headers, Mapping) or not is_text(headers.get("task")):
        return "it names no task"
    if not is_text(headers.get("id")):
        return "it has no id"
    if headers.get("root_id") is not None and not is_text(headers["root_id"]):
        return "its root_id is no id"
    for name in _NOT_OURS:
        if headers.get(name) is not None:
            return f"it has {name}"
    if any(limit is not None for limit in headers.get("timelimit") or ()):
        return "it has a time limit"
    for name, types in _TYPES.items():
        if headers.get(name) is not None and not isinstance(headers[name], types):
            return f"its {name} is a {type(headers[name]).__name__}"
    # Decoded as JSON and nothing else: Celery's accept_content. Celery uses the same result afterwards.
    parts = message.payload
    if not isinstance(parts, (list, tuple)) or [type(part) for part in parts] != [list, dict, dict]:
        return "its body is not that of a task"
    return None


def _is_for_a_stage(tasks: Any, message: Any) -> bool:
    """Whether it came through our exchange, or to a stage by another way."""
    if (message.delivery_info or {}).get("exchange") == EXCHANGE.name:
        return True
    return isinstance(tasks.get((message.headers or {}).get("task")), StageTask)
