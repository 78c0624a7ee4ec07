"""Values whose producer gave them a type: what Avro schemas and the schemas of Kafka Connect say beyond JSON.

Each turns into the JSON value that exact_values takes for the column, or into a fault; nothing is decided, and so
nothing can fail, before a column asks. Rules that plain JSON does not need:
    numbers      are no points in time unless their schema says so: milliseconds and microseconds look alike
    binary ones  are exact: 0.1 as a double is no DECIMAL and no REAL, 0.5 is both
    times        are ISO 8601 text; those without a zone fit no TIMESTAMPTZ
    bytes        are base64 text, in VARCHAR and JSON only
"""

from __future__ import annotations

import base64
import math
import struct
from binascii import Error as BinasciiError
from datetime import date, timedelta
from decimal import Decimal

from schemas.table import ColumnType, ScalarKind, ScalarType
from streams.adapters.exact_json import FaultError, Number, Typed, read_json, shortened
from streams.adapters.exact_values import DAYS_MAX, DAYS_MIN
from streams.ports import ParkReason

MILLIS, MICROS, NANOS = 1_000, 1_000_000, 1_000_000_000
TEMPORAL = frozenset({ScalarKind.DATE, ScalarKind.TIMESTAMP, ScalarKind.TIMESTAMPTZ})
#: More than 38 digits in any encoding; longer decimals fit no column.
_DECIMAL_BYTES_MAX = 64
_DECIMAL_SCALE_MAX = 400
_UNIT_NAMES = {MILLIS: "milliseconds", MICROS: "microseconds", NANOS: "nanoseconds"}
_EPOCH = date(1970, 1, 1)


def kind_of(column_type: ColumnType) -> ScalarKind | None:
    """The kind of a scalar type."""
    return column_type.kind if isinstance(column_type, ScalarType) else None


class PlainNumber(Typed):
    """A number of which it is known that it is nothing more than that."""

    __slots__ = ("token",)

    def __init__(self, token: str) -> None:
        self.token = token

    def written(self, column_type: ColumnType, name: str) -> object:
        """The number, but not for a time."""
        if (kind := kind_of(column_type)) in TEMPORAL:
            raise FaultError(
                ParkReason.WRONG_TYPE,
                f"column {name!r}: the schema calls {shortened(self.token)} a number, and in which unit it would be a "
                f"{kind} it does not say",
            )
        return self.json()

    def json(self) -> object:
        """The number as written."""
        return Number(self.token)


class BinaryNumber(Typed):
    """A float or a double."""

    __slots__ = ("value",)

    def __init__(self, value: float) -> None:
        self.value = value

    def written(self, column_type: ColumnType, name: str) -> object:
        """All its digits, where digits count."""
        kind = kind_of(column_type)
        if kind in TEMPORAL:
            return PlainNumber(repr(self.value)).written(column_type, name)
        if not math.isfinite(self.value):
            raise FaultError(ParkReason.OUT_OF_RANGE, f"column {name!r}: {self.value} is not a finite number")
        if kind in (ScalarKind.DOUBLE, ScalarKind.JSON):
            return self.json()
        if kind is ScalarKind.REAL and not _is_single(self.value):
            raise FaultError(
                ParkReason.OUT_OF_RANGE,
                f"column {name!r}: the double {self.value!r} does not fit REAL without rounding",
            )
        return Number(format(Decimal(self.value), "f"))

    def json(self) -> object:
        """The shortest number that reads as this one."""
        if not math.isfinite(self.value):
            raise FaultError(ParkReason.OUT_OF_RANGE, f"JSON has no number for {self.value}")
        return Number(repr(self.value))


class ScaledNumber(Typed):
    """A decimal: its unscaled integer as big-endian bytes, or those in base64, and its number of decimal places."""

    __slots__ = ("scale", "unscaled")

    def __init__(self, unscaled: bytes | str, scale: int) -> None:
        self.unscaled = unscaled
        self.scale = scale

    def written(self, column_type: ColumnType, name: str) -> object:
        """The number, but not for a time."""
        number = super().written(column_type, name)
        assert isinstance(number, Number)
        return PlainNumber(number).written(column_type, name)

    def json(self) -> object:
        """The number, with as many digits after the point as its scale says."""
        unscaled = unbase64(self.unscaled) if isinstance(self.unscaled, str) else self.unscaled
        if not unscaled:
            raise FaultError(ParkReason.WRONG_TYPE, "expected the bytes of a decimal number, got none")
        if len(unscaled) > _DECIMAL_BYTES_MAX or abs(self.scale) > _DECIMAL_SCALE_MAX:
            raise FaultError(
                ParkReason.OUT_OF_RANGE,
                f"a decimal number of {len(unscaled)} bytes and scale {self.scale} fits no column",
            )
        return Number(format(Decimal(f"{int.from_bytes(unscaled, signed=True)}e{-self.scale}"), "f"))


class Day(Typed):
    """A date, as days since 1970-01-01."""

    __slots__ = ("days",)

    def __init__(self, days: int) -> None:
        self.days = days

    def json(self) -> object:
        """yyyy-mm-dd."""
        if not DAYS_MIN <= self.days <= DAYS_MAX:
            raise FaultError(
                ParkReason.OUT_OF_RANGE, f"{shortened(str(self.days))} days since 1970 is not in the years 1 to 9999"
            )
        return (_EPOCH + timedelta(days=self.days)).isoformat()


class Moment(Typed):
    """A point in time: `count` of 1/`per_second` seconds since the epoch; of UTC if `zoned`, else of no known zone."""

    __slots__ = ("count", "per_second", "zoned")

    def __init__(self, count: int, per_second: int, *, zoned: bool) -> None:
        self.count = count
        self.per_second = per_second
        self.zoned = zoned

    def json(self) -> object:
        """ISO 8601, with Z if the zone is known, to the microsecond or, if it is not a whole one, the nanosecond."""
        seconds, fraction = divmod(self.count, self.per_second)
        days, second = divmod(seconds, 86_400)
        if not DAYS_MIN <= days <= DAYS_MAX:
            raise FaultError(
                ParkReason.OUT_OF_RANGE,
                f"{shortened(str(self.count))} {_UNIT_NAMES[self.per_second]} since 1970 is not in the years 1 to 9999",
            )
        nanos = fraction * (NANOS // self.per_second)
        digits = f".{nanos:09}" if nanos % 1000 else f".{nanos // 1000:06}" if nanos else ""
        day = (_EPOCH + timedelta(days=days)).isoformat()
        zone = "Z" if self.zoned else ""
        return f"{day}T{second // 3600:02}:{second // 60 % 60:02}:{second % 60:02}{digits}{zone}"


class Bytes(Typed):
    """Bytes that are nothing but bytes, in base64."""

    __slots__ = ("base64",)

    def __init__(self, content: bytes | str) -> None:
        self.base64 = content if isinstance(content, str) else base64.b64encode(content).decode("ascii")

    def written(self, column_type: ColumnType, name: str) -> object:
        """Text; what happens to look like a number or a date is none."""
        if kind_of(column_type) not in (ScalarKind.VARCHAR, ScalarKind.JSON):
            raise FaultError(ParkReason.WRONG_TYPE, f"column {name!r}: bytes fit only VARCHAR and JSON, as base64")
        return self.base64

    def json(self) -> object:
        """Base64 text."""
        return self.base64


class JsonText(Typed):
    """A text of which it is known that it is JSON: itself in VARCHAR, else what it says."""

    __slots__ = ("text",)

    def __init__(self, text: str) -> None:
        self.text = text

    def written(self, column_type: ColumnType, name: str) -> object:
        """See the class."""
        return self.text if kind_of(column_type) is ScalarKind.VARCHAR else super().written(column_type, name)

    def json(self) -> object:
        """What it says."""
        return read_json(self.text.encode("utf-8", "surrogatepass"))


def unbase64(text: str) -> bytes:
    """The bytes. Raises FaultError."""
    try:
        return base64.b64decode(text, validate=True)
    except (BinasciiError, ValueError):
        raise FaultError(ParkReason.WRONG_TYPE, f"expected bytes in base64, got the string {shortened(text)}") from None


def _is_single(value: float) -> bool:
    try:
        single: float = struct.unpack("<f", struct.pack("<f", value))[0]
    except OverflowError:
        return False
    return single == value
