"""Publishing outside of a worker's hot path: for the sweep and for seeders."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from pipeline_app.errors import BrokerError
from pipeline_app.flow import forward
from pipeline_app.runtime import Runtime
from pipeline_app.store import messages
from pipeline_app.store.client import Document
from pipeline_app.store.messages import THEN

logger = logging.getLogger(__name__)


def publish_or_leave(rt: Runtime, documents: Sequence[Document]) -> bool:
    """Publish messages and note it; False if the broker is away: the sweep finds them unpublished, and tries again.

    Raises StoreError.
    """
    if not documents:
        return True
    try:
        forward.publish(rt, documents)
    except BrokerError as exc:
        logger.warning("not published: messages=%d: %s; the sweep will", len(documents), exc)
        return False
    messages.note_published(rt.store, [row["_id"] for row in documents if row["stage"] != THEN])
    return True
