"""One JSON value to one column type, exactly or not at all.

The rules, which the fast path of duckdb_decoder follows too:
    integers     a number with an integral value (5, 5.0, 5e0) within range; the string "5" is a wrong type
    REAL, DOUBLE any number, as the nearest binary value; one that would become infinite is out of range
    DECIMAL      a number or a string holding one; a digit beyond the scale or the precision is out of range
    BOOLEAN      true or false;    VARCHAR  a string;    UUID  its 36 characters;    DATE  yyyy-mm-dd
    TIMESTAMP    an ISO 8601 string, converted to UTC if it carries an offset and taken as UTC if not, or milliseconds
                 since the epoch; TIMESTAMPTZ is the same, but a string must carry Z or an offset.
                 More precise than a microsecond is out of range, and so is a year outside 1 to 9999
    JSON         any value, as minimal text with numbers as written; a JSON null is a null
    arrays and structs recursively: elements may be null, unknown fields are ignored, missing ones are null
Values come back in the Python form that pyarrow takes for the column's type; times as integers.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from datetime import UTC, date, datetime
from decimal import Context, Decimal, DecimalException, Inexact, InvalidOperation, Overflow, Underflow
from typing import Any

import pyarrow as pa

from schemas.table import ArrayType, ColumnType, ScalarKind, ScalarType, StructType
from streams.adapters.exact_json import FaultError, Number, Typed, described, write_json
from streams.ports import ParkReason

INTEGER_RANGES: dict[ScalarKind, tuple[int, int]] = {
    ScalarKind.TINYINT: (-(2**7), 2**7 - 1),
    ScalarKind.SMALLINT: (-(2**15), 2**15 - 1),
    ScalarKind.INTEGER: (-(2**31), 2**31 - 1),
    ScalarKind.BIGINT: (-(2**63), 2**63 - 1),
    ScalarKind.UTINYINT: (0, 2**8 - 1),
    ScalarKind.USMALLINT: (0, 2**16 - 1),
    ScalarKind.UINTEGER: (0, 2**32 - 1),
    ScalarKind.UBIGINT: (0, 2**64 - 1),
}

#: Longer numbers are out of range for every type but the floating ones: reading them costs time, not meaning.
_NUMBER_CHARS_MAX = 400
_DECIMAL = re.compile(r"[+-]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][+-]?[0-9]+)?")
_UUID = re.compile(r"[0-9a-fA-F]{8}(?:-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12}")
_DATE = re.compile(r"[0-9]{4}-[0-9]{2}-[0-9]{2}")
_TIMESTAMP = re.compile(
    r"([0-9]{4}-[0-9]{2}-[0-9]{2})(?:[T ]([0-9]{2})(?::([0-9]{2})(?::([0-9]{2})(?:\.([0-9]{1,9}))?)?)?"
    r"(Z|[+-][0-9]{2}(?::?[0-9]{2})?)?)?"
)
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_EPOCH_DAY = date(1970, 1, 1).toordinal()
#: The years 1 to 9999, in days and in microseconds since 1970.
DAYS_MIN, DAYS_MAX = date.min.toordinal() - _EPOCH_DAY, date.max.toordinal() - _EPOCH_DAY
MICROS_MIN, MICROS_MAX = DAYS_MIN * 86_400_000_000, (DAYS_MAX + 1) * 86_400_000_000 - 1
#: Raises DecimalException instead of rounding.
_EXACT = Context(
    prec=2 * _NUMBER_CHARS_MAX, Emax=10**9, Emin=-(10**9), traps=[Inexact, InvalidOperation, Overflow, Underflow]
)


def convert(value: object, column_type: ColumnType, name: str) -> Any:
    """The typed value. `name` is the column, for the detail. Raises FaultError."""
    if isinstance(value, Typed):
        value = value.written(column_type, name)
    if value is None:
        return None
    if isinstance(column_type, ArrayType):
        if not isinstance(value, list):
            raise _wrong_type(value, name, "an array")
        return [convert(item, column_type.element, f"{name}[{index}]") for index, item in enumerate(value)]
    if isinstance(column_type, StructType):
        if not isinstance(value, dict):
            raise _wrong_type(value, name, "an object")
        return {
            field.name: convert(value.get(field.name), field.type, f"{name}.{field.name}")
            for field in column_type.fields
        }
    return _SCALARS[column_type.kind](value, column_type, name)


def _wrong_type(value: object, name: str, expected: str) -> FaultError:
    return FaultError(ParkReason.WRONG_TYPE, f"column {name!r}: expected {expected}, got {described(value)}")


def _out_of_range(value: object, name: str, expected: str) -> FaultError:
    return FaultError(ParkReason.OUT_OF_RANGE, f"column {name!r}: {described(value)} does not fit {expected}")


def _integer(value: object, column_type: ScalarType, name: str) -> int:
    if not isinstance(value, Number):
        raise _wrong_type(value, name, f"an integer ({column_type.kind})")
    lowest, highest = INTEGER_RANGES[column_type.kind]
    if len(value) <= 20 and value.removeprefix("-").isdecimal() and lowest <= int(value) <= highest:
        return int(value)
    number = _exact_decimal(value)
    if number is None or number.adjusted() > 20:
        raise _out_of_range(value, name, f"{column_type.kind} ({lowest} to {highest})")
    if number != number.to_integral_value():
        raise _wrong_type(value, name, f"an integer ({column_type.kind})")
    if not lowest <= number <= highest:
        raise _out_of_range(value, name, f"{column_type.kind} ({lowest} to {highest})")
    return int(number)


def _float(value: object, column_type: ScalarType, name: str) -> float:
    if not isinstance(value, Number):
        raise _wrong_type(value, name, f"a number ({column_type.kind})")
    number = float(value)
    if column_type.kind is ScalarKind.REAL and math.isfinite(number):
        # From the token, not from the double: rounding twice can end one step off.
        number = pa.scalar(str(value)).cast(pa.float32()).as_py()
    if not math.isfinite(number):
        raise _out_of_range(value, name, f"{column_type.kind}: it would become infinite")
    return number


def _decimal(value: object, column_type: ScalarType, name: str) -> Decimal:
    assert column_type.precision is not None
    precision, scale = column_type.precision, column_type.scale or 0
    expected = f"DECIMAL({precision},{scale})"
    if not isinstance(value, str) or not _DECIMAL.fullmatch(value):
        raise _wrong_type(value, name, f"a number, or a string holding one ({expected})")
    number = _exact_decimal(value)
    if number is None:
        raise _out_of_range(value, name, expected)
    if number.is_zero():
        return Decimal(0).scaleb(-scale)
    if number.adjusted() >= precision - scale or number.adjusted() < -scale:
        raise _out_of_range(value, name, expected)
    try:
        return number.quantize(Decimal(1).scaleb(-scale), context=_EXACT)
    except DecimalException:
        raise _out_of_range(value, name, f"{expected} without rounding") from None


def _exact_decimal(token: str) -> Decimal | None:
    """The number, or None where it has more digits, or a larger exponent, than any type could hold."""
    if len(token) > _NUMBER_CHARS_MAX:
        return None
    try:
        return _EXACT.create_decimal(token)
    except DecimalException:
        return None


def _boolean(value: object, column_type: ScalarType, name: str) -> bool:
    if not isinstance(value, bool):
        raise _wrong_type(value, name, f"true or false ({column_type.kind})")
    return value


def _string(value: object, column_type: ScalarType, name: str) -> str:
    if not isinstance(value, str) or isinstance(value, Number):
        raise _wrong_type(value, name, f"a string ({column_type.kind})")
    _check_encodable(value, name)
    return value


def _check_encodable(text: str, name: str) -> None:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise FaultError(ParkReason.INVALID_UTF8, f"column {name!r}: an unpaired surrogate escape") from None


def _uuid(value: object, column_type: ScalarType, name: str) -> str:
    if not isinstance(value, str) or isinstance(value, Number) or not _UUID.fullmatch(value):
        raise _wrong_type(value, name, f"a string like 123e4567-e89b-12d3-a456-426614174000 ({column_type.kind})")
    return value.lower()


def _date(value: object, column_type: ScalarType, name: str) -> int:
    expected = f"an ISO date, yyyy-mm-dd ({column_type.kind})"
    if not isinstance(value, str) or isinstance(value, Number) or not _DATE.fullmatch(value):
        raise _wrong_type(value, name, expected)
    try:
        return date.fromisoformat(value).toordinal() - _EPOCH_DAY
    except ValueError:
        raise _wrong_type(value, name, expected) from None


def _timestamp(value: object, column_type: ScalarType, name: str) -> int:
    """Microseconds since the epoch."""
    expected = f"an ISO 8601 timestamp or milliseconds since the epoch ({column_type.kind})"
    if isinstance(value, Number):
        milliseconds = _exact_decimal(value)
        if milliseconds is None or milliseconds.adjusted() > 20:
            raise _out_of_range(value, name, f"{column_type.kind} (years 1 to 9999)")
        return _checked_micros(_EXACT.multiply(milliseconds, 1000), value, column_type, name)
    match = _TIMESTAMP.fullmatch(value) if isinstance(value, str) else None
    if match is None:
        raise _wrong_type(value, name, expected)
    day, hour, minute, second, fraction, zone = match.groups()
    if zone is None and column_type.kind is ScalarKind.TIMESTAMPTZ:
        raise _wrong_type(value, name, "a timestamp with Z or an offset, as 2024-01-31T12:00:00Z (TIMESTAMPTZ)")
    try:
        moment = datetime.fromisoformat(f"{day}T{hour or '00'}:{minute or '00'}:{second or '00'}").replace(tzinfo=UTC)
    except ValueError:
        raise _wrong_type(value, name, expected) from None
    offset = 0
    if zone is not None and zone != "Z":
        hours, minutes = int(zone[1:3]), int(zone[-2:]) if len(zone) > 3 else 0
        if hours > 23 or minutes > 59:
            raise _wrong_type(value, name, expected)
        offset = (hours * 60 + minutes) * (-1 if zone[0] == "-" else 1)
    seconds = (moment - _EPOCH).days * 86_400 + (moment - _EPOCH).seconds - offset * 60
    nanos = int((fraction or "").ljust(9, "0"))
    micros = seconds * 1_000_000 + (Decimal(nanos) / 1000 if nanos % 1000 else nanos // 1000)
    return _checked_micros(micros, value, column_type, name)


def _checked_micros(micros: Decimal | int, value: object, column_type: ScalarType, name: str) -> int:
    if micros != int(micros):
        raise _out_of_range(value, name, f"{column_type.kind}: it is more precise than a microsecond")
    if not MICROS_MIN <= micros <= MICROS_MAX:
        raise _out_of_range(value, name, f"{column_type.kind} (years 1 to 9999)")
    return int(micros)


def _json(value: object, column_type: ScalarType, name: str) -> str:
    del column_type
    try:
        text = write_json(value)
    except FaultError as fault:
        raise FaultError(fault.reason, f"column {name!r}: {fault.detail}") from None
    _check_encodable(text, name)
    return text


_SCALARS: dict[ScalarKind, Callable[[object, ScalarType, str], Any]] = {
    **dict.fromkeys(INTEGER_RANGES, _integer),
    ScalarKind.REAL: _float,
    ScalarKind.DOUBLE: _float,
    ScalarKind.DECIMAL: _decimal,
    ScalarKind.BOOLEAN: _boolean,
    ScalarKind.VARCHAR: _string,
    ScalarKind.DATE: _date,
    ScalarKind.TIMESTAMP: _timestamp,
    ScalarKind.TIMESTAMPTZ: _timestamp,
    ScalarKind.UUID: _uuid,
    ScalarKind.JSON: _json,
}
