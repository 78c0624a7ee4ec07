"""How large the values of a query may become: the arithmetic behind the guard's bound on what a query builds.

DuckDB's memory limit does not cover the strings and lists inside one vector, 2,048 values at a time, so the bound has
to hold before the query runs. The unit is a growth: what is stored counts 1, a text of the statement or of a parameter
1 per 64 characters. Called by `duckdb_inspection`, which walks the syntax tree.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from streams.adapters.duckdb_dialect import Growth

Node = dict[str, Any]

_UNIT_CHARS = 64
#: Elements that are assumed of a list whose length only the data knows.
_SPREAD = 16
#: What a number, a list entry or the frame of a container takes.
_SCALAR_CHARS = 16


@dataclass(frozen=True)
class ParameterSize:
    """Characters of a parameter's value, and of the largest element if it is a list or an object."""

    chars: int = _UNIT_CHARS
    element_chars: int = _UNIT_CHARS


def sizes_of(params: Mapping[str, object]) -> dict[str, ParameterSize]:
    """Rounded up to powers of two, so that requests that differ only in their values share one inspection."""
    return {
        name: ParameterSize(
            _rounded_up(_chars(value)), _rounded_up(max(map(_chars, _elements(value)), default=_UNIT_CHARS))
        )
        for name, value in params.items()
    }


def growth_of(chars: int) -> int:
    """The growth of a text of so many characters."""
    return 1 + chars // _UNIT_CHARS


def leaf_of(node: Node) -> Node | None:
    """The constant or parameter that a node is, through casts; None if it is something else. DuckDB keeps one copy of
    it, however many rows it meets."""
    while node["class"] == "CAST":
        node = node["child"]
    return node if node["class"] in ("CONSTANT", "PARAMETER") else None


def grown(growth: Growth, arguments: Sequence[int], node: Node) -> int:
    """The growth of a function's result from the growths of its arguments."""
    match growth:
        case Growth.FIXED:
            return 1
        case Growth.LARGEST:
            return max(arguments, default=1)
        case Growth.TOGETHER:
            separators = arguments[0] * len(arguments) if node.get("function_name", "").lower() == "concat_ws" else 0
            return sum(arguments) * (1 if node.get("function_name") == "||" else 2) + separators
        case Growth.PRODUCT:
            copied = (
                _chars_of(child, argument)
                for child, argument in zip(node.get("children", ())[1:], arguments[1:], strict=True)
            )
            return arguments[0] * max(copied, default=1)
        case Growth.SPREAD:
            return max(max(arguments, default=1) * _SPREAD, 2 * sum(arguments))


def _chars_of(node: Node, growth: int) -> int:
    """How many characters each match takes of this argument."""
    leaf = leaf_of(node)
    if leaf is not None and leaf["class"] == "CONSTANT":
        value = leaf["value"].get("value")
        return max(1, len(value)) if isinstance(value, str) else _SCALAR_CHARS
    return growth * _UNIT_CHARS


def _rounded_up(chars: int) -> int:
    return max(_UNIT_CHARS, 1 << (chars - 1).bit_length())


def _elements(value: object) -> list[object]:
    match value:
        case list():
            return value
        case dict():
            return list(value.values())
        case _:
            return []


def _chars(value: object) -> int:
    chars = 0
    pending = [value]
    while pending:
        chars += _SCALAR_CHARS
        match pending.pop():
            case str() as text:
                chars += len(text)
            case dict() as members:
                chars += sum(map(len, members))
                pending.extend(members.values())
            case list() as values:
                pending.extend(values)
    return chars
