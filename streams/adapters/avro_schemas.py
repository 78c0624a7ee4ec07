"""An Avro schema -> what decodes its records: fastavro's reader, and a check that the bytes are exactly one value.

The schema is rewritten so that fastavro hands over every leaf with the type that the schema gives it (exact_typed),
logical types and the names of Kafka Connect included; which branch of a union a value took is then never in doubt.

The check comes first because fastavro trusts its input: bytes that nest deeply end the process, an index below zero
picks from the end of a union or enum, and an array of empty items takes as long as its count says. It walks the bytes
as the specification lays them out (https://avro.apache.org/docs/1.12.0/specification/#binary-encoding).
"""

from __future__ import annotations

import io
import json
import uuid
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import fastavro
from fastavro.read import LOGICAL_READERS
from fastavro.schema import SchemaParseException

from streams.adapters.debezium_types import JSON, TIMES, VARIABLE_DECIMAL, variable_decimal
from streams.adapters.exact_json import FaultError, nesting_depth
from streams.adapters.exact_typed import (
    MICROS,
    MILLIS,
    NANOS,
    BinaryNumber,
    Bytes,
    Day,
    JsonText,
    Moment,
    PlainNumber,
    ScaledNumber,
)
from streams.limits import JSON_DEPTH_MAX
from streams.ports import ParkReason, RegisteredSchema

#: Under this logical type fastavro calls back, with the schema that holds the function to call.
_TYPED = "pintail"
_CONVERT = "pintail.convert"
_PRIMITIVES = frozenset({"null", "boolean", "int", "long", "float", "double", "bytes", "string"})
_TIMES: dict[str, Callable[[int], object]] = {
    "timestamp-millis": lambda count: Moment(count, MILLIS, zoned=True),
    "timestamp-micros": lambda count: Moment(count, MICROS, zoned=True),
    "timestamp-nanos": lambda count: Moment(count, NANOS, zoned=True),
    "local-timestamp-millis": lambda count: Moment(count, MILLIS, zoned=False),
    "local-timestamp-micros": lambda count: Moment(count, MICROS, zoned=False),
    "local-timestamp-nanos": lambda count: Moment(count, NANOS, zoned=False),
}

#: (bytes, position, nesting) -> the position behind one value. Raises FaultError.
Check = Callable[[bytes, int, int], int]
Convert = Callable[[Any], object]


def _call_back(value: Any, schema: dict[Any, Any] | None, _: object = None) -> object:
    assert schema is not None
    converted: object = schema[_CONVERT](value)
    return converted


for _type in ("int", "long", "float", "double", "bytes", "string", "fixed", "record"):
    LOGICAL_READERS[f"{_type}-{_TYPED}"] = _call_back


@dataclass(frozen=True)
class RecordSchema:
    """What decodes the records of one schema."""

    check: Check
    schema: Any

    def read(self, data: bytes, start: int) -> object:
        """The value that the bytes from `start` on are, with typed leaves. Raises FaultError."""
        end = self.check(data, start, 0)
        if end != len(data):
            raise _malformed(f"{len(data) - end} bytes are left over at byte {end}")
        try:
            return fastavro.schemaless_reader(io.BytesIO(data[start:]), self.schema, None)
        except UnicodeDecodeError as error:
            raise FaultError(ParkReason.INVALID_UTF8, f"a string is not UTF-8: {error.reason}") from None


def record_schema(registered: RegisteredSchema, *, debezium: bool) -> RecordSchema:
    """The decoder of a registered schema; `debezium` says that Connect's timestamps are wall-clock times.

    Raises FaultError if records of that schema cannot be decoded."""
    if registered.kind != "AVRO":
        raise _unusable(f"it is a schema of kind {registered.kind}, not AVRO")
    try:
        rewriting = _Rewriting(list(map(_parsed, registered.references)), debezium=debezium)
        tagged, check = rewriting.rewritten(_parsed(registered.text), "")
        return RecordSchema(check, fastavro.parse_schema(tagged))
    except SchemaParseException as error:
        raise _unusable(str(error)) from None
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise _unusable(f"{type(error).__name__}: {error}") from None


class _Rewriting:
    """One schema on its way: the named types met so far, and those that references define."""

    def __init__(self, references: list[Any], *, debezium: bool) -> None:
        self._debezium = debezium
        self._checks: dict[str, Check] = {}
        self._referenced: dict[str, tuple[Any, str]] = {}
        for reference in references:
            for name, definition, namespace in _named_types(reference, ""):
                self._referenced.setdefault(name, (definition, namespace))

    def rewritten(self, schema: Any, namespace: str) -> tuple[Any, Check]:
        """(the schema for fastavro, the check of its bytes)."""
        if isinstance(schema, list):
            branches = [self.rewritten(branch, namespace) for branch in schema]
            return [tagged for tagged, _ in branches], _union(tuple(check for _, check in branches))
        if isinstance(schema, str):
            return self._primitive({"type": schema}) if schema in _PRIMITIVES else self._named(schema, namespace)
        kind = schema["type"]
        if not isinstance(kind, str) or (kind not in _PRIMITIVES and kind not in _COMPLEX):
            return self.rewritten(kind, namespace)
        if kind in _PRIMITIVES:
            return self._primitive(schema)
        if kind == "array":
            tagged, check = self.rewritten(schema["items"], namespace)
            return {"type": "array", "items": tagged}, _blocks(check, keyed=False)
        if kind == "map":
            tagged, check = self.rewritten(schema["values"], namespace)
            return {"type": "map", "values": tagged}, _blocks(check, keyed=True)
        name, inner = _full_name(schema["name"], schema.get("namespace", namespace))
        if kind == "enum":
            symbols = schema["symbols"]
            self._checks[name] = _enum(len(symbols))
            return {"type": "enum", "name": name, "namespace": "", "symbols": symbols}, self._checks[name]
        if kind == "fixed":
            self._checks[name] = _fixed(schema["size"])
            tagged = {"type": "fixed", "name": name, "namespace": "", "size": schema["size"]}
            return _with(tagged, _bytes_converter(schema)), self._checks[name]
        return self._record(schema, name, inner)

    def _primitive(self, schema: Mapping[str, Any]) -> tuple[Any, Check]:
        kind = schema["type"]
        if kind in ("null", "boolean"):
            return kind, _PRIMITIVE_CHECKS[kind]
        convert = self._converter(kind, schema)
        return (_with({"type": kind}, convert) if convert else kind), _PRIMITIVE_CHECKS[kind]

    def _converter(self, kind: str, schema: Mapping[str, Any]) -> Convert | None:
        logical, connect = schema.get("logicalType"), schema.get("connect.name")
        if kind == "string":
            return JsonText if connect == JSON else None
        if kind == "bytes":
            return _bytes_converter(schema)
        if kind in ("float", "double"):
            return BinaryNumber
        if connect in TIMES and (self._debezium or str(connect).startswith("io.debezium.")):
            return TIMES[connect]
        if kind == "int" and logical == "date":
            return Day
        if kind == "long" and logical in _TIMES:
            return _TIMES[logical]
        return lambda number: PlainNumber(str(number))

    def _record(self, schema: Mapping[str, Any], name: str, namespace: str) -> tuple[Any, Check]:
        checks: list[Check] = []

        def check(data: bytes, position: int, nesting: int) -> int:
            if nesting >= JSON_DEPTH_MAX:
                raise _too_deep()
            for check_field in checks:
                position = check_field(data, position, nesting + 1)
            return position

        self._checks[name] = check
        fields: list[dict[str, Any]] = []
        for field in schema["fields"]:
            tagged, check_field = self.rewritten(field["type"], namespace)
            fields.append({"name": field["name"], "type": tagged})
            checks.append(check_field)
        if len({field["name"] for field in fields}) != len(fields):
            raise _unusable(f"record {name} has two fields of one name")
        record = {"type": "record", "name": name, "namespace": "", "fields": fields}
        return _with(record, variable_decimal) if schema.get("connect.name") == VARIABLE_DECIMAL else record, check

    def _named(self, written: str, namespace: str) -> tuple[Any, Check]:
        """A type by its name: one met before, perhaps around this very place, or one that a reference defines."""
        name, _ = _full_name(written, namespace)
        if name in self._checks:
            # Looked up when it is called: a record that holds itself is not complete yet.
            return name, self._checks[name]
        if name in self._referenced:
            return self.rewritten(*self._referenced[name])
        raise _unusable(f"it names a type {written!r} that it does not define")


_COMPLEX = frozenset({"array", "map", "enum", "fixed", "record", "error"})


def _parsed(text: str) -> Any:
    if nesting_depth(text.encode("utf-8", "replace")) > JSON_DEPTH_MAX:
        raise _unusable(f"it nests deeper than {JSON_DEPTH_MAX} levels")
    try:
        return json.loads(text)
    except ValueError:
        # Some registries give the name of a primitive without its quotes.
        return text


def _named_types(schema: Any, namespace: str) -> Iterator[tuple[str, Any, str]]:
    """(full name, definition, namespace around it) of every type that a schema defines."""
    if isinstance(schema, list):
        for branch in schema:
            yield from _named_types(branch, namespace)
    elif isinstance(schema, dict):
        inner = namespace
        if schema.get("type") in ("record", "error", "enum", "fixed"):
            name, inner = _full_name(schema["name"], schema.get("namespace", namespace))
            yield name, schema, namespace
        for each in (schema.get("type"), schema.get("items"), schema.get("values")):
            yield from _named_types(each, inner)
        for field in schema.get("fields", ()):
            yield from _named_types(field["type"], inner)


def _full_name(name: str, namespace: str | None) -> tuple[str, str]:
    """(full name, the namespace within)."""
    if "." in name:
        return name, name.rpartition(".")[0]
    return (f"{namespace}.{name}", namespace) if namespace else (name, "")


def _with(schema: dict[str, Any], convert: Convert) -> dict[str, Any]:
    return {**schema, "logicalType": _TYPED, _CONVERT: convert}


def _bytes_converter(schema: Mapping[str, Any]) -> Convert:
    """Bytes and fixed: a decimal, a UUID, or nothing but bytes; a logical type that is not valid is none."""
    logical, scale, precision = schema.get("logicalType"), schema.get("scale", 0), schema.get("precision")
    if logical == "decimal" and isinstance(scale, int) and isinstance(precision, int) and 0 <= scale <= precision:
        return lambda unscaled: ScaledNumber(unscaled, scale)
    if logical == "uuid" and schema.get("size") == 16:
        return lambda content: str(uuid.UUID(bytes=content))
    return Bytes


# -- checks: each takes the bytes of one value -----------------------------------------------------------------------


def _whole(data: bytes, position: int, bits: int) -> tuple[int, int]:
    """(a zigzag-encoded integer, the position behind it)."""
    number = shift = 0
    while True:
        if position >= len(data):
            raise _cut_off()
        byte = data[position]
        position += 1
        number |= (byte & 0x7F) << shift
        shift += 7
        if byte < 0x80:
            break
        if shift >= 70:
            raise _malformed(f"an integer of more than ten bytes at byte {position}")
    if number >> bits:
        raise _malformed(f"an integer of more than {bits} bits before byte {position}")
    return (number >> 1) ^ -(number & 1), position


def _int(data: bytes, position: int, _: int) -> int:
    return _whole(data, position, 32)[1]


def _long(data: bytes, position: int, _: int) -> int:
    return _whole(data, position, 64)[1]


def _boolean(data: bytes, position: int, _: int) -> int:
    if data[position : position + 1] not in (b"\0", b"\1"):
        raise _malformed(f"neither true nor false at byte {position}")
    return position + 1


def _length_prefixed(data: bytes, position: int, _: int) -> int:
    length, position = _whole(data, position, 64)
    if not 0 <= length <= len(data) - position:
        raise _cut_off()
    return position + length


def _fixed(size: int) -> Check:
    if not isinstance(size, int) or size < 0:
        raise _unusable(f"a fixed type of size {size}")

    def check(data: bytes, position: int, _: int) -> int:
        if position + size > len(data):
            raise _cut_off()
        return position + size

    return check


def _enum(symbols: int) -> Check:
    def check(data: bytes, position: int, _: int) -> int:
        index, position = _whole(data, position, 32)
        if not 0 <= index < symbols:
            raise _malformed(f"symbol {index} of an enum of {symbols}")
        return position

    return check


def _union(branches: tuple[Check, ...]) -> Check:
    def check(data: bytes, position: int, nesting: int) -> int:
        index, position = _whole(data, position, 64)
        if not 0 <= index < len(branches):
            raise _malformed(f"branch {index} of a union of {len(branches)}")
        return branches[index](data, position, nesting)

    return check


def _blocks(check_item: Check, *, keyed: bool) -> Check:
    """Arrays and maps: blocks of items until one of none."""

    def check(data: bytes, position: int, nesting: int) -> int:
        if nesting >= JSON_DEPTH_MAX:
            raise _too_deep()
        keys: set[bytes] = set()
        while True:
            count, position = _whole(data, position, 64)
            if count == 0:
                return position
            if count < 0:
                count, (size, position) = -count, _whole(data, position, 64)
                if size < 0:
                    raise _malformed(f"a block of {size} bytes at byte {position}")
            for _ in range(count):
                before = position
                if keyed:
                    position = _length_prefixed(data, position, nesting)
                    if (key := data[before:position]) in keys:
                        raise _malformed(f"a map has one key twice, before byte {position}")
                    keys.add(key)
                position = check_item(data, position, nesting + 1)
                if position == before:
                    raise _malformed("an array of items without bytes")

    return check


_PRIMITIVE_CHECKS: dict[str, Check] = {
    "null": lambda _data, position, _nesting: position,
    "boolean": _boolean,
    "int": _int,
    "long": _long,
    "float": _fixed(4),
    "double": _fixed(8),
    "bytes": _length_prefixed,
    "string": _length_prefixed,
}


def _malformed(what: str) -> FaultError:
    return FaultError(ParkReason.NOT_AVRO, f"not a value of the schema: {what}")


def _cut_off() -> FaultError:
    return _malformed("the bytes end before it does")


def _too_deep() -> FaultError:
    return FaultError(ParkReason.TOO_DEEP, f"nests deeper than {JSON_DEPTH_MAX} levels")


def _unusable(why: str) -> FaultError:
    return FaultError(ParkReason.UNUSABLE_SCHEMA, f"its schema cannot be used: {why}"[:300])
