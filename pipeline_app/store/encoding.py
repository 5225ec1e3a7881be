"""Documents with what users gave us in them: encoded once, and judged before they come near a transaction."""

from __future__ import annotations

from datetime import UTC

import bson
from bson.codec_options import CodecOptions
from bson.errors import BSONError
from bson.raw_bson import RawBSONDocument
from pymongo.errors import DocumentTooLarge

from pipeline_app.store.client import Document

_CODECS: CodecOptions[Document] = CodecOptions(tz_aware=True, tzinfo=UTC)

#: MongoDB's limit is 16 MiB a document; the rest is for what a transaction's log entry adds.
MAX_BYTES = 15 * 1024 * 1024


class UnstorableError(Exception):
    """MongoDB cannot hold it; the message says why."""


def encode(document: Document) -> RawBSONDocument:
    """The document in BSON. Raises UnstorableError."""
    raw = to_bytes(document)
    if len(raw) > MAX_BYTES:
        raise UnstorableError(
            f"it has {len(raw):,} bytes, MongoDB holds {MAX_BYTES:,}: keep it elsewhere and pass where it is"
        )
    return RawBSONDocument(raw)


def encoded(raw: bytes) -> RawBSONDocument:
    """A document that `encode` made in another process."""
    return RawBSONDocument(raw)


def to_bytes(document: Document) -> bytes:
    """The document as it is sent to another process, of any size. Raises UnstorableError."""
    try:
        return bson.encode(document)
    except (BSONError, DocumentTooLarge, OverflowError, UnicodeError, RecursionError) as exc:
        raise UnstorableError(str(exc) or type(exc).__name__) from exc


def from_bytes(data: bytes) -> Document:
    """The document in `data`, with the types that the store gives."""
    return bson.decode(data, _CODECS)
