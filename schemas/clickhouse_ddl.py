"""TableDefinition -> ClickHouse DDL, and the shape a sink expects to find.

`expected_columns` spells types exactly as `system.columns.type` reports them, in the order in which
`create_table_sql` creates them, so that checking a shape is one comparison.

Append tables are MergeTree ordered by position, or by columns of the definition and then position. Keyed tables are
ReplacingMergeTree(_offset) ordered by the key: FINAL shows the newest row of each key, and `_deleted` = 1 marks a key
whose newest record was a tombstone.

On a cluster the rows are in replicated tables of the name with LOCAL_SUFFIX, one on every server, and the table itself
is Distributed over them: a Kafka partition is on one shard, so that an insert is one part there too.

ClickHouse has no null array and, but for a beta feature, no null struct: the sink delivers an empty array and a struct
whose fields are all null instead.
"""

from __future__ import annotations

import re

from schemas.table import (
    ArrayType,
    Column,
    ColumnType,
    PartitionBy,
    ScalarKind,
    ScalarType,
    StructType,
    TableDefinition,
)

#: How many inserts back ClickHouse recognises a deduplication token.
DEDUPLICATION_WINDOW = 10_000

#: What chooses the shard of a row.
SHARDING_KEY = "_partition"
LOCAL_SUFFIX = "_local"

#: Added by the sink after the declared columns; `_deleted` follows in keyed tables.
METADATA_TYPES = {
    "_topic": "LowCardinality(String)",
    "_partition": "UInt32",
    "_offset": "UInt64",
    "_timestamp": "DateTime64(3, 'UTC')",
}

#: As `system.tables.partition_key` shows them.
PARTITION_KEYS = {
    None: "",
    PartitionBy.PARTITION: "_partition",
    PartitionBy.DAY: "toYYYYMMDD(_timestamp)",
    PartitionBy.MONTH: "toYYYYMM(_timestamp)",
}

_SCALARS = {
    ScalarKind.TINYINT: "Int8",
    ScalarKind.SMALLINT: "Int16",
    ScalarKind.INTEGER: "Int32",
    ScalarKind.BIGINT: "Int64",
    ScalarKind.UTINYINT: "UInt8",
    ScalarKind.USMALLINT: "UInt16",
    ScalarKind.UINTEGER: "UInt32",
    ScalarKind.UBIGINT: "UInt64",
    ScalarKind.REAL: "Float32",
    ScalarKind.DOUBLE: "Float64",
    ScalarKind.BOOLEAN: "Bool",
    ScalarKind.VARCHAR: "String",
    ScalarKind.DATE: "Date32",
    ScalarKind.TIMESTAMP: "DateTime64(6, 'UTC')",
    ScalarKind.TIMESTAMPTZ: "DateTime64(6, 'UTC')",
    ScalarKind.UUID: "UUID",
    # The exact text: ClickHouse's JSON type keeps neither the spelling of numbers nor the order of fields.
    ScalarKind.JSON: "String",
}

# Tuple element names that `system.columns` shows in backquotes although they are plain words.
_QUOTED_WORDS = frozenset({"all", "distinct", "false", "from", "inf", "nan", "select", "table", "true"})


def quote(identifier: str) -> str:
    """An identifier as ClickHouse reads it, whatever it holds."""
    return "`" + identifier.replace("\\", "\\\\").replace("`", "\\`") + "`"


def quote_text(value: str) -> str:
    """A text as ClickHouse reads it, whatever it holds."""
    return "'" + value.replace("\\", "\\\\").replace("'", "\\'") + "'"


def clickhouse_type(column: Column | ColumnType) -> str:
    """The type as ClickHouse spells it; of a column with its nullability, of a bare type without."""
    if isinstance(column, Column):
        return _nullable_type(column.type) if column.nullable else clickhouse_type(column.type)
    if isinstance(column, ArrayType):
        return f"Array({_nullable_type(column.element)})"
    if isinstance(column, StructType):
        return f"Tuple({', '.join(f'{_element_name(f.name)} {_nullable_type(f.type)}' for f in column.fields)})"
    if column.kind is ScalarKind.DECIMAL:
        return f"Decimal({column.precision}, {column.scale})"
    return _SCALARS[column.kind]


def expected_columns(table: TableDefinition) -> list[tuple[str, str]]:
    """Name and type of every column, in order, as `system.columns` reports them."""
    columns = [(column.name, clickhouse_type(column)) for column in table.columns]
    columns += METADATA_TYPES.items()
    if table.is_keyed:
        columns.append(("_deleted", "UInt8"))
    return columns


def order_by(table: TableDefinition) -> tuple[str, ...]:
    """The columns of the sorting key."""
    return table.primary_key or (*table.clickhouse.order_by, "_partition", "_offset")


def has_position_projection(table: TableDefinition) -> bool:
    """True where the sorting key does not find a partition's last offset, and a projection does."""
    return bool(table.primary_key or table.clickhouse.order_by)


def ttl(table: TableDefinition) -> str:
    """The expression by which rows expire, as `system.tables.engine_full` shows it; empty if they never do."""
    seconds = table.history_seconds
    return "" if seconds is None else f"_timestamp + toIntervalSecond({seconds})"


def create_table_statements(table: TableDefinition, *, database: str, cluster: str = "") -> list[str]:
    """What creates the table, on all servers of the cluster if one is named; harmless when repeated."""
    if not cluster:
        return [create_table_sql(table, database=database)]
    name, local = (_qualified(table, database, suffix) for suffix in ("", LOCAL_SUFFIX))
    distributed = ", ".join(quote_text(part) for part in (cluster, database, table.name + LOCAL_SUFFIX))
    return [
        create_table_sql(table, database=database, cluster=cluster),
        f"CREATE TABLE IF NOT EXISTS {name}{on_cluster(cluster)} AS {local} "
        f"ENGINE = Distributed({distributed}, {SHARDING_KEY})",
    ]


def on_cluster(cluster: str) -> str:
    """What follows the name in a statement for all servers of the cluster; empty without one."""
    return f" ON CLUSTER {quote_text(cluster)}" if cluster else ""


def create_table_sql(
    table: TableDefinition,
    *,
    database: str | None = None,
    dedup_window: int = DEDUPLICATION_WINDOW,
    cluster: str = "",
) -> str:
    """CREATE TABLE IF NOT EXISTS: several sinks may start at once; compare with `expected_columns` afterwards.

    The last stored offset of a topic's partition is found fast in every table: by its order
    (`ORDER BY _partition DESC, _offset DESC LIMIT 1`), or by a projection (`max(_offset)`).
    """
    codecs = {column.name: codec_sql(column) for column in table.columns}
    body = [f"{quote(name)} {kind}{codecs.get(name, '')}" for name, kind in expected_columns(table)]
    replicated = "Replicated" if cluster else ""
    settings = {f"{'' if cluster else 'non_'}replicated_deduplication_window": str(dedup_window)}
    if has_position_projection(table):
        body.append("PROJECTION last_offset (SELECT _partition, max(_offset) GROUP BY _partition)")
    engine = f"{replicated}MergeTree"
    if table.is_keyed:
        settings["deduplicate_merge_projection_mode"] = "'rebuild'"
        engine = f"{replicated}ReplacingMergeTree(_offset)"
    lines = [
        f"CREATE TABLE IF NOT EXISTS {_qualified(table, database, LOCAL_SUFFIX if cluster else '')}"
        f"{on_cluster(cluster)} (",
        "    " + ",\n    ".join(body),
        f") ENGINE = {engine}",
    ]
    if table.clickhouse.partition_by is not None:
        lines.append(f"PARTITION BY {PARTITION_KEYS[table.clickhouse.partition_by]}")
    lines.append(f"ORDER BY ({', '.join(quote(name) for name in order_by(table))})")
    if ttl(table):
        lines.append(f"TTL {ttl(table)}")
    lines.append("SETTINGS " + ", ".join(f"{name} = {value}" for name, value in settings.items()))
    return "\n".join(lines)


def migration_sql(table: TableDefinition, number: int, *, database: str | None = None, cluster: str = "") -> list[str]:
    """The statements that bring the table from migration `number` - 1 to `number`; harmless when repeated. On a cluster
    the tables with the rows come first: the Distributed one must not ask them for what they lack.

    New columns go where `expected_columns` has them. Raises KeyError if the table has no such migration.
    """
    names = table.column_names
    return [
        f"ALTER TABLE {_qualified(table, database, suffix)}{on_cluster(cluster)} "
        f"ADD COLUMN IF NOT EXISTS {quote(column.name)} "
        f"{clickhouse_type(column)}{codec_sql(column)} AFTER {quote(names[names.index(column.name) - 1])}"
        for suffix in ((LOCAL_SUFFIX, "") if cluster else ("",))
        for column in table.migration(number).added_columns
    ]


def codec_sql(column: Column) -> str:
    """What follows the column's type; empty where ClickHouse decides."""
    return f" CODEC({', '.join(column.codec)})" if column.codec else ""


def _qualified(table: TableDefinition, database: str | None, suffix: str = "") -> str:
    name = quote(table.name + suffix)
    return f"{quote(database)}.{name}" if database else name


def _nullable_type(column_type: ColumnType) -> str:
    spelled = clickhouse_type(column_type)
    return f"Nullable({spelled})" if isinstance(column_type, ScalarType) else spelled


def _element_name(name: str) -> str:
    plain = re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name) and name.lower() not in _QUOTED_WORDS
    return name if plain else quote(name)
