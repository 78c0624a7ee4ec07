"""Avro records in the wire format of Confluent's serializers: a zero byte, the schema's id in four bytes, the value.

Schemas come from the registry once and are kept for ever, because an id never changes its meaning. That a registry does
not know an id is remembered for one batch only. Keys without the zero byte are read as in the formats without Avro.
"""

from __future__ import annotations

from collections.abc import Mapping

from schemas.table import Column, TableDefinition
from streams.adapters.avro_schemas import RecordSchema, record_schema
from streams.adapters.debezium_changes import change_of, debezium_key
from streams.adapters.exact_decoder import Change, ChangeReader, json_key, tombstone
from streams.adapters.exact_json import FaultError, shortened
from streams.limits import RECORD_BYTES_MAX
from streams.ports import ParkReason, SchemaRegistry

_MAGIC = 0
_PREFIX_BYTES = 5


class AvroRecords:
    """Reads the records of both Avro formats. Thread-safe: two threads may compile one schema, to the same result."""

    def __init__(self, registry: SchemaRegistry) -> None:
        self._registry = registry
        self._schemas: dict[tuple[int, bool], RecordSchema | FaultError] = {}

    def reader(self, *, debezium: bool) -> ChangeReader:
        """What reads the records of one batch. It raises FaultError for a record, SchemaRegistryError for all."""
        unknown: set[int] = set()

        def decoded(data: bytes) -> object:
            return self._decoded(data, unknown, debezium=debezium)

        def read_key(columns: list[Column], key: bytes) -> Mapping[str, object]:
            if key[:1] != bytes([_MAGIC]):
                return debezium_key(columns, key) if debezium else json_key(columns, key)
            fields = decoded(key)
            if not isinstance(fields, dict) and len(columns) == 1:
                return {columns[0].name: fields}
            if not isinstance(fields, dict):
                raise FaultError(
                    ParkReason.BAD_KEY, f"expected an Avro record with {', '.join(column.name for column in columns)}"
                )
            return fields

        def read(table: TableDefinition, key: bytes | None, value: bytes | None) -> Change:
            if value is None:
                return tombstone(table, key, read_key)
            fields = decoded(value)
            if not isinstance(fields, dict):
                raise FaultError(ParkReason.NOT_AN_OBJECT, "expected an Avro record, got a value of another type")
            return change_of(table, key, fields, read_key) if debezium else Change(fields)

        return read

    def _decoded(self, data: bytes, unknown: set[int], *, debezium: bool) -> object:
        if len(data) > RECORD_BYTES_MAX:
            raise FaultError(ParkReason.TOO_LARGE, f"{len(data)} bytes; the limit is {RECORD_BYTES_MAX}")
        if len(data) < _PREFIX_BYTES or data[0] != _MAGIC:
            raise FaultError(
                ParkReason.NOT_AVRO,
                "expected a zero byte and a schema id of four bytes in front of the Avro value, got "
                + shortened(data[:16].hex(" ")),
            )
        schema_id = int.from_bytes(data[1:_PREFIX_BYTES])
        try:
            return self._schema(schema_id, unknown, debezium=debezium).read(data, _PREFIX_BYTES)
        except FaultError as fault:
            raise FaultError(fault.reason, f"schema {schema_id}: {fault.detail}") from None

    def _schema(self, schema_id: int, unknown: set[int], *, debezium: bool) -> RecordSchema:
        """Raises FaultError, SchemaRegistryError."""
        found = self._schemas.get((schema_id, debezium))
        if found is None:
            registered = self._registry.schema(schema_id) if schema_id not in unknown else None
            if registered is None:
                unknown.add(schema_id)
                raise FaultError(ParkReason.UNKNOWN_SCHEMA, "the registry knows no schema of this id")
            try:
                found = record_schema(registered, debezium=debezium)
            except FaultError as fault:
                found = fault
            self._schemas[schema_id, debezium] = found
        if isinstance(found, FaultError):
            raise found
        return found
