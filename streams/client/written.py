"""Where a record that the client wrote is, and `at_least` made of such places."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import NamedTuple


class Written(NamedTuple):
    """The place of one record; give it as `at_least`, and the answer reflects the record."""

    topic: str
    partition: int
    offset: int


AtLeast = Mapping[str, Mapping[int, int]] | Written | Iterable[Written]


def positions_of(at_least: AtLeast | None) -> dict[str, dict[int, int]]:
    """topic -> partition -> offset, of several records of a partition the last one."""
    if isinstance(at_least, Mapping):
        return {topic: dict(positions) for topic, positions in at_least.items()}
    places = [at_least] if isinstance(at_least, Written) else list(at_least or ())
    positions: dict[str, dict[int, int]] = {}
    for topic, partition, offset in places:
        newest = positions.setdefault(topic, {})
        newest[partition] = max(offset, newest.get(partition, offset))
    return positions
