"""Positions in the log, as types. The only `+ 1` between an offset and a position lives here.

`offset` names one record; `applied_offset` is inclusive; `next_offset` is exclusive and is what gets committed; ranges
are half-open. Kafka offsets need not be dense (compaction, transaction markers): count records, never subtract offsets.
"""

from __future__ import annotations

from typing import NamedTuple


class TopicPartition(NamedTuple):
    """One partition of one topic."""

    topic: str
    partition: int

    def __str__(self) -> str:
        return f"{self.topic}[{self.partition}]"


class OffsetRange(NamedTuple):
    """Half-open: `lo` is included, `hi` is not."""

    lo: int
    hi: int

    def __contains__(self, offset: object) -> bool:
        return isinstance(offset, int) and self.lo <= offset < self.hi

    def __str__(self) -> str:
        return f"[{self.lo}, {self.hi})"


def next_offset_after(offset: int) -> int:
    """The position right after the record at `offset`."""
    return offset + 1
