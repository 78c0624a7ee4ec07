"""What the schemas of Kafka Connect, and the names that Debezium gives them, say about a value.

With a schema, every value has the type that its schema names (exact_typed). Without one, the column's type decides
where only one encoding is possible, and the record is parked where several are:
    DATE         a number is days since the epoch, the only way in which Debezium writes dates
    TIMESTAMP    a number may be milli-, micro- or nanoseconds: parked. TIMESTAMPTZ as well
    DECIMAL      a number is one; a text with a point, a sign or a length that base64 cannot have is one;
                 any other may be the base64 of bytes, whose scale only the schema knows: parked
    JSON         a text stays a text
Points in time without a zone (all of Debezium's numbers) fit TIMESTAMP, not TIMESTAMPTZ.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

from schemas.table import ColumnType, ScalarKind
from streams.adapters.exact_json import FaultError, Number, Typed, shortened
from streams.adapters.exact_typed import (
    MICROS,
    MILLIS,
    NANOS,
    TEMPORAL,
    Bytes,
    Day,
    JsonText,
    Moment,
    PlainNumber,
    ScaledNumber,
    kind_of,
)
from streams.ports import ParkReason

DECIMAL = "org.apache.kafka.connect.data.Decimal"
JSON = "io.debezium.data.Json"
VARIABLE_DECIMAL = "io.debezium.data.VariableScaleDecimal"
ISO_DATE = "io.debezium.time.IsoDate"
#: Names of integers that are times -> what they are. Debezium writes wall-clock times as if they were UTC.
TIMES: dict[str, Callable[[int], Typed]] = {
    "io.debezium.time.Date": Day,
    "org.apache.kafka.connect.data.Date": Day,
    "io.debezium.time.Timestamp": lambda count: Moment(count, MILLIS, zoned=False),
    "org.apache.kafka.connect.data.Timestamp": lambda count: Moment(count, MILLIS, zoned=False),
    "io.debezium.time.MicroTimestamp": lambda count: Moment(count, MICROS, zoned=False),
    "io.debezium.time.NanoTimestamp": lambda count: Moment(count, NANOS, zoned=False),
}
_BASE64 = re.compile(r"(?:[A-Za-z0-9+/]{4})*(?:[A-Za-z0-9+/]{2}==|[A-Za-z0-9+/]{3}=)?")
_WHOLE = re.compile(r"-?[0-9]{1,30}")
_HINT = "let the converter embed schemas (schemas.enable=true), or use Avro"


class UnknownNumber(Typed):
    """A number without a schema."""

    __slots__ = ("token",)

    def __init__(self, token: str) -> None:
        self.token = token

    def written(self, column_type: ColumnType, name: str) -> object:
        """See the module."""
        kind = kind_of(column_type)
        if kind is ScalarKind.DATE and _WHOLE.fullmatch(self.token):
            return Day(int(self.token)).written(column_type, name)
        if kind in TEMPORAL:
            raise FaultError(
                ParkReason.WRONG_TYPE,
                f"column {name!r}: {shortened(self.token)} without a schema may be in several units ({kind}): {_HINT}",
            )
        return self.json()

    def json(self) -> object:
        """The number as written."""
        return Number(self.token)


class UnknownText(Typed):
    """A text without a schema."""

    __slots__ = ("text",)

    def __init__(self, text: str) -> None:
        self.text = text

    def written(self, column_type: ColumnType, name: str) -> object:
        """See the module."""
        if kind_of(column_type) is ScalarKind.DECIMAL and _BASE64.fullmatch(self.text):
            raise FaultError(
                ParkReason.WRONG_TYPE,
                f"column {name!r}: the string {shortened(self.text)} without a schema may be a number or the bytes of "
                f"one: {_HINT}",
            )
        return self.text

    def json(self) -> object:
        """The text."""
        return self.text


def typed(value: object, schema: Mapping[str, Any] | None) -> object:
    """A value of a JSON record with the types that its schema, as Connect embeds it, gives to it and to what is in it.

    Never fails: a value that does not suit its schema stays what it is, for a column to refuse."""
    if value is None or isinstance(value, bool | Typed):
        return value
    kind, name = (schema.get("type"), schema.get("name")) if schema else (None, None)
    if isinstance(value, dict):
        if name == VARIABLE_DECIMAL:
            return variable_decimal(value)
        within = _schemas_within(schema, value)
        return {field: typed(item, within.get(field)) for field, item in value.items()}
    if isinstance(value, list):
        items = schema.get("items") if schema else None
        return [typed(item, items if isinstance(items, dict) else None) for item in value]
    if isinstance(value, Number):
        if isinstance(name, str) and name in TIMES and _WHOLE.fullmatch(value):
            return TIMES[name](int(value))
        return PlainNumber(value) if kind else UnknownNumber(value)
    assert isinstance(value, str)
    return _typed_text(value, schema, kind, name) if kind else UnknownText(value)


def variable_decimal(value: Mapping[str, object]) -> object:
    """io.debezium.data.VariableScaleDecimal: a decimal that carries its own scale."""
    scale, unscaled = value.get("scale"), value.get("value")
    if isinstance(scale, PlainNumber):
        scale = scale.token
    if isinstance(unscaled, Bytes):
        unscaled = unscaled.base64
    if isinstance(scale, str) and _WHOLE.fullmatch(scale) and isinstance(unscaled, str):
        return ScaledNumber(unscaled, int(scale))
    return dict(value)


def _typed_text(value: str, schema: Mapping[str, Any] | None, kind: object, name: object) -> object:
    if name == JSON:
        return JsonText(value)
    if name == ISO_DATE:
        return value.removesuffix("Z")
    if name == DECIMAL:
        parameters = schema.get("parameters") if schema else None
        scale = parameters.get("scale") if isinstance(parameters, dict) else None
        if isinstance(scale, str) and _WHOLE.fullmatch(scale):
            return ScaledNumber(value, int(scale))
    return Bytes(value) if kind == "bytes" else value


def _schemas_within(schema: Mapping[str, Any] | None, value: Mapping[str, object]) -> dict[str, Any]:
    """Field -> its schema, of a struct; the same one for all keys of a map."""
    if schema is None:
        return {}
    if schema.get("type") == "map" and isinstance(values := schema.get("values"), dict):
        return dict.fromkeys(value, values)
    fields = schema.get("fields")
    if not isinstance(fields, list):
        return {}
    return {each["field"]: each for each in fields if isinstance(each, dict) and isinstance(each.get("field"), str)}
