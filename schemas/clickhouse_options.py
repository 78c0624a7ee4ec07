"""What a table file says about ClickHouse's copy of the table: `clickhouse_*` of WITH (...), CODEC (...) of a column.

All are optional. Called by the parser, once the columns are known. Deliveries rely on two rules here: an insert is one
part, so parts are split by nothing but the Kafka partition or the time of the records, where a micro-batch can end; and
ClickHouse keeps rows for at least as long as the store, which may have to be rebuilt from it.
"""

from __future__ import annotations

from collections.abc import Mapping
from difflib import get_close_matches

from schemas.sql_tokens import Kind, Token, TokenReader
from schemas.table import ClickHouseOptions, PartitionBy, ScalarType, TableDefinition
from schemas.table_options import parse_retention

#: As ClickHouse spells them.
_CODECS = ("NONE", "Default", "LZ4", "LZ4HC", "ZSTD", "Delta", "DoubleDelta", "Gorilla", "T64", "FPC", "GCD")
_BY_FOLDED_NAME = {name.casefold(): name for name in _CODECS}
_CODEC_HINT = "write CODEC(Delta, ZSTD(3)), after the column's type"
FOREVER = "forever"


def clickhouse_options(given: Mapping[str, Token], table: TableDefinition) -> ClickHouseOptions:
    """The options of a table, from its tokens by name. Raises TableFileError."""
    order_by, partition_by, retention = (
        given.get(f"clickhouse_{name}") for name in ("order_by", "partition_by", "retention")
    )
    return ClickHouseOptions(
        order_by=_order_by(order_by, table) if order_by else (),
        partition_by=_partition_by(partition_by, table) if partition_by else None,
        retention_seconds=_retention_seconds(retention, table) if retention else None,
    )


def _order_by(value: Token, table: TableDefinition) -> tuple[str, ...]:
    names = tuple(name.strip() for name in value.text.split(","))
    if table.is_keyed:
        raise value.at.error(
            "a table with a primary key is ordered by that key in ClickHouse, which replaces rows by it",
            hint=f"leave clickhouse_order_by out; PRIMARY KEY ({', '.join(table.primary_key)}) decides, in this order",
        )
    for name in names:
        if name not in table.column_names:
            near = get_close_matches(name, table.column_names, n=1)
            raise value.at.error(
                f"clickhouse_order_by: {name!r} is not a column of the table",
                hint=(f"did you mean {near[0]}? " if near else "") + "write columns with commas: 'origin, time_hour'",
            )
        column = table.column(name)
        if column.nullable or not isinstance(column.type, ScalarType):
            raise value.at.error(
                f"clickhouse_order_by: column {name!r} cannot order the table",
                hint="ClickHouse orders by scalars that are never null: declare it NOT NULL in 001, or leave it out",
            )
    if len(set(names)) < len(names):
        raise value.at.error("clickhouse_order_by names a column twice", hint="remove one")
    return names


def _partition_by(value: Token, table: TableDefinition) -> PartitionBy:
    if value.text not in [each.value for each in PartitionBy]:
        raise value.at.error(
            f"clickhouse_partition_by {value} is not known",
            hint="write 'partition' (Kafka's), or 'day' or 'month' of the record's timestamp; by anything else, one "
            "insert would become several parts, of which a crash could leave some",
        )
    chosen = PartitionBy(value.text)
    if table.is_keyed and chosen is not PartitionBy.PARTITION:
        raise value.at.error(
            "a table with a primary key cannot be split by time: ClickHouse replaces no row in another partition",
            hint="write clickhouse_partition_by='partition', or leave it out",
        )
    return chosen


def _retention_seconds(value: Token, table: TableDefinition) -> int:
    seconds = 0 if value.text == FOREVER else parse_retention(value)
    if seconds and (table.retention_seconds is None or seconds < table.retention_seconds):
        raise value.at.error(
            f"clickhouse_retention {value} is shorter than the table's retention",
            hint="a store that is rebuilt from ClickHouse would lack rows: make it at least as long, or set retention",
        )
    return seconds


def parse_codec(reader: TokenReader) -> tuple[str, ...]:
    """Reads what stands in CODEC (...), each with its arguments: ("Delta", "ZSTD(3)"). Raises TableFileError."""
    reader.expect("(", hint=_CODEC_HINT)
    codecs: list[str] = []
    while not codecs or reader.accept(","):
        token = reader.take()
        name = _BY_FOLDED_NAME.get(token.text.casefold())
        if name is None:
            raise token.at.error(f"there is no codec {token}", hint=f"codecs: {', '.join(_CODECS)}")
        codecs.append(name + _arguments(reader))
    reader.expect(")", hint=_CODEC_HINT)
    return tuple(codecs)


def _arguments(reader: TokenReader) -> str:
    if not reader.accept("("):
        return ""
    numbers: list[str] = []
    while not numbers or reader.accept(","):
        token = reader.take()
        if token.kind is not Kind.NUMBER or not token.text.isdigit():
            raise token.at.error(f"expected a whole number, found {token}", hint=_CODEC_HINT)
        numbers.append(token.text)
    reader.expect(")", hint=_CODEC_HINT)
    return f"({', '.join(numbers)})"
