"""Strict reading of one JSON value, exactly as it was written.

Numbers stay the text of their token, so nothing is rounded before a column's type is known. NaN, Infinity and trailing
commas are not JSON. A field that appears twice in one object is kept with both values; whoever needs such a field must
refuse it. Size, depth and encoding are checked first, so that no input can exhaust the stack. Used by exact_values and
exact_decoder.
"""

from __future__ import annotations

import json
import re
from typing import NoReturn

from schemas.table import ColumnType
from streams.limits import JSON_DEPTH_MAX, RECORD_BYTES_MAX
from streams.ports import ParkReason

DETAIL_CHARS_MAX = 60

_STRINGS = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+"', re.DOTALL)
_NOT_BRACKETS = bytes(set(range(256)) - set(b"[]{}"))
_ONE_KIND = bytes.maketrans(b"{}", b"[]")


class FaultError(Exception):
    """Why a record cannot be applied: becomes a ParkedRecord."""

    def __init__(self, reason: ParkReason, detail: str) -> None:
        super().__init__(detail)
        self.reason = reason
        self.detail = detail


class Number(str):
    """A number's token, as written."""

    __slots__ = ()


class Typed:
    """A value of a type that JSON does not have. What it is in a column is decided once the column is known, so that a
    value that no column takes parks no record."""

    __slots__ = ()

    def written(self, column_type: ColumnType, name: str) -> object:
        """The JSON value that stands for it in a column of that type. `name` is the column's. Raises FaultError."""
        del column_type
        try:
            return self.json()
        except FaultError as fault:
            raise FaultError(fault.reason, f"column {name!r}: {fault.detail}") from None

    def json(self) -> object:
        """The JSON value that stands for it where any JSON is taken. Raises FaultError."""
        raise NotImplementedError


class Repeated(Typed):
    """The value of a field that appears more than once in its object."""

    __slots__ = ("values",)

    def __init__(self, values: list[object]) -> None:
        self.values = values

    def written(self, column_type: ColumnType, name: str) -> object:
        """No column takes one."""
        del column_type
        raise FaultError(ParkReason.NOT_JSON, f"field {name!r} appears {len(self.values)} times in one object")

    def json(self) -> object:
        """There is no single value; write_json writes the field of an object as often as it was there."""
        raise FaultError(ParkReason.NOT_JSON, f"a field appears {len(self.values)} times in one object")


def nesting_depth(text: bytes) -> int:
    """How deep arrays and objects nest; for text that is not JSON, a bound on what a parser would descend to.

    Peels the innermost level off in each pass, at the speed of bytes.replace, and stops past JSON_DEPTH_MAX.
    """
    brackets = _STRINGS.sub(b"", text).translate(_ONE_KIND, b"").translate(None, _NOT_BRACKETS)
    if b"[" * (JSON_DEPTH_MAX + 1) in brackets:
        return JSON_DEPTH_MAX + 1
    depth = 0
    while depth <= JSON_DEPTH_MAX and b"[]" in brackets:
        brackets = brackets.replace(b"[]", b"")
        depth += 1
    return depth + brackets.count(b"[")


def read_json(value: bytes) -> object:
    """The value as dict, list, str, Number, bool or None. Raises FaultError."""
    if len(value) > RECORD_BYTES_MAX:
        raise FaultError(ParkReason.TOO_LARGE, f"{len(value)} bytes; the limit is {RECORD_BYTES_MAX}")
    try:
        text = value.decode("utf-8")
    except UnicodeDecodeError as error:
        raise FaultError(ParkReason.INVALID_UTF8, f"byte {error.start} of the value: {error.reason}") from None
    if value.count(b"[") + value.count(b"{") > JSON_DEPTH_MAX and nesting_depth(value) > JSON_DEPTH_MAX:
        raise FaultError(ParkReason.TOO_DEEP, f"nests deeper than {JSON_DEPTH_MAX} levels")
    try:
        return _DECODER.decode(text)
    except ValueError as error:
        raise FaultError(ParkReason.NOT_JSON, f"not JSON: {error} in {shortened(text)}") from None


def write_json(value: object) -> str:
    """Minimal JSON text of what read_json returned: numbers as written, no spaces, no needless escapes.

    Raises FaultError for a typed value that JSON has no form for."""
    if value is None or value is True or value is False:
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, Number):
        return str(value)
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False)
    if isinstance(value, list):
        return f"[{','.join(map(write_json, value))}]"
    if isinstance(value, Typed):
        return write_json(value.json())
    assert isinstance(value, dict)
    fields = []
    for name, item in value.items():
        quoted = json.dumps(name, ensure_ascii=False)
        items = item.values if isinstance(item, Repeated) else [item]
        fields += [f"{quoted}:{write_json(each)}" for each in items]
    return f"{{{','.join(fields)}}}"


def shortened(text: str) -> str:
    """Text for a detail: one line, not too long."""
    line = " ".join(text[: DETAIL_CHARS_MAX + 1].split())
    return repr(line if len(text) <= DETAIL_CHARS_MAX else f"{line[: DETAIL_CHARS_MAX - 3]}...")


def described(value: object) -> str:
    """A JSON value for a detail."""
    if isinstance(value, (dict, list)):
        return "an object" if isinstance(value, dict) else "an array"
    if isinstance(value, str) and not isinstance(value, Number):
        return f"the string {shortened(value)}"
    return shortened(write_json(value)).strip("'")


def _object(pairs: list[tuple[str, object]]) -> dict[str, object]:
    fields = dict(pairs)
    if len(fields) != len(pairs):
        fields = {}
        for name, value in pairs:
            if name not in fields:
                fields[name] = value
            elif isinstance(seen := fields[name], Repeated):
                seen.values.append(value)
            else:
                fields[name] = Repeated([seen, value])
    return fields


def _no_constant(token: str) -> NoReturn:
    raise ValueError(f"{token} is not a JSON value")


_DECODER = json.JSONDecoder(
    object_pairs_hook=_object, parse_int=Number, parse_float=Number, parse_constant=_no_constant
)
