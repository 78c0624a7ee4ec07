"""Delivers the tail of a table to ClickHouse anew: what lies at and above an offset is put aside and read from the log.

Order of effects, which makes a rebuild that is interrupted harmless:
    1. check   no sink worker runs; the log holds everything from the offset on. Partitions that have not come that far
               are left alone
    2. fill    a new table gets the rows that stay
    3. set     the group's positions go back to the offset, with nothing under way
    4. switch  the new table takes the old one's place; the old one is kept
Between 3 and 4 the old table is still there, and its last offset puts deliveries back where they were. The other way
round, they would go on behind a hole. Called by `pintail sink rebuild`.
"""

from __future__ import annotations

import asyncio
from collections.abc import Collection
from dataclasses import dataclass
from datetime import UTC, datetime

from schemas.table import TableDefinition
from streams.adapters.clickhouse_rebuilding import ClickHouseReplacement
from streams.adapters.kafka_positions import GroupPositions
from streams.errors import RebuildRefusedError
from streams.ports import RecordedIntents
from streams.positions import TopicPartition, next_offset_after
from streams.processes.delivery import delivered_to


@dataclass(frozen=True)
class Rebuilt:
    """What a rebuild did."""

    rows_kept: int
    #: Where the old table is now.
    kept_as: str
    #: Records in the log that the sink delivers anew, at most.
    records: int


async def rebuild_table(
    table: TableDefinition,
    partitions: Collection[int],
    from_offset: int,
    *,
    replacement: ClickHouseReplacement,
    positions: GroupPositions,
    records: RecordedIntents,
) -> Rebuilt:
    """See the module. Raises RebuildRefusedError, SinkError; then deliveries go on as if nothing had been done."""
    # 1. check
    await positions.check_stopped()
    topic_partitions = [TopicPartition(table.topic, partition) for partition in sorted(partitions)]
    topic_partitions = [each for each in topic_partitions if await _delivered(each, replacement, records) > from_offset]
    if not topic_partitions:
        raise RebuildRefusedError(
            f"nothing of {table.name!r} at or above offset {from_offset} is delivered",
            hint="give a lower offset; SELECT _partition, max(_offset) ... GROUP BY 1 shows what is there",
        )
    marks = await positions.watermarks(topic_partitions)
    for each in topic_partitions:
        if from_offset < marks[each].low:
            raise RebuildRefusedError(
                f"{each}: the log starts at {marks[each].low}, so rows from {from_offset} on cannot be delivered again",
                hint=f"rebuild from {marks[each].low} or a higher offset, or restore the topic",
            )
    # 2. fill
    rows_kept = await asyncio.to_thread(replacement.fill, [each.partition for each in topic_partitions], from_offset)
    # 3. set
    try:
        await positions.set(dict.fromkeys(topic_partitions, from_offset))
    except BaseException:
        await asyncio.to_thread(replacement.drop)
        raise
    # 4. switch
    kept_as = f"{table.name}_before_{datetime.now(UTC):%Y%m%dT%H%M%S}"
    await asyncio.to_thread(replacement.switch, kept_as)
    return Rebuilt(rows_kept, kept_as, sum(max(0, marks[each].high - from_offset) for each in topic_partitions))


async def _delivered(
    topic_partition: TopicPartition, replacement: ClickHouseReplacement, records: RecordedIntents
) -> int:
    """Everything below this offset is delivered."""
    record = await records.read(topic_partition)
    stored = await asyncio.to_thread(replacement.last_offset, topic_partition)
    return delivered_to(record, None if stored is None else next_offset_after(stored)) or 0
