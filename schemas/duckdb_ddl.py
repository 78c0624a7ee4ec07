"""TableDefinition -> DuckDB DDL: what a partition store creates and how it brings an older table forward.

No PRIMARY KEY and no index (D5): keys are kept unique by how batches are applied. A column added later stands after the
metadata columns, so stores insert by name, never by position.
"""

from __future__ import annotations

from schemas.table import METADATA_COLUMNS, ArrayType, Column, ColumnType, ScalarKind, StructType, TableDefinition

METADATA_TYPES = {"_partition": "INTEGER", "_offset": "BIGINT", "_timestamp": "TIMESTAMPTZ"}
assert tuple(METADATA_TYPES) == METADATA_COLUMNS


def quote(identifier: str) -> str:
    """An identifier as DuckDB reads it, whatever it holds."""
    return '"' + identifier.replace('"', '""') + '"'


def quote_text(value: object) -> str:
    """A text as DuckDB reads it, whatever it holds."""
    return "'" + str(value).replace("'", "''") + "'"


def duckdb_type(column_type: ColumnType) -> str:
    """The type as DuckDB spells it."""
    if isinstance(column_type, ArrayType):
        return f"{duckdb_type(column_type.element)}[]"
    if isinstance(column_type, StructType):
        return f"STRUCT({', '.join(f'{quote(f.name)} {duckdb_type(f.type)}' for f in column_type.fields)})"
    if column_type.kind is ScalarKind.DECIMAL:
        return f"DECIMAL({column_type.precision}, {column_type.scale})"
    return column_type.kind.value


def create_table_sql(table: TableDefinition, *, qualified_name: str) -> str:
    """CREATE TABLE with the declared columns, then the metadata columns. `qualified_name` is used as it is."""
    columns = [_column_sql(column) for column in table.columns]
    columns += [f"{quote(name)} {kind} NOT NULL" for name, kind in METADATA_TYPES.items()]
    return f"CREATE TABLE {qualified_name} (\n    " + ",\n    ".join(columns) + "\n)"


def migration_sql(table: TableDefinition, number: int, *, qualified_name: str) -> list[str]:
    """The statements that bring a store from migration `number` - 1 to `number` (2 or more; 1 creates the table).

    Raises KeyError if the table has no such migration.
    """
    return [
        f"ALTER TABLE {qualified_name} ADD COLUMN {_column_sql(column)}"
        for column in table.migration(number).added_columns
    ]


def _column_sql(column: Column) -> str:
    return f"{quote(column.name)} {duckdb_type(column.type)}{'' if column.nullable else ' NOT NULL'}"
