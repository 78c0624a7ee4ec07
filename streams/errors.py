"""Every operating error of Pintail, as a tree. Programmer errors are asserts.

    PintailError
    +- ConfigurationError          settings or table files that cannot be used
    |  +- TableFileError           a table file, with file, line and column
    |  +- TopicShapeError          a Kafka topic exists with another partition count
    |  +- ClickHouseShapeError     a ClickHouse table exists with another shape
    |  +- MissingProgramError      something the local stack needs is not installed
    +- StoreError                  the DuckDB side
    |  +- StoreLockedError         another process holds the partition's file
    |  +- StoreCorruptError        a partition file failed its integrity check
    |  +- LogGapError              Kafka no longer holds the offset the store needs; `kind` says how that came about
    |  +- RecoveryOrderedError     an operator ordered the partition to be recovered anew
    |  +- RecoveryRefusedError     an order to recover makes no sense, or was not carried out
    |  +- StaleEpochError          an effect was attempted under a revoked assignment
    +- SnapshotError               the snapshot repository
    |  +- SnapshotNotFoundError    no such version, or none at all
    |  +- SnapshotCorruptError     a block or manifest is missing or changed
    |  |  +- SnapshotKeyError      a block or manifest was written under another key
    |  +- SnapshotFencedError      another owner with a newer epoch has published or claimed
    |  +- SnapshotStoreUnsafeError Redis evicts or forgets (policy, persistence)
    |  +- SnapshotStoreUnavailableError  Redis is away, loading or full: retry (retriable)
    +- SinkError                   ClickHouse delivery
    |  +- SinkUnavailableError     refused, reset, timed out, overloaded: retry (retriable)
    |  |  +- SinkOverloadedError   too many parts: fewer and larger inserts are needed
    |  +- SinkRejectedError        ClickHouse answered with an error that only an operator can cure; carries its code
    |  |  +- RowsRefusedError      it is about the values of some row: the others can be delivered
    |  +- SinkFencedError          the BEFORE record was refused: another member owns the partition
    |  +- InexactRowsError         a partition cannot be rebuilt from the sink's rows exactly
    |  +- DeliveryBrokenError      a delivery met a fault that nobody foresaw; it is started anew
    +- SchemaRegistryError         the schemas that Avro records name; decoding waits for them
    |  +- SchemaRegistryUnavailableError  refused, reset, timed out, overloaded: retry (retriable)
    |  +- SchemaRegistryRejectedError     it answered with something that only an operator can cure
    +- GroupSilentError            the consumer group gives no sign of life; the worker ends, to be started again
    +- KafkaUnavailableError       Kafka gave no answer: retry (retriable)
    +- WorkerNameTakenError        another process runs under the worker's name; this one ends, or does not start
    +- LocalStackError             a server of `pintail dev` did not start, or another run holds its folder
    +- QueryRefusedError           a query got a refusal; carries the refusal's code
    +- PublishingError             a record that a client wrote was not acknowledged
    +- RequestTimeoutError         no reply before the deadline

Each error says what happened in its message and what to do about it in `hint`.
"""

from __future__ import annotations

from enum import StrEnum
from typing import TYPE_CHECKING, Self

# Re-exported: the root lives in schemas/, which imports nothing of streams/.
from schemas.errors import ConfigurationError as ConfigurationError
from schemas.errors import PintailError as PintailError
from schemas.errors import TableFileError as TableFileError

if TYPE_CHECKING:  # its room loads Arrow, which not every error needs
    from schemas.messages import Refusal


class TopicShapeError(ConfigurationError):
    """A Kafka topic exists with another partition count than its table says."""


class ClickHouseShapeError(ConfigurationError):
    """A ClickHouse table exists with another shape than its definition; the message shows the difference."""


class MissingProgramError(ConfigurationError):
    """A program that the local stack needs is not on this machine."""


class StoreError(PintailError):
    """The partition stores."""


class StoreLockedError(StoreError):
    """Another process holds the partition's file."""

    retriable = True


class StoreCorruptError(StoreError):
    """A partition file failed its integrity check or cannot be opened."""


class LogGapKind(StrEnum):
    """How a log came not to continue where a store ends; see streams.processes.log_gaps."""

    DELETED = "deleted"
    RECREATED = "recreated"
    BACKWARDS = "backwards"
    #: Found while reading on: Kafka's answer does not say which of them it is.
    OUT_OF_RANGE = "out_of_range"


class LogGapError(StoreError):
    """Kafka no longer holds the offset the store needs next; records would be skipped silently."""

    def __init__(self, message: str, *, hint: str = "", kind: LogGapKind = LogGapKind.OUT_OF_RANGE) -> None:
        super().__init__(message, hint=hint)
        self.kind = kind


class RecoveryOrderedError(StoreError):
    """An operator ordered the partition to be recovered anew; what it is doing ends."""


class RecoveryRefusedError(StoreError):
    """An order to recover that makes no sense as things are, or that was not carried out; the message says why."""


class StaleEpochError(StoreError):
    """An effect was attempted under an assignment that has been revoked."""


class SnapshotError(PintailError):
    """The snapshot repository."""


class SnapshotNotFoundError(SnapshotError):
    """No such version, or no snapshot at all."""


class SnapshotCorruptError(SnapshotError):
    """A block or a manifest is missing or changed. `blocks` names the blocks at fault, if blocks are."""

    def __init__(self, message: str, *, hint: str = "", blocks: frozenset[str] = frozenset()) -> None:
        super().__init__(message, hint=hint)
        self.blocks = blocks


class SnapshotKeyError(SnapshotCorruptError):
    """A block or a manifest was written under another key than the configured one; it may well be intact."""


class SnapshotFencedError(SnapshotError):
    """Another owner with a newer epoch has claimed the partition or published."""


class SnapshotStoreUnsafeError(SnapshotError):
    """Redis would evict or forget snapshots (eviction policy, no persistence)."""


class SnapshotStoreUnavailableError(SnapshotError):
    """Redis cannot be reached, is still loading, or is full; the same call may succeed later."""

    retriable = True


class SinkError(PintailError):
    """Delivery to ClickHouse."""


class SinkUnavailableError(SinkError):
    """ClickHouse refused, reset, timed out or is overloaded; the same insert may succeed later."""

    retriable = True


class SinkOverloadedError(SinkUnavailableError):
    """ClickHouse merges slower than inserts arrive ("too many parts"); the same insert succeeds later, and fewer and
    larger ones help."""


class SinkRejectedError(SinkError):
    """ClickHouse refused a statement for a reason that waiting does not cure. `code` is ClickHouse's error code."""

    def __init__(self, message: str, *, code: int, hint: str = "") -> None:
        super().__init__(message, hint=hint)
        self.code = code


class RowsRefusedError(SinkRejectedError):
    """Nothing of an insert was taken because of what a row of it holds. The same rows without that one can be taken."""


class SinkFencedError(SinkError):
    """The BEFORE record was refused: another member of the group owns the partition."""


class RebuildRefusedError(SinkError):
    """A table cannot be delivered anew as things are; the message says why. Nothing was changed."""


class InexactRowsError(SinkError):
    """What the sink holds of a partition cannot become a store's rows exactly."""


class DeliveryBrokenError(SinkError):
    """A delivery met a fault that nobody foresaw; it is started anew from its BEFORE record."""


class SchemaRegistryError(PintailError):
    """The schema registry. Decoding is tried again until it succeeds, whichever of the two it is."""


class SchemaRegistryUnavailableError(SchemaRegistryError):
    """The registry refused, reset, timed out or is overloaded; the same request may succeed later."""

    retriable = True


class SchemaRegistryRejectedError(SchemaRegistryError):
    """The registry answered, but neither with a schema nor that there is none: wrong user, wrong address."""


class GroupSilentError(PintailError):
    """The worker's consumer has dropped out of its group without an error; only a new process joins for sure."""


class WorkerNameTakenError(PintailError):
    """Another process runs under this worker's name: on the same data directory, or as the group's newer member."""


class LocalStackError(PintailError):
    """A server of the local stack did not start or died, or another run holds the data folder."""


class QueryRefusedError(PintailError):
    """A query got a refusal. `code` is one of schemas.messages.RefusalCode; `retriable` follows the refusal."""

    def __init__(
        self, message: str, *, code: str, hint: str = "", retriable: bool = False, retry_after_ms: int | None = None
    ) -> None:
        super().__init__(message, hint=hint)
        self.code = code
        self.retriable = retriable  # type: ignore[misc]  # a refusal decides per case
        #: Asking again earlier is of no use; None if nothing is known.
        self.retry_after_ms = retry_after_ms

    @classmethod
    def of(cls, refusal: Refusal, where: str = "") -> Self:
        """The error for a refusal that came as a reply; `where` comes before its message."""
        return cls(
            f"{where}{refusal.message}",
            code=refusal.code,
            hint=refusal.hint,
            retriable=refusal.retriable,
            retry_after_ms=refusal.retry_after_ms,
        )


class KafkaUnavailableError(PintailError):
    """Kafka gave no answer, or one that says to ask again."""

    retriable = True


class PublishingError(PintailError):
    """A record that a client wrote was not acknowledged; it may be in the log all the same."""

    retriable = True


class RequestTimeoutError(PintailError):
    """No reply came before the deadline."""

    retriable = True
