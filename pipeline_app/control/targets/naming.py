"""Which holds or throttles are meant by an id, or by the selector (and run) that they were set with."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from pipeline_app.domain.selector import check_selector, written
from pipeline_app.domain.target import Target
from pipeline_app.errors import NotFoundError, UsageError
from pipeline_app.runtime import Runtime
from pipeline_app.store import manifests
from pipeline_app.store.client import Document


def find_meant(
    rt: Runtime,
    kind: str,
    prefix: str,
    rows: Callable[[], list[Document]],
    *,
    id: str | None,
    selector: Mapping[str, str] | None,
    run: str | None,
    where: str = "",
) -> list[Document]:
    """Those of `rows` that are meant.

    `kind` is what they are called, `prefix` begins their ids, `where` ends the sentence that there is none.
    Raises UsageError (neither was given, or the selector), NotFoundError (the run, or if there is none), StoreError.
    """
    if id is None and selector is None:
        raise UsageError(f"which {kind}?", hint="give its id, or the selector that it was set with")
    run = None if run is None else manifests.get(rt.store, run)["_id"]
    wanted = None if selector is None else Target(run=run, selector=check_selector(selector)).digest(prefix)
    found = [row for row in rows() if (id is None or row["_id"] == id) and (wanted is None or row["_id"] == wanted)]
    if not found:
        which = id or f"on {written(selector or {})}" + (f" for run {run}" if run else "")
        raise NotFoundError(f"there is no {kind} {which}{where}", hint=f"pipeline-app {kind} list shows them")
    return found
