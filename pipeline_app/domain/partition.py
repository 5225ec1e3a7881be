"""Which part of a stage's queue a job belongs to, and the names of queues.

Two different tag sets never share a queue by accident: every token is escaped so that the separator cannot occur in
it, and a key that would be too long for AMQP's 255 bytes ends in a digest of the whole.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence

DEFAULT = "default"
_SEPARATOR = "__"
#: Pipeline and stage names have at most 60 bytes each, so 2 * 60 + 2 dots + 120 stay below 255.
MAX_KEY = 120
#: Partitions of jobs that go in order, unless a pipeline says otherwise.
ORDER_PARTITIONS = 16
#: Begins their names: without the separator, as no partition by tags is called.
_ORDERED = "order-"
_PLAIN = frozenset(b"abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789-")


def target_tags(tags: Mapping[str, str], partition_by: Sequence[str] | None) -> dict[str, str]:
    """The tags that choose the partition: `partition_by` decides if given, else `quota_pool`, else all."""
    if partition_by is not None:
        return {key: tags[key] for key in sorted(partition_by) if key in tags}
    if "quota_pool" in tags:
        return {"quota_pool": tags["quota_pool"]}
    return {key: tags[key] for key in sorted(tags)}


def partition_key(tags: Mapping[str, str], partition_by: Sequence[str] | None = None) -> str:
    """The partition of a job with these tags: ASCII letters, digits, `-`, `_` and `~`, at most 120 of them.

    `{"kind": "test"}` gives `kind__test`; no tags give `default`.
    """
    chosen = target_tags(tags, partition_by)
    if not chosen:
        return DEFAULT
    key = _SEPARATOR.join(_escape(part) for pair in chosen.items() for part in pair)
    if len(key) <= MAX_KEY:
        return key
    # "~~" never comes out of _escape, so a shortened key differs from every whole one.
    digest = hashlib.sha256(key.encode()).hexdigest()[:40]
    return f"{key[: MAX_KEY - 42]}~~{digest}"


def job_partition(
    tags: Mapping[str, str], order_key: str | None, partition_by: Sequence[str] | None, order_partitions: int
) -> tuple[str, dict[str, str]]:
    """A job's partition, and the tags by which workers choose that partition.

    Tags decide, unless the job has an order key: jobs of one key go the same way, whatever their tags are.
    `order_partition` stands for a tag there.
    """
    if order_key is None:
        return partition_key(tags, partition_by), target_tags(tags, partition_by)
    digest = hashlib.sha256(order_key.encode("utf-8", "surrogatepass")).digest()
    number = str(int.from_bytes(digest[:8]) % order_partitions)
    return _ORDERED + number, {"order_partition": number}


def queue_name(pipeline: str, stage: str, partition: str) -> str:
    """`survey.load` for the default partition, else `survey.load.kind__test`."""
    base = f"{pipeline}.{stage}"
    return base if partition == DEFAULT else f"{base}.{partition}"


def queue_stage(queue: str) -> str:
    """`survey.load` of any of the stage's queues."""
    return ".".join(queue.split(".", 2)[:2])


def _escape(token: str) -> str:
    """`token` without `__` inside or `_` at its ends, reversibly; other bytes become `~` and two hex digits."""
    raw = token.encode("utf-8", "surrogatepass")
    out: list[str] = []
    for index, byte in enumerate(raw):
        inner = 0 < index < len(raw) - 1
        if byte in _PLAIN or (byte == 0x5F and inner and raw[index - 1] != 0x5F):
            out.append(chr(byte))
        else:
            out.append(f"~{byte:02x}")
    return "".join(out) or "~"
