"""RecordBatch: the records of one partition that one fetch delivered, as parallel columns.

It is the unit of the data path (D3). No Python object per record outlives decoding: ten thousand live ones would make
the cyclic garbage collector the bottleneck. Offsets ascend and may have holes.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from streams.positions import TopicPartition

Headers = tuple[tuple[str, bytes], ...]

#: What the objects of one record cost beyond the bytes of its value and key.
RECORD_OVERHEAD_BYTES = 160


@dataclass(slots=True, weakref_slot=True)
class RecordBatch:
    """Records in [first_offset, next_offset) of one topic partition.

    `first_offset` is the position the fetch started from and `next_offset` the position after it; between them lies
    every offset this batch accounts for, also those that hold no record (control records, compaction). An empty batch
    is legal: it moves the position past such offsets.
    """

    topic: str
    partition: int
    first_offset: int
    next_offset: int
    #: Raw record values; None is a tombstone.
    values: list[bytes | None] = field(default_factory=list)
    #: Raw record keys; None where the producer sent none.
    keys: list[bytes | None] = field(default_factory=list)
    offsets: list[int] = field(default_factory=list)
    #: Kafka record timestamps, milliseconds since the epoch.
    timestamps_ms: list[int] = field(default_factory=list)
    #: Index in the batch -> headers, for records that have any.
    headers: dict[int, Headers] = field(default_factory=dict)
    #: What it costs in memory, about: see `size_of`.
    size_bytes: int = 0
    #: The partition's high watermark when the batch was fetched; None if unknown.
    high_watermark: int | None = None
    #: The consumer group's generation under which the batch was fetched; a later one makes it stale.
    generation: int = 0

    def __len__(self) -> int:
        return len(self.offsets)

    def __str__(self) -> str:
        return f"{self.topic}[{self.partition}] [{self.first_offset}, {self.next_offset}) of {len(self)} records"

    @property
    def topic_partition(self) -> TopicPartition:
        """Where the records come from."""
        return TopicPartition(self.topic, self.partition)

    def starting_at(self, offset: int) -> RecordBatch:
        """This batch without the records below `offset`; itself if there are none."""
        if offset <= self.first_offset:
            return self
        cut = slice(bisect_left(self.offsets, offset), len(self))
        return self._part(cut, first_offset=min(offset, self.next_offset), next_offset=self.next_offset)

    def ending_at(self, offset: int) -> RecordBatch:
        """This batch without the records at `offset` and above; itself if there are none."""
        if offset >= self.next_offset:
            return self
        cut = slice(0, bisect_left(self.offsets, offset))
        return self._part(cut, first_offset=self.first_offset, next_offset=max(offset, self.first_offset))

    def _part(self, cut: slice, *, first_offset: int, next_offset: int) -> RecordBatch:
        values, keys = self.values[cut], self.keys[cut]
        return RecordBatch(
            topic=self.topic,
            partition=self.partition,
            first_offset=first_offset,
            next_offset=next_offset,
            values=values,
            keys=keys,
            offsets=self.offsets[cut],
            timestamps_ms=self.timestamps_ms[cut],
            headers={
                index - cut.start: headers for index, headers in self.headers.items() if cut.start <= index < cut.stop
            },
            size_bytes=size_of(values, keys),
            high_watermark=self.high_watermark,
            generation=self.generation,
        )


def headers_of(headers: Iterable[tuple[str, bytes | None]]) -> Headers:
    """Of one record, as a consumer gives them: in Kafka their values may be null."""
    return tuple((name, value or b"") for name, value in headers)


def size_of(values: Sequence[bytes | None], keys: Sequence[bytes | None]) -> int:
    """Bytes that records take up in memory, about. Headers, which few records have, are left out."""
    return sum(map(len, filter(None, values))) + sum(map(len, filter(None, keys))) + RECORD_OVERHEAD_BYTES * len(values)


def joined(batches: Sequence[RecordBatch]) -> RecordBatch:
    """Batches of one partition, each starting where the one before it ends, as one; at least one is needed."""
    if len(batches) == 1:
        return batches[0]
    first, last = batches[0], batches[-1]
    whole = RecordBatch(
        topic=first.topic,
        partition=first.partition,
        first_offset=first.first_offset,
        next_offset=last.next_offset,
        high_watermark=last.high_watermark,
        generation=last.generation,
    )
    expected = first.first_offset
    for batch in batches:
        assert batch.first_offset == expected, f"{batch} does not follow offset {expected}"
        expected = batch.next_offset
        whole.headers.update({len(whole) + index: headers for index, headers in batch.headers.items()})
        whole.values += batch.values
        whole.keys += batch.keys
        whole.offsets += batch.offsets
        whole.timestamps_ms += batch.timestamps_ms
        whole.size_bytes += batch.size_bytes
    return whole


def contiguous(batches: Iterable[RecordBatch]) -> list[RecordBatch]:
    """Batches of one partition number, of any of its topics, with those of a topic that continue each other joined: a
    trickle arrives in batches of a record or two, and each batch costs a decoder far more than a record."""
    runs: dict[str, list[list[RecordBatch]]] = {}
    for batch in batches:
        of_topic = runs.setdefault(batch.topic, [])
        if of_topic and of_topic[-1][-1].next_offset == batch.first_offset:
            of_topic[-1].append(batch)
        else:
            of_topic.append([batch])
    return [joined(run) for of_topic in runs.values() for run in of_topic]
