"""What changed between two answers of a subscription, as places of rows: made by the worker, applied by the client.

A row is gone, or is new, as often as it is in one answer and not in the other; rows are the same if their JSON is.
Places instead of rows, so that no reader has to compare rows that another one's JSON library wrote.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import TypeVar

Row = TypeVar("Row")
_Key = TypeVar("_Key", bound=Hashable)


class DeltaError(Exception):
    """A delta of other rows than these."""


@dataclass(frozen=True)
class Delta:
    """`removed`: places in the old rows; `inserted`: places in the new ones; both ascending."""

    removed: tuple[int, ...]
    inserted: tuple[int, ...]

    @classmethod
    def between(cls, old: Sequence[_Key], new: Sequence[_Key], *, ordered: bool) -> tuple[Delta, list[_Key]] | None:
        """The delta, and the rows to which it leads: `new`, or what equals it but for the order if that means nothing.
        None if `ordered` rows that are in both have changed places."""
        kept, removed = split(old, new)
        kept_of_new, inserted = split(new, old)
        if not ordered:
            places = tuple(range(len(kept), len(new)))
            return cls(removed, places), [*kept, *(new[place] for place in inserted)]
        return (cls(removed, inserted), list(new)) if kept == kept_of_new else None

    def applied(self, rows: Sequence[Row], inserted: Sequence[Row]) -> list[Row]:
        """The new rows: `rows` as they were, and the new ones among them. Raises DeltaError."""
        gone, coming = set(self.removed), dict(zip(self.inserted, inserted, strict=False))
        total = len(rows) - len(gone) + len(coming)
        is_whole = len(coming) == len(self.inserted) == len(inserted)
        if not (is_whole and gone <= set(range(len(rows))) and coming.keys() <= set(range(total))):
            raise DeltaError(f"its places are not those of {len(rows)} rows")
        kept = iter([row for place, row in enumerate(rows) if place not in gone])
        return [coming[place] if place in coming else next(kept) for place in range(total)]


def split(rows: Sequence[_Key], others: Sequence[_Key]) -> tuple[list[_Key], tuple[int, ...]]:
    """The rows that the others have too, and the places of those that they lack."""
    there = Counter(others)
    kept: list[_Key] = []
    lacking: list[int] = []
    for place, row in enumerate(rows):
        if there[row] > 0:
            there[row] -= 1
            kept.append(row)
        else:
            lacking.append(place)
    return kept, tuple(lacking)
