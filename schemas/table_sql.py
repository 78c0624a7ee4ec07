"""TableDefinition -> the SQL that would define it in one file: what people read, and what the parser reads back."""

from __future__ import annotations

from collections.abc import Iterator

from schemas.clickhouse_options import FOREVER
from schemas.duckdb_ddl import duckdb_type, quote
from schemas.table import ClickHouseOptions, Column, ExtraFields, TableDefinition
from schemas.table_options import format_retention


def table_sql(table: TableDefinition) -> str:
    """CREATE TABLE of the newest version; parsing it gives the same table with a single migration."""
    names = {column.name: _name(column.name) for column in table.columns}
    types = {column.name: duckdb_type(column.type) for column in table.columns}
    name_width, type_width = max(map(len, names.values())), max(map(len, types.values()))
    lines = [_column_line(c, names[c.name].ljust(name_width), types[c.name].ljust(type_width)) for c in table.columns]
    if table.is_keyed:
        lines.append(f"PRIMARY KEY ({', '.join(names[name] for name in table.primary_key)})")
    options = [f"topic='{table.topic}'", f"partitions={table.partitions}"]
    if table.retention_seconds is not None:
        options.append(f"retention='{format_retention(table.retention_seconds)}'")
    options.append(f"format='{table.format}'")
    if table.extra_fields is not ExtraFields.IGNORE:
        options.append(f"extra_fields='{table.extra_fields}'")
    if table.extra_column is not None:
        options.append(f"extra_column='{table.extra_column}'")
    options += _clickhouse_options(table.clickhouse)
    return f"CREATE TABLE {table.name} (\n    " + ",\n    ".join(lines) + f"\n) WITH ({', '.join(options)});"


def _column_line(column: Column, name: str, spelled: str) -> str:
    codec = f" CODEC({', '.join(column.codec)})" if column.codec else ""
    return f"{name} {spelled}{'' if column.nullable else ' NOT NULL'}{codec}".rstrip()


def _clickhouse_options(options: ClickHouseOptions) -> Iterator[str]:
    if options.order_by:
        yield f"clickhouse_order_by='{', '.join(options.order_by)}'"
    if options.partition_by is not None:
        yield f"clickhouse_partition_by='{options.partition_by}'"
    if options.retention_seconds is not None:
        kept = format_retention(options.retention_seconds) if options.retention_seconds else FOREVER
        yield f"clickhouse_retention='{kept}'"


def _name(name: str) -> str:
    return name if name.isascii() and name.isidentifier() else quote(name)
