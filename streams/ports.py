"""The contracts between processes and adapters. Small on purpose; each comment is part of the contract.

Methods that are not `async` may block and are called from worker threads, never from the event loop.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import NamedTuple, Protocol, Self

import pyarrow as pa

from schemas.table import TableDefinition
from streams.batches import RecordBatch
from streams.positions import OffsetRange, TopicPartition


class ParkReason(StrEnum):
    """Why a record was parked; the value travels in the dead letter's `pintail.reason` header."""

    NOT_JSON = "not_json"
    NOT_AN_OBJECT = "not_an_object"
    INVALID_UTF8 = "invalid_utf8"
    TOO_LARGE = "too_large"
    TOO_DEEP = "too_deep"
    WRONG_TYPE = "wrong_type"
    OUT_OF_RANGE = "out_of_range"
    MISSING_VALUE = "missing_value"
    MISSING_KEY = "missing_key"
    BAD_KEY = "bad_key"
    NULL_IN_APPEND_TABLE = "null_in_append_table"
    NOT_A_CHANGE = "not_a_change"
    UNSUPPORTED_OPERATION = "unsupported_operation"
    NOT_AVRO = "not_avro"
    UNKNOWN_SCHEMA = "unknown_schema"
    UNUSABLE_SCHEMA = "unusable_schema"
    EXTRA_FIELD = "extra_field"
    REFUSED_BY_SINK = "refused_by_sink"
    NOT_A_REQUEST = "not_a_request"


@dataclass(frozen=True)
class ParkedRecord:
    """One record of a batch that cannot be applied: its index in the batch, and why, in words for its producer."""

    index: int
    reason: ParkReason
    detail: str


@dataclass(frozen=True)
class DecodedBatch:
    """A RecordBatch as typed columns. Every record of `source` is in exactly one of `rows`, `deletes`, `parked`.

    rows     the declared columns in order, in the table's Arrow types, then `_partition` int32, `_offset` int64,
             `_timestamp` timestamp[us, UTC]; ascending by `_offset`; keys may repeat (the last one wins)
    deletes  the key columns, then the same metadata columns; ascending by `_offset`; empty for append tables
    parked   ascending by index

    A pure function of (table, source) and of the schemas that Avro records name, which never change: decoding the same
    records again gives the same result.
    """

    table: TableDefinition
    source: RecordBatch
    rows: pa.Table
    deletes: pa.Table
    parked: tuple[ParkedRecord, ...]


class Decoder(Protocol):
    """Raw records to typed columns."""

    def decode(self, table: TableDefinition, batch: RecordBatch) -> DecodedBatch:
        """Thread-safe. Never raises because of what a record contains: such records are parked.

        Raises SchemaRegistryError when a schema that a record names cannot be had; nothing is decoded then, and the
        same call may succeed later."""
        ...


@dataclass(frozen=True)
class RegisteredSchema:
    """A schema of the registry. `kind` is AVRO, JSON or PROTOBUF; `references` are the texts of the schemas that `text`
    names types of, each after those that it refers to itself."""

    kind: str
    text: str
    references: tuple[str, ...] = ()


class SchemaRegistry(Protocol):
    """Where Avro records' schemas are. The schema of an id never changes; whoever asks may keep it for ever."""

    def schema(self, schema_id: int) -> RegisteredSchema | None:
        """The schema of that id; None if the registry says that there is none. Thread-safe, blocks.

        Raises SchemaRegistryError."""
        ...


@dataclass(frozen=True)
class DeadLetter:
    """A parked record with its provenance."""

    source: TopicPartition
    offset: int
    timestamp_ms: int
    key: bytes | None
    value: bytes | None
    reason: ParkReason
    detail: str
    dead_letter_topic: str

    @classmethod
    def of(cls, table: TableDefinition, batch: RecordBatch, parked: ParkedRecord) -> Self:
        """The letter of one record of a batch of the table's topic."""
        return cls(
            source=batch.topic_partition,
            offset=batch.offsets[parked.index],
            timestamp_ms=batch.timestamps_ms[parked.index],
            key=batch.keys[parked.index],
            value=batch.values[parked.index],
            reason=parked.reason,
            detail=parked.detail,
            dead_letter_topic=table.dead_letter_topic,
        )


class DeadLetters(Protocol):
    """Where parked records go."""

    async def park(self, letters: Sequence[DeadLetter]) -> None:
        """Returns once all are durable (acks=all). At least once: parking again after a crash repeats a letter with the
        same provenance headers, by which readers can tell."""
        ...


class ServingState(Protocol):
    """What answering needs to know about the worker it runs in."""

    @property
    def partitions_total(self) -> int:
        """Partitions of the query topic, over all workers."""
        ...

    def serving(self) -> Mapping[int, int]:
        """SERVING partitions of this worker -> epoch of their assignment."""
        ...

    async def wait_until_applied(self, partition: int, topic: str, offset: int) -> None:
        """Returns once the record at `offset` is applied; the caller bounds the wait.

        Raises StoreError when the partition leaves this worker."""
        ...


class Sink(Protocol):
    """Where micro-batches are delivered, one table per topic."""

    def last_offset(self, table: TableDefinition, topic_partition: TopicPartition) -> int | None:
        """The highest offset of the partition that the table holds, or None. Thread-safe. Raises SinkError."""
        ...

    def insert(
        self, table: TableDefinition, topic_partition: TopicPartition, offsets: OffsetRange, rows: pa.Table
    ) -> None:
        """All rows or none become visible; a second insert of the same range is dropped, also when the first one
        lands after it. Thread-safe.

        Raises RowsRefusedError when some row's values are at fault: nothing of this try lands. Raises SinkError; then
        the rows may still land later."""
        ...


class RecordedIntents(Protocol):
    """The BEFORE records of the sink, to be read.

    An empty range [n, n) says that everything below n is delivered and nothing is under way.
    """

    async def read(self, topic_partition: TopicPartition) -> OffsetRange | None:
        """The newest BEFORE record, or None if there is none."""
        ...


class DeliveryIntents(RecordedIntents, Protocol):
    """The BEFORE records of the sink: durable, and fenced by the consumer group's generation."""

    async def record(self, topic_partition: TopicPartition, offsets: OffsetRange) -> None:
        """Durable when it returns. Raises SinkFencedError when another member owns the partition."""
        ...


class DeliveredPage(NamedTuple):
    """Some rows of a table, in the schema of decoded rows (a keyed table's without tombstones)."""

    rows: pa.Table
    #: Ask for the rows after it; None if there are none.
    after: tuple[str, ...] | None


class DeliveredRows(Protocol):
    """What the sink holds, read back. All methods are thread-safe and block. Each raises SinkError."""

    def last_offset(self, table: TableDefinition, topic_partition: TopicPartition) -> int | None:
        """See Sink."""
        ...

    def verify(self, table: TableDefinition) -> bool:
        """True if the table is there; False if not. Raises InexactRowsError when its rows cannot come back exactly."""
        ...

    def count(self, table: TableDefinition, topic_partition: TopicPartition, *, below: int) -> int:
        """How many rows the pages will hold at most."""
        ...

    def page(
        self,
        table: TableDefinition,
        topic_partition: TopicPartition,
        *,
        below: int,
        after: tuple[str, ...] | None,
        rows_max: int,
    ) -> DeliveredPage:
        """The partition's next rows after `after` (None: the first ones), of those whose newest record is below the
        offset. Repeatable."""
        ...


class Watermarks(NamedTuple):
    """What the log of one topic partition holds: offsets in [low, high)."""

    low: int
    high: int
    #: Tells a topic from another one of the same name, created after it was deleted; None where the broker has no ids.
    topic_id: str | None = None


class PartitionLog(Protocol):
    """Control over what is read from Kafka for the partitions this worker is assigned."""

    async def watermarks(self, topic_partitions: Collection[TopicPartition]) -> Mapping[TopicPartition, Watermarks]:
        """The low and high watermarks at this moment, and which topics they are of."""
        ...

    async def read_from(self, positions: Mapping[TopicPartition, int]) -> None:
        """The next batch of each partition starts at its position; reading (re)starts."""
        ...

    def stop_reading(self, topic_partitions: Collection[TopicPartition]) -> None:
        """No further batch is delivered for these until `read_from`."""
        ...


class AuditedRange(NamedTuple):
    """A question of the audit: the rows of one partition of a table with offsets in a range, younger than a moment."""

    partition: int
    offsets: OffsetRange
    #: Offsets that are summed up together.
    bucket: int
    #: Kafka timestamp, in milliseconds; older rows are about to expire and count on no side.
    since_ms: int


class Digest(NamedTuple):
    """Of some rows: their number, and exact sums of their offsets and of both halves of each row's MD5. It needs no
    order, and differs if any row is missing, doubled or changed."""

    rows: int
    offsets: int
    upper: int
    lower: int


class Holdings(NamedTuple):
    """What one copy held at one moment: everything below `position` had arrived, and of what is above, nothing. (Of the
    append tables of the sink, `position` says no more than where the asked range's rows end.)"""

    position: int
    #: Number of the bucket -> digest, of those that hold rows.
    buckets: Mapping[int, Digest]


class HeldRow(NamedTuple):
    """A row of a copy; `digest` is the upper half of its MD5, `copies` how often it is there."""

    offset: int
    digest: int
    copies: int
