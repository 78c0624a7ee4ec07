"""Which partition owns a key: Kafka's default partitioner (murmur2), so that every producer in any language agrees."""

from __future__ import annotations

from aiokafka.partitioner import murmur2


def partition_of(key: bytes, partitions_total: int) -> int:
    """The partition that Kafka's default partitioner gives a record with this key."""
    hashed: int = murmur2(key)
    return (hashed & 0x7FFFFFFF) % partitions_total


def key_of(partition: int, partitions_total: int) -> str:
    """A record key that belongs to the partition: asked with it, the partition's owner answers, and only for it."""
    number = 0
    while partition_of(str(number).encode(), partitions_total) != partition:
        number += 1
    return str(number)
