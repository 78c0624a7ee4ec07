"""Which partition owns a key: Kafka's default partitioner (murmur2), so that every producer in any language agrees."""

from __future__ import annotations

from aiokafka.partitioner import murmur2


def partition_of(key: bytes, partitions_total: int) -> int:
    """The partition that Kafka's default partitioner gives a record with this key."""
    hashed: int = murmur2(key)
    return (hashed & 0x7FFFFFFF) % partitions_total
