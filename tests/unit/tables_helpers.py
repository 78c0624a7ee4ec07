"""Table folders written on the spot, and a Hypothesis strategy for every table that can be defined."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC, datetime
from decimal import Context, Decimal
from pathlib import Path

import pyarrow as pa
from hypothesis import strategies as st

from schemas.arrow_schema import rows_schema
from schemas.parser import parse_table
from schemas.table import (
    ArrayType,
    ClickHouseOptions,
    Column,
    ColumnType,
    ExtraFields,
    Migration,
    PartitionBy,
    RecordFormat,
    ScalarKind,
    ScalarType,
    StructField,
    StructType,
    TableDefinition,
)


def write_table(directory: Path, name: str, *files: str) -> Path:
    """A folder of that name with files 001_create.sql, 002_change.sql, ..."""
    folder = directory / name
    folder.mkdir(parents=True)
    for number, text in enumerate(files, start=1):
        what = "create" if number == 1 else "change"
        (folder / f"{number:03}_{what}.sql").write_text(text, encoding="utf-8")
    return folder


def table_of(directory: Path, *files: str, name: str = "things") -> TableDefinition:
    """The table that these files define."""
    return parse_table(write_table(directory, name, *files)).table


_KEY_KINDS = [k for k in ScalarKind if k not in (ScalarKind.REAL, ScalarKind.DOUBLE, ScalarKind.JSON)]
INTEGER_RANGES = {
    **{
        name: (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
        for name, bits in {"TINYINT": 8, "SMALLINT": 16, "INTEGER": 32, "BIGINT": 64}.items()
    },
    **{
        name: (0, 2**bits - 1) for name, bits in {"UTINYINT": 8, "USMALLINT": 16, "UINTEGER": 32, "UBIGINT": 64}.items()
    },
}
_FORBIDDEN_IN_NAMES = "\"'`\\."

field_names = st.one_of(
    st.from_regex(r"[A-Za-z][A-Za-z0-9_]{0,8}", fullmatch=True),
    st.sampled_from(["select", "Order", "table", "from", "all", "true", "primary", "key", "nan", "distinct"]),
    st.text(
        st.characters(codec="utf-8", exclude_categories=("C", "Z"), exclude_characters=_FORBIDDEN_IN_NAMES),
        min_size=1,
        max_size=8,
    ).filter(lambda name: not name.startswith("_")),
).filter(lambda name: name.casefold() != "null")


@st.composite
def scalar_types(draw: st.DrawFn, kinds: Sequence[ScalarKind] = tuple(ScalarKind)) -> ScalarType:
    kind = draw(st.sampled_from(kinds))
    if kind is not ScalarKind.DECIMAL:
        return ScalarType(kind)
    precision = draw(st.integers(1, 38))
    return ScalarType(kind, precision, draw(st.integers(0, precision)))


def _nested(inner: st.SearchStrategy[ColumnType]) -> st.SearchStrategy[ColumnType]:
    fields = st.lists(
        st.builds(StructField, field_names, inner), min_size=1, max_size=3, unique_by=lambda f: f.name.casefold()
    )
    return st.one_of(st.builds(ArrayType, inner), fields.map(lambda each: StructType(tuple(each))))


column_types: st.SearchStrategy[ColumnType] = st.recursive(scalar_types(), _nested, max_leaves=5)


@st.composite
def table_definitions(draw: st.DrawFn) -> TableDefinition:
    """Any table that a single file can define."""
    names = draw(st.lists(field_names, min_size=1, max_size=6, unique_by=str.casefold))
    key_length = draw(st.integers(0, min(2, len(names))))
    columns = [Column(name, draw(scalar_types(_KEY_KINDS)), nullable=False) for name in names[:key_length]]
    columns += [Column(name, draw(column_types), draw(st.booleans())) for name in names[key_length:]]
    key = tuple(draw(st.permutations(names[:key_length])))
    columns = [replace(column, codec=draw(codecs(column))) for column in columns]
    columns = draw(st.permutations(columns))
    for_extra = [c.name for c in columns if c.type == ScalarType(ScalarKind.JSON) and c.nullable]
    extra_fields = draw(st.sampled_from(ExtraFields) if for_extra else st.sampled_from(["ignore", "park"]))
    retention = draw(st.none() | st.integers(1, 36_500 * 86_400))
    return TableDefinition(
        name="things",
        topic=draw(st.from_regex(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,20}", fullmatch=True)),
        columns=tuple(columns),
        primary_key=key,
        partitions=draw(st.integers(1, 1024)),
        retention_seconds=retention,
        format=draw(st.sampled_from(RecordFormat)),
        extra_fields=ExtraFields(extra_fields),
        extra_column=draw(st.sampled_from(for_extra)) if extra_fields == "keep" else None,
        migrations=(Migration(1, "001_create.sql", tuple(columns)),),
        clickhouse=draw(clickhouse_options(columns, is_keyed=bool(key), retention=retention)),
    )


def codecs(column: Column) -> st.SearchStrategy[tuple[str, ...]]:
    """What ClickHouse takes for a column of that type."""
    everywhere: list[tuple[str, ...]] = [(), (), (), ("LZ4",), ("ZSTD(3)",), ("NONE",)]
    if column.type in (ScalarType(ScalarKind.BIGINT), ScalarType(ScalarKind.TIMESTAMP)):
        everywhere += [("Delta", "ZSTD"), ("DoubleDelta",), ("T64", "LZ4HC(9)")]
    return st.sampled_from(everywhere)


@st.composite
def clickhouse_options(
    draw: st.DrawFn, columns: Sequence[Column], *, is_keyed: bool, retention: int | None
) -> ClickHouseOptions:
    plain = [c.name for c in columns if not c.nullable and isinstance(c.type, ScalarType) and "," not in c.name]
    order_by = draw(st.lists(st.sampled_from(plain), max_size=2, unique=True)) if plain and not is_keyed else []
    kept: list[int | None] = [None, 0] if retention is None else [None, 0, 36_500 * 86_400]
    return ClickHouseOptions(
        order_by=tuple(order_by),
        partition_by=draw(st.sampled_from([None, PartitionBy.PARTITION] if is_keyed else [None, *PartitionBy])),
        retention_seconds=draw(st.sampled_from(kept)),
    )


def _values(column_type: ColumnType) -> st.SearchStrategy[object]:
    if isinstance(column_type, ArrayType):
        return st.lists(st.none() | _values(column_type.element), max_size=3)
    if isinstance(column_type, StructType):
        return st.fixed_dictionaries({f.name: st.none() | _values(f.type) for f in column_type.fields})
    return _scalar_values(column_type)


def _scalar_values(scalar: ScalarType) -> st.SearchStrategy[object]:
    kind = scalar.kind
    if kind.value in INTEGER_RANGES:
        return st.integers(*INTEGER_RANGES[kind.value])
    # Years that DuckDB, ClickHouse and Python all hold.
    first, last = datetime(1901, 1, 1), datetime(2298, 12, 31)  # noqa: DTZ001
    simple: dict[ScalarKind, st.SearchStrategy[object]] = {
        ScalarKind.REAL: st.floats(width=32, allow_nan=False),
        ScalarKind.DOUBLE: st.floats(allow_nan=False),
        ScalarKind.BOOLEAN: st.booleans(),
        ScalarKind.VARCHAR: st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=10),
        ScalarKind.DATE: st.dates(first.date(), last.date()),
        ScalarKind.TIMESTAMP: st.datetimes(first, last),
        ScalarKind.TIMESTAMPTZ: st.datetimes(first, last, timezones=st.just(UTC)),
        ScalarKind.UUID: st.uuids().map(str),
        ScalarKind.JSON: st.sampled_from(["1", '"text"', '{"a":[1,null]}', "[]", "true"]),
    }
    if kind is not ScalarKind.DECIMAL:
        return simple[kind]
    assert scalar.precision is not None
    assert scalar.scale is not None
    scale, limit = scalar.scale, 10**scalar.precision - 1
    return st.integers(-limit, limit).map(lambda digits: Decimal(digits).scaleb(-scale, Context(prec=50)))


@st.composite
def rows_of(draw: st.DrawFn, table: TableDefinition) -> pa.Table:
    """Up to three decoded rows of the table, metadata included."""
    columns = {c.name: _values(c.type) if not c.nullable else st.none() | _values(c.type) for c in table.columns}
    rows = draw(st.lists(st.fixed_dictionaries(columns), max_size=3))
    stamp = datetime(2026, 1, 2, 3, 4, 5, 678_000, UTC)
    metadata = [{"_partition": 3, "_offset": offset, "_timestamp": stamp} for offset in range(len(rows))]
    return pa.Table.from_pylist(
        [{**row, **extra} for row, extra in zip(rows, metadata, strict=True)], rows_schema(table)
    )
