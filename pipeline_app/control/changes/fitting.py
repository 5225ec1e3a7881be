"""Changing many jobs in one transaction, without those that have moved on since they were read.

Who calls: everything in the control plane that takes jobs from where they stand to somewhere else.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TypeVar

from pipeline_app.runtime import Runtime
from pipeline_app.store import transition
from pipeline_app.store.client import Document
from pipeline_app.store.transition import NotFittingError, Transition

Item = TypeVar("Item")


def apply_fitting(
    rt: Runtime, found: Mapping[str, Item], plan: Callable[[Transition, list[Item]], None]
) -> tuple[list[Item], list[Document]]:
    """Let `plan` write down what becomes of these, and carry it out for all that are still as they were.

    Args:
        found: `_id` of a job -> what is known of it.
        plan: fills in a transition; called again without those that did not fit.

    Returns those for which it was carried out, and the messages that were made. Raises StoreError: then it may have
    been carried out, and asking again finds that nothing fits.
    """
    left = dict(found)
    while left:
        whole = Transition(now=rt.store.now())
        plan(whole, list(left.values()))
        try:
            with rt.counting() as whole.worker:
                transition.apply(rt.store, whole)
            return list(left.values()), whole.messages
        except NotFittingError as exc:
            left = {key: item for key, item in left.items() if key not in exc.jobs}
    return [], []
