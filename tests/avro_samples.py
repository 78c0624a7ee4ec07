"""Avro records as Confluent's serializers write them, by fastavro, under schemas that a registry in memory holds."""

from __future__ import annotations

import io
import json
from typing import Any

import fastavro

from streams.errors import SchemaRegistryUnavailableError
from streams.ports import RegisteredSchema


class MemoryRegistry:
    """streams.ports.SchemaRegistry."""

    def __init__(self) -> None:
        self.schemas: list[RegisteredSchema] = []
        #: Ids asked for, in order.
        self.asked: list[int] = []
        self.is_away = False

    def register(self, schema: Any, *references: Any, kind: str = "AVRO") -> int:
        """Adds a schema; returns its id."""
        text = schema if isinstance(schema, str) else json.dumps(schema)
        self.schemas.append(RegisteredSchema(kind, text, tuple(map(json.dumps, references))))
        return len(self.schemas)

    def schema(self, schema_id: int) -> RegisteredSchema | None:
        """See SchemaRegistry."""
        self.asked.append(schema_id)
        if self.is_away:
            raise SchemaRegistryUnavailableError("the registry is away")
        return self.schemas[schema_id - 1] if 1 <= schema_id <= len(self.schemas) else None


def framed(schema_id: int, content: bytes) -> bytes:
    """The wire format."""
    return b"\0" + schema_id.to_bytes(4) + content


def binary(schema: Any, value: Any) -> bytes:
    """The value in Avro's binary encoding."""
    stream = io.BytesIO()
    fastavro.schemaless_writer(stream, fastavro.parse_schema(schema), value)
    return stream.getvalue()


def encoded(registry: MemoryRegistry, schema: Any, value: Any) -> bytes:
    """A record's value, its schema registered."""
    return framed(registry.register(schema), binary(schema, value))
