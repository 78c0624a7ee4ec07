"""The fields of a record that its table does not declare: at the top, and in the STRUCTs of its columns at any depth.

What becomes of them is the table's policy (schemas.table.ExtraFields), which exact_decoder applies.
"""

from __future__ import annotations

from collections.abc import Mapping

from schemas.table import ArrayType, ColumnType, StructType, TableDefinition
from streams.adapters.exact_json import Typed

_NOTHING = object()


def extra_fields(table: TableDefinition, fields: Mapping[str, object]) -> dict[str, object]:
    """The undeclared fields in the record's own shape: {"zip": 1} in column address is {"address": {"zip": 1}}.
    Elements of an array that have none are null. A field named as the column that keeps extra fields is one itself.

    The values of the columns have been converted before, so they are of the columns' shape.
    """
    return _of_object(fields, _declared(table))


def path_of_first(table: TableDefinition, extra: Mapping[str, object]) -> str:
    """Where the first undeclared field is, as far as names go: address.zip."""
    declared, path, rest = _declared(table), [], dict(extra)
    while True:
        name, value = next(iter(rest.items()))
        path.append(name)
        column_type = declared.get(name)
        while isinstance(column_type, ArrayType):
            assert isinstance(value, list)
            column_type, value = column_type.element, next(item for item in value if item is not None)
        if not isinstance(column_type, StructType):
            return ".".join(path)
        assert isinstance(value, dict)
        declared, rest = {field.name: field.type for field in column_type.fields}, value


def _declared(table: TableDefinition) -> dict[str, ColumnType]:
    return {column.name: column.type for column in table.columns if column.name != table.extra_column}


def _of_object(fields: Mapping[str, object], declared: Mapping[str, ColumnType]) -> dict[str, object]:
    extra: dict[str, object] = {}
    for name, value in fields.items():
        rest = _of_value(value, declared[name]) if name in declared else value
        if rest is not _NOTHING:
            extra[name] = rest
    return extra


def _of_value(value: object, column_type: ColumnType) -> object:
    """What of a value its type does not declare, or _NOTHING."""
    if not isinstance(column_type, ArrayType | StructType):
        return _NOTHING
    if isinstance(value, Typed):
        value = value.json()
    if isinstance(column_type, StructType) and isinstance(value, dict):
        declared = {field.name: field.type for field in column_type.fields}
        return _of_object(value, declared) or _NOTHING
    if isinstance(column_type, ArrayType) and isinstance(value, list):
        rests = [_of_value(item, column_type.element) for item in value]
        if any(rest is not _NOTHING for rest in rests):
            return [None if rest is _NOTHING else rest for rest in rests]
    return _NOTHING
