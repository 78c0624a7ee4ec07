"""Debezium's change envelopes -> rows and deletes. The one place that knows what op, before and after mean.

    c, r, u      the row is `after`. An update whose `before` has another key would leave a row behind: parked
    d            deletes the row whose key is in `before` or, if that is not all of it, in the Kafka key
    t and others parked: a truncated table and a message without a row are no change of one row
    null value   the tombstone after a delete: deletes by the Kafka key, again
JSON may come with its schema as {"schema": ..., "payload": ...} or without, values and keys alike; debezium_types says
what that means for values. Avro's envelopes come here once avro_records has read them.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from schemas.table import Column, ColumnType, TableDefinition
from streams.adapters.debezium_types import UnknownText, typed
from streams.adapters.exact_decoder import Change, KeyReader, json_key, tombstone, typed_key
from streams.adapters.exact_json import FaultError, Number, Typed, described, read_json, shortened
from streams.adapters.exact_typed import Bytes, JsonText
from streams.limits import JSON_DEPTH_MAX, RECORD_BYTES_MAX
from streams.ports import ParkReason

_ROW_OPERATIONS = ("c", "r", "u")
_SIDES = ("op", "before", "after")
_SCHEMA_FIRST = re.compile(r'[ \t\r\n]*\{[ \t\r\n]*"schema"[ \t\r\n]*:[ \t\r\n]*')
_THEN_PAYLOAD = re.compile(r'[ \t\r\n]*,[ \t\r\n]*"payload"[ \t\r\n]*:')
_UNAVAILABLE = "__debezium_unavailable_value"
_UNAVAILABLE_BASE64 = Bytes(_UNAVAILABLE.encode()).base64


class Unavailable(Typed):
    """What stands in for a value that the database did not tell: an unchanged, out-of-line value of PostgreSQL."""

    __slots__ = ()

    def written(self, column_type: ColumnType, name: str) -> object:
        """No column takes it."""
        del column_type
        raise FaultError(
            ParkReason.MISSING_VALUE,
            f"column {name!r}: the database left the unchanged value out; set REPLICA IDENTITY FULL on its table",
        )

    def json(self) -> object:
        """Nor can it be kept."""
        raise FaultError(ParkReason.MISSING_VALUE, "a value that the database left out cannot be kept")


class DebeziumRecords:
    """Reads the JSON records of the Debezium format. Thread-safe.

    A schema that converters embed is the same text in record after record and longer than the change itself, so the
    newest one of each topic is kept with the bytes in front of the payload, and only the payload is read."""

    def __init__(self) -> None:
        self._newest: dict[str, tuple[bytes, Mapping[str, Any]]] = {}

    def read(self, table: TableDefinition, key: bytes | None, value: bytes | None) -> Change:
        """What a record says. Raises FaultError."""
        if value is None:
            return tombstone(table, key, debezium_key)
        document, schema = self._payload(table.topic, value)
        if document is None:
            return tombstone(table, key, debezium_key)
        if not isinstance(document, dict):
            raise FaultError(ParkReason.NOT_AN_OBJECT, f"expected a change envelope, got {described(document)}")
        sides = {name: document[name] for name in _SIDES if name in document}
        return change_of(table, key, typed(sides, schema), debezium_key)

    def _payload(self, topic: str, value: bytes) -> tuple[object, Mapping[str, Any] | None]:
        """(payload, schema); exactly what reading the whole value gives, faults included."""
        front, schema = self._newest.get(topic, (b"", None))
        if front and value.startswith(front) and len(value) <= RECORD_BYTES_MAX:
            rest = value[len(front) :].rstrip(b" \t\r\n")
            # Fewer brackets than levels cannot nest too deep, also with the object around them.
            if rest.endswith(b"}") and rest.count(b"{") + rest.count(b"[") < JSON_DEPTH_MAX:
                try:
                    return read_json(rest[:-1]), schema
                except FaultError:
                    pass  # the whole value says what is wrong, or that the payload is not the last field
        document = read_json(value)
        payload, schema = _unwrapped(document)
        if schema is not None and (front := _in_front_of_payload(value)):
            self._newest[topic] = (front, schema)
        return payload, schema


def debezium_key(columns: list[Column], key: bytes) -> Mapping[str, object]:
    """The key columns that a Kafka key names: a JSON object with or without its schema, or plain text."""
    if key.lstrip()[:1] == b"{":
        try:
            document = read_json(key)
        except FaultError:
            document = None
        payload, schema = _unwrapped(document)
        if payload is not document and not isinstance(payload, dict) and len(columns) == 1:
            return {columns[0].name: typed(payload, schema)}
        fields = typed(payload, schema)
        if isinstance(fields, dict):
            return fields
    return json_key(columns, key)


def change_of(table: TableDefinition, key: bytes | None, envelope: object, read_key: KeyReader) -> Change:
    """The change that an envelope of typed values says. Raises FaultError."""
    assert isinstance(envelope, dict)
    operation = _text(envelope.get("op"))
    if operation is None:
        raise FaultError(
            ParkReason.NOT_A_CHANGE,
            "no text in 'op', so it is no change envelope; for records that were flattened to rows, "
            "the table's format is 'json' or 'avro'",
        )
    before, after = envelope.get("before"), envelope.get("after")
    if operation == "d":
        return _delete(table, key, before, read_key)
    if operation not in _ROW_OPERATIONS:
        what = "the source table was truncated" if operation == "t" else "only c, r, u and d change a row"
        raise FaultError(ParkReason.UNSUPPORTED_OPERATION, f"op {shortened(operation)}: {what}")
    if not isinstance(after, dict):
        raise FaultError(ParkReason.NOT_A_CHANGE, f"op {operation!r} needs an object in 'after'")
    row = {name: _checked(item) for name, item in after.items()}
    if operation == "u":
        _check_same_key(table, before, row)
    return Change(row)


def _delete(table: TableDefinition, key: bytes | None, before: object, read_key: KeyReader) -> Change:
    if not table.is_keyed:
        raise FaultError(ParkReason.UNSUPPORTED_OPERATION, "op 'd': a table without a primary key deletes nothing")
    if isinstance(before, dict) and all(before.get(name) is not None for name in table.primary_key):
        return Change(before, is_delete=True)
    return tombstone(table, key, read_key)


def _check_same_key(table: TableDefinition, before: object, after: Mapping[str, object]) -> None:
    """Databases announce a change of key as a delete and an insert; Debezium passes that on."""
    if not table.is_keyed or not isinstance(before, dict) or any(before.get(n) is None for n in table.primary_key):
        return
    try:
        old, new = typed_key(table, before), typed_key(table, after)
    except FaultError:
        return  # no row has such a key, or the row will say what is wrong with the new one
    if old != new:
        raise FaultError(
            ParkReason.UNSUPPORTED_OPERATION,
            f"op 'u' changes the key ({', '.join(table.primary_key)}) from {shortened(str(old))} to "
            f"{shortened(str(new))}: expected a delete and an insert",
        )


def _unwrapped(document: object) -> tuple[object, Mapping[str, Any] | None]:
    """(payload, schema) of {"schema": ..., "payload": ...}; else the document as it is."""
    if isinstance(document, dict) and document.keys() == {"schema", "payload"}:
        schema = document["schema"]
        if schema is None or (isinstance(schema, dict) and "type" in schema):
            return document["payload"], schema
    return document, None


def _in_front_of_payload(value: bytes) -> bytes:
    """The bytes up to the payload of {"schema": ..., "payload": ...}, if it is in this order; the value is JSON."""
    text = value.decode("utf-8")
    if not (start := _SCHEMA_FIRST.match(text)):
        return b""
    _, end = json.JSONDecoder().raw_decode(text, start.end())
    payload = _THEN_PAYLOAD.match(text, end)
    return text[: payload.end()].encode("utf-8") if payload else b""


def _text(value: object) -> str | None:
    if isinstance(value, UnknownText):
        return value.text
    return value if isinstance(value, str) and not isinstance(value, Number) else None


def _checked(value: object) -> object:
    """The value, or Unavailable if it stands for one that is."""
    if isinstance(value, list):
        return [_checked(item) for item in value]
    if isinstance(value, Bytes):
        return Unavailable() if value.base64 == _UNAVAILABLE_BASE64 else value
    text = value.text if isinstance(value, JsonText) else _text(value)
    return Unavailable() if text in (_UNAVAILABLE, _UNAVAILABLE_BASE64) else value
