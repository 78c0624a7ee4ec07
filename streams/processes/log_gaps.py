"""Whether the log still continues where a store ends: the loud state of D1, each way to get there in words of its own.

    deleted     the log starts above the position: retention, or somebody, deleted what lies between
    recreated   another topic of the same name: its records are others, whatever their offsets
    backwards   the log ends below the position: the broker lost records that were applied (an unclean election, a
                broker restored from a backup)
A position at the end of a log that was lost and written anew past it cannot be told from a good one by its offsets; the
topic's id tells where the topic itself was replaced.

A topic that a store knows nothing of is read from the log's start: its table is new. But where its owner's committed
position shows that a store had applied some of it, a store without it is not the one that did, as a snapshot of before
the table; what that one had applied below the log's start is `deleted` as well. Pure functions; callers:
processes/hosting.py, processes/standby.py.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

from streams.errors import LogGapError, LogGapKind, StoreError
from streams.ports import Watermarks
from streams.positions import TopicPartition

HINT = (
    "going on would lose or mix records, so the partition stopped. Restore the topic, or say what to go on from: "
    "`pintail recover --partition {partition} --from log|clickhouse|snapshot:VERSION`"
)


def check_position(topic_partition: TopicPartition, position: int | None, topic_id: str | None, log: Watermarks) -> int:
    """Where to read on: `position`, or the log's start where nothing was ever read (None). `topic_id` is the one that
    `position` is of, if it is known. Raises LogGapError."""
    if position is None:
        return log.low
    if topic_id is not None and log.topic_id is not None and topic_id != log.topic_id:
        raise log_gap(
            LogGapKind.RECREATED,
            topic_partition,
            position,
            f"the topic was deleted and created anew: the store's is {topic_id}, the log's is {log.topic_id} "
            f"and holds [{log.low}, {log.high})",
        )
    if position > log.high:
        raise log_gap(
            LogGapKind.BACKWARDS,
            topic_partition,
            position,
            f"the log ends at {log.high}: it went backwards, and lost records that were applied",
        )
    if position < log.low:
        raise log_gap(
            LogGapKind.DELETED,
            topic_partition,
            position,
            f"the log starts at {log.low}: retention has deleted what lies between",
        )
    return position


def check_unknown(topic_partition: TopicPartition, committed: int, log: Watermarks) -> None:
    """For a topic that the store does not know, with the position that its owner committed last. Raises LogGapError if
    records below the log's start may be missing in the store: one that was read from there on has committed no other
    position before it applied something."""
    if 0 < log.low != committed:
        raise log_gap(
            LogGapKind.DELETED,
            topic_partition,
            committed,
            f"it has nothing of what was applied below that, and the log starts at {log.low}",
        )


def check_uncut(
    known: Collection[str], before: Mapping[TopicPartition, Watermarks], log: Mapping[TopicPartition, Watermarks]
) -> None:
    """For a store that knows these topics and was recovered from what the log held `before`. Raises StoreError if the
    log has lost records of another one since: recovery counted on them, and anew it looks for them elsewhere."""
    for topic_partition, marks in log.items():
        if topic_partition.topic not in known and marks.low > before[topic_partition].low:
            raise StoreError(
                f"retention cut {topic_partition} to {marks.low} while it was recovered",
                hint="it is recovered anew, from what there is besides the log",
            )


def closes_gap(
    next_offsets: Mapping[str, int],
    partition: int,
    log: Mapping[TopicPartition, Watermarks],
    applied: Collection[str] = (),
) -> bool:
    """Whether a copy of the store at these positions could be replayed from the log. It must know the topics of which
    something was `applied`, unless the log has all of them."""
    return all(
        marks.low <= next_offsets[topic_partition.topic] <= marks.high
        if topic_partition.topic in next_offsets
        else not marks.low or topic_partition.topic not in applied
        for topic_partition, marks in log.items()
        if topic_partition.partition == partition
    )


def log_gap(kind: LogGapKind, topic_partition: TopicPartition, position: int, why: str) -> LogGapError:
    """The error, with the way out."""
    return LogGapError(
        f"log gap in {topic_partition}: the store continues at offset {position}, but {why}",
        kind=kind,
        hint=HINT.format(partition=topic_partition.partition),
    )
