"""What a table is: columns with types, a primary key or none, a topic, options.

A TableDefinition is immutable and complete: DuckDB DDL, ClickHouse DDL, the Arrow schema, the JSON Schema and the JSON
decoder are all generated from it and from nothing else. `migrations` keeps what each numbered file contributes, so that
a store that is behind can be brought forward.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum

#: Columns that Pintail adds to every table, in this order, after the declared ones.
METADATA_COLUMNS = ("_partition", "_offset", "_timestamp")


class ScalarKind(StrEnum):
    """The scalar column types, by their SQL names."""

    TINYINT = "TINYINT"
    SMALLINT = "SMALLINT"
    INTEGER = "INTEGER"
    BIGINT = "BIGINT"
    UTINYINT = "UTINYINT"
    USMALLINT = "USMALLINT"
    UINTEGER = "UINTEGER"
    UBIGINT = "UBIGINT"
    REAL = "REAL"
    DOUBLE = "DOUBLE"
    DECIMAL = "DECIMAL"
    BOOLEAN = "BOOLEAN"
    VARCHAR = "VARCHAR"
    DATE = "DATE"
    TIMESTAMP = "TIMESTAMP"
    TIMESTAMPTZ = "TIMESTAMPTZ"
    UUID = "UUID"
    JSON = "JSON"


class RecordFormat(StrEnum):
    """How a table's records are written."""

    JSON = "json"
    DEBEZIUM = "debezium"
    AVRO = "avro"
    DEBEZIUM_AVRO = "debezium-avro"

    @property
    def is_avro(self) -> bool:
        """True where records name a schema of the registry."""
        return self in (RecordFormat.AVRO, RecordFormat.DEBEZIUM_AVRO)

    @property
    def is_debezium(self) -> bool:
        """True where records are change envelopes."""
        return self in (RecordFormat.DEBEZIUM, RecordFormat.DEBEZIUM_AVRO)


class ExtraFields(StrEnum):
    """What becomes of a record's fields that are no column, nor declared in a column's STRUCT."""

    IGNORE = "ignore"
    PARK = "park"
    KEEP = "keep"


@dataclass(frozen=True)
class ScalarType:
    """A scalar. `precision` and `scale` belong to DECIMAL only; timestamps hold microseconds."""

    kind: ScalarKind
    precision: int | None = None
    scale: int | None = None


@dataclass(frozen=True)
class ArrayType:
    """A list of any length of one element type."""

    element: ColumnType


@dataclass(frozen=True)
class StructField:
    """One named field of a struct; fields are nullable."""

    name: str
    type: ColumnType


@dataclass(frozen=True)
class StructType:
    """A nested record with named fields."""

    fields: tuple[StructField, ...]


ColumnType = ScalarType | ArrayType | StructType


@dataclass(frozen=True)
class Column:
    """A declared column. `nullable=False` (NOT NULL or part of the key) makes a missing or null value a poison record.

    Column names match JSON field names exactly, case included.
    """

    name: str
    type: ColumnType
    nullable: bool = True
    #: How ClickHouse compresses it, such as ("Delta", "ZSTD(3)"); empty leaves that to ClickHouse.
    codec: tuple[str, ...] = ()


class PartitionBy(StrEnum):
    """What splits the parts of ClickHouse's table: the Kafka partition, or day or month of the record's timestamp."""

    PARTITION = "partition"
    DAY = "day"
    MONTH = "month"


@dataclass(frozen=True)
class ClickHouseOptions:
    """What only ClickHouse's copy of a table has."""

    #: Columns that an append table is ordered by, before the position.
    order_by: tuple[str, ...] = ()
    partition_by: PartitionBy | None = None
    #: None: as long as the store keeps them; 0: for ever.
    retention_seconds: int | None = None


@dataclass(frozen=True)
class Migration:
    """One numbered file of a table's folder, and the columns it adds (all of them for 001)."""

    number: int
    file: str
    added_columns: tuple[Column, ...]


@dataclass(frozen=True)
class TableDefinition:
    """A table as the newest migration leaves it."""

    name: str
    topic: str
    columns: tuple[Column, ...]
    primary_key: tuple[str, ...] = ()
    partitions: int = 4
    #: How long the store keeps rows, and ClickHouse unless its options say otherwise; None keeps them for ever.
    retention_seconds: int | None = None
    format: RecordFormat = RecordFormat.JSON
    extra_fields: ExtraFields = ExtraFields.IGNORE
    #: The column of type JSON that takes the extra fields; a column if and only if they are kept.
    extra_column: str | None = None
    migrations: tuple[Migration, ...] = field(default=())
    clickhouse: ClickHouseOptions = field(default=ClickHouseOptions())

    def __hash__(self) -> int:
        # The generated one visits every column, and what is derived from a table is looked up with every batch.
        return hash(self.name)

    @property
    def is_keyed(self) -> bool:
        """True for an upsert table, False for an append table."""
        return bool(self.primary_key)

    @property
    def history_seconds(self) -> int | None:
        """How long ClickHouse keeps rows; None keeps them for ever."""
        own = self.clickhouse.retention_seconds
        return self.retention_seconds if own is None else own or None

    @property
    def schema_version(self) -> int:
        """The number of the newest migration; 1 for a table built by hand."""
        return self.migrations[-1].number if self.migrations else 1

    @property
    def dead_letter_topic(self) -> str:
        """Where records that cannot be applied are parked."""
        return f"{self.topic}.dead-letters"

    @property
    def column_names(self) -> tuple[str, ...]:
        """The declared columns, in order, without the metadata columns."""
        return tuple(column.name for column in self.columns)

    def column(self, name: str) -> Column:
        """The column of that name; KeyError if there is none."""
        for column in self.columns:
            if column.name == name:
                return column
        raise KeyError(name)

    def migration(self, number: int) -> Migration:
        """The migration of that number; KeyError if there is none."""
        for migration in self.migrations:
            if migration.number == number:
                return migration
        raise KeyError(number)
