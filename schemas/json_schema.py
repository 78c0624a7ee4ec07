"""TableDefinition -> JSON Schema (2020-12) of a record's value: what a publisher in any language can check against.

It says what decoding accepts, as far as JSON Schema can: more digits than a DECIMAL has and days that no month has are
left to decoding. A null value (a tombstone) is not described. In the other formats than JSON it describes the row that
the record holds, with Avro's values and Debezium's in the JSON form that stands for them.
"""

from __future__ import annotations

from typing import Any

from schemas.table import (
    ArrayType,
    Column,
    ColumnType,
    ExtraFields,
    RecordFormat,
    ScalarKind,
    StructType,
    TableDefinition,
)

_INTEGER_BITS = {
    ScalarKind.TINYINT: 8,
    ScalarKind.SMALLINT: 16,
    ScalarKind.INTEGER: 32,
    ScalarKind.BIGINT: 64,
}
_UNSIGNED_BITS = {
    ScalarKind.UTINYINT: 8,
    ScalarKind.USMALLINT: 16,
    ScalarKind.UINTEGER: 32,
    ScalarKind.UBIGINT: 64,
}
_SCALARS: dict[ScalarKind, dict[str, Any]] = {
    ScalarKind.REAL: {"type": "number"},
    ScalarKind.DOUBLE: {"type": "number"},
    ScalarKind.BOOLEAN: {"type": "boolean"},
    ScalarKind.VARCHAR: {"type": "string"},
    ScalarKind.DATE: {"type": "string", "format": "date"},
    ScalarKind.TIMESTAMP: {
        "type": ["string", "integer"],
        "description": "ISO 8601, in UTC if it carries no offset; or milliseconds since the epoch",
    },
    ScalarKind.TIMESTAMPTZ: {
        "type": ["string", "integer"],
        "format": "date-time",
        "description": "ISO 8601 with Z or an offset; or milliseconds since the epoch",
    },
    ScalarKind.UUID: {"type": "string", "format": "uuid"},
    ScalarKind.JSON: {},
}


def json_schema(table: TableDefinition) -> dict[str, Any]:
    """The schema of one record's value."""
    what = "Value of a record" if table.format is RecordFormat.JSON else f"Row of a {table.format} record"
    key = f"upserts by ({', '.join(table.primary_key)})" if table.is_keyed else "appends"
    properties = {column.name: _column_schema(column) for column in table.columns if column.name != table.extra_column}
    schema = {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": table.name,
        "description": f"{what} on topic {table.topic!r}; each record {key}.",
        "type": "object",
        "properties": properties,
        "required": [column.name for column in table.columns if not column.nullable],
    }
    if table.extra_fields is ExtraFields.PARK:
        _close(schema)
    return schema


def _close(schema: dict[str, Any]) -> None:
    """No other fields than the described ones, at any depth."""
    if "properties" in schema:
        schema["additionalProperties"] = False
    for inner in (*schema.get("properties", {}).values(), *filter(None, [schema.get("items")])):
        _close(inner)


def _column_schema(column: Column) -> dict[str, Any]:
    if column.nullable:
        return _nullable_schema(column.type)
    schema = _type_schema(column.type)
    return schema or {"not": {"type": "null"}}


def _nullable_schema(column_type: ColumnType) -> dict[str, Any]:
    schema = _type_schema(column_type)
    if not schema:
        return schema
    kinds = schema["type"] if isinstance(schema["type"], list) else [schema["type"]]
    return {**schema, "type": [*kinds, "null"]}


def _type_schema(column_type: ColumnType) -> dict[str, Any]:
    if isinstance(column_type, ArrayType):
        return {"type": "array", "items": _nullable_schema(column_type.element)}
    if isinstance(column_type, StructType):
        return {"type": "object", "properties": {f.name: _nullable_schema(f.type) for f in column_type.fields}}
    if bits := _INTEGER_BITS.get(column_type.kind):
        return {"type": "integer", "minimum": -(2 ** (bits - 1)), "maximum": 2 ** (bits - 1) - 1}
    if bits := _UNSIGNED_BITS.get(column_type.kind):
        return {"type": "integer", "minimum": 0, "maximum": 2**bits - 1}
    if column_type.kind is ScalarKind.DECIMAL:
        digits = f"{column_type.precision} digits, {column_type.scale} of them after the point"
        return {"type": ["number", "string"], "description": f"At most {digits}"}
    return _SCALARS[column_type.kind]
