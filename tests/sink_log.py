"""A partition log in memory, with holes and poison records, and what ClickHouse must hold of it."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from random import Random

from schemas.table import Column, ScalarKind, ScalarType, TableDefinition
from streams.batches import RecordBatch, size_of
from streams.ports import DeadLetter
from streams.positions import TopicPartition
from streams.processes.delivery import PartitionDelivery

BIGINT = ScalarType(ScalarKind.BIGINT)
TIMESTAMP_MS = 1_700_000_000_000


def append_table(name: str) -> TableDefinition:
    """A table of two numbers."""
    return TableDefinition(name, topic=f"{name}.events", columns=(Column("id", BIGINT, False), Column("value", BIGINT)))


def keyed_table(name: str) -> TableDefinition:
    """The same, with a key."""
    plain = append_table(name)
    return TableDefinition(name, topic=plain.topic, columns=plain.columns, primary_key=("id",))


@dataclass
class MemoryDeadLetters:
    """streams.ports.DeadLetters in a list."""

    letters: list[DeadLetter] = field(default_factory=list)

    async def park(self, letters: Sequence[DeadLetter]) -> None:
        """See streams.ports.DeadLetters."""
        self.letters += letters

    @property
    def offsets(self) -> list[int]:
        """Of the parked records, each once, ascending."""
        return sorted({letter.offset for letter in self.letters})


class PartitionLog:
    """Records at ascending offsets; `deliverable` are the offsets of those that are no poison."""

    def __init__(self, topic_partition: TopicPartition) -> None:
        self.topic_partition = topic_partition
        self.keys: list[bytes | None] = []
        self.values: list[bytes | None] = []
        self.offsets: list[int] = []
        self.deliverable: list[int] = []
        self.next_offset = 0

    def append(self, value: bytes | None, *, key: bytes | None = None, is_poison: bool = False) -> int:
        """The offset of the new record."""
        offset = self.next_offset
        self.keys.append(key)
        self.values.append(value)
        self.offsets.append(offset)
        if not is_poison:
            self.deliverable.append(offset)
        self.next_offset += 1
        return offset

    def skip(self, count: int) -> None:
        """Offsets without a record, as transactions and compaction leave them."""
        self.next_offset += count

    def fill(self, random: Random, records: int) -> None:
        """Rows {id: n, value: 7n}, now and then a hole, now and then a poison record."""
        for number in range(records):
            dice = random.random()
            if dice < 0.02:
                self.skip(random.randint(1, 5))
            if dice > 0.98:
                self.append(b"not json", is_poison=True)
            self.append(json.dumps({"id": number, "value": 7 * number}).encode())

    def batch(self, first_offset: int, next_offset: int) -> RecordBatch:
        """What a fetch from `first_offset` that ends before `next_offset` delivers."""
        chosen = [index for index, offset in enumerate(self.offsets) if first_offset <= offset < next_offset]
        values, keys = [self.values[i] for i in chosen], [self.keys[i] for i in chosen]
        return RecordBatch(
            *self.topic_partition,
            first_offset=first_offset,
            next_offset=next_offset,
            values=values,
            keys=keys,
            offsets=[self.offsets[i] for i in chosen],
            timestamps_ms=[TIMESTAMP_MS] * len(chosen),
            size_bytes=size_of(values, keys),
        )

    def fetches(self, start: int, random: Random, *, end: int | None = None) -> Iterator[RecordBatch]:
        """Everything from `start` on, or up to `end`, cut at random."""
        end = self.next_offset if end is None else end
        while start < end:
            cut = min(end, start + random.randint(1, 400))
            yield self.batch(start, cut)
            start = cut


async def submit_all(
    delivery: PartitionDelivery, log: PartitionLog, start: int | None, random: Random, *, end: int | None = None
) -> None:
    """Feeds the log from where `PartitionDelivery.start` said to go on, to its end or up to `end`."""
    for batch in log.fetches(start or 0, random, end=end):
        await delivery.submit(batch)
