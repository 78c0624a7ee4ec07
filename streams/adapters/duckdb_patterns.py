"""Bounds the patterns of LIKE, GLOB and regular expressions, which DuckDB matches without looking at interrupts.

DuckDB tries every split of a text at each wildcard: k of them cost n^k, for minutes and beyond any deadline. So a
pattern must be known before the query runs, as text, parameters and what joins them, and its wildcards are counted.
Only LIKE with a pattern in the statement and without `_` is matched in linear time; it is not limited.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

Node = dict[str, Any]

_WILDCARDS_MAX = 2
_REGEX_CHARS_MAX = 500
_REPETITIONS_MAX = 200
_REPETITION = re.compile(r"\d+(?=[,\d]*\})")

_PLAIN_LIKE = frozenset(("~~", "!~~"))
_LIKE = _PLAIN_LIKE | {
    *("~~*", "!~~*", "~~~", "like_escape", "ilike_escape", "not_like_escape", "not_ilike_escape"),
}
_REGEX = frozenset(
    """
    regexp_extract regexp_extract_all regexp_full_match regexp_matches regexp_replace regexp_split_to_array
    str_split_regex string_split_regex
    """.split()  # noqa: SIM905  # a list of one name a line would hide the rest of this page
)
#: What may join the parts of a pattern.
_JOINS = frozenset(("||", "concat", "lower", "upper", "lcase", "ucase"))


@dataclass(frozen=True)
class Parameter:
    """A part of a pattern that a request supplies."""

    identifier: str


@dataclass(frozen=True)
class Pattern:
    """A pattern as the statement has it."""

    function: str
    #: In order: a literal text, or the identifier of a parameter.
    parts: tuple[str | Parameter, ...]

    @property
    def has_parameters(self) -> bool:
        """Whether it is known only with the values of a request."""
        return any(isinstance(part, Parameter) for part in self.parts)

    def fault(self, params: Mapping[str, object]) -> str | None:
        """Why it must not be matched with these values; None if it may."""
        whole = "".join(part if isinstance(part, str) else str(params.get(part.identifier)) for part in self.parts)
        if self.function in _REGEX:
            if len(whole) > _REGEX_CHARS_MAX:
                return f"a regular expression has more than {_REGEX_CHARS_MAX} characters"
            if sum(map(int, _REPETITION.findall(whole))) > _REPETITIONS_MAX:
                return f"a regular expression repeats more than {_REPETITIONS_MAX} times"
            return None
        if self.function in _PLAIN_LIKE and len(self.parts) == 1 and not self.has_parameters and "_" not in whole:
            return None
        wildcard = "*" if self.function == "~~~" else "%"
        if whole.rstrip(wildcard).count(wildcard) > _WILDCARDS_MAX:
            return f"a pattern has more than {_WILDCARDS_MAX} {wildcard} before its end"
        return None


def takes_pattern(function: str) -> bool:
    """Whether the second argument of the function is a pattern."""
    return function in _LIKE or function in _REGEX


def pattern_of(function: str, node: Node) -> Pattern | None:
    """The pattern in a call's second argument; None if it is not known before the query runs."""
    parts: list[str | Parameter] = []
    pending = [node]
    while pending:
        part = pending.pop()
        match part["class"]:
            case "CONSTANT":
                parts.append(str(part["value"].get("value", "")))
            case "PARAMETER":
                parts.append(Parameter(part["identifier"]))
            case "CAST":
                pending.append(part["child"])
            case "FUNCTION" if part["function_name"].lower() in _JOINS:
                pending.extend(reversed(part.get("children", ())))
            case _:
                return None
    return Pattern(function, tuple(parts))
