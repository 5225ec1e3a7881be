"""One bad thing must not keep the others from being done: for whoever works through many."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager

from pipeline_app.errors import BrokerError, StoreError

logger = logging.getLogger(__name__)


@contextmanager
def contained(what: str, which: object) -> Iterator[None]:
    """For duties: one thing that cannot be done, whatever it trips over, must not keep a duty from the others."""
    try:
        yield
    except (StoreError, BrokerError):
        raise
    except Exception:
        logger.exception("%s: %s", what, which)
