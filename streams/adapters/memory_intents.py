"""MemoryIntents: DeliveryIntents in memory, with the fence of a consumer group. For tests and experiments.

`join` stands for a rebalance: it gives the new owner a view of its own, and every older view is refused from then on.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from streams.errors import SinkFencedError
from streams.positions import OffsetRange, TopicPartition


@dataclass
class IntentLog:
    """What the group's coordinator would keep."""

    generation: int = 0
    newest: dict[TopicPartition, OffsetRange] = field(default_factory=dict)
    #: Every record that was accepted, in order, with the generation that wrote it.
    history: list[tuple[int, TopicPartition, OffsetRange]] = field(default_factory=list)

    def join(self) -> MemoryIntents:
        """A new owner; the owners before it are fenced."""
        self.generation += 1
        return MemoryIntents(self, self.generation)


@dataclass(frozen=True)
class MemoryIntents:
    """One owner's view of an IntentLog."""

    log: IntentLog
    generation: int

    async def record(self, topic_partition: TopicPartition, offsets: OffsetRange) -> None:
        """See DeliveryIntents."""
        if self.generation != self.log.generation:
            raise SinkFencedError(
                f"{topic_partition}: generation {self.generation} tried to record {offsets}, "
                f"but generation {self.log.generation} owns the partition",
                hint="nothing to do: the newer owner delivers these records",
            )
        self.log.newest[topic_partition] = offsets
        self.log.history.append((self.generation, topic_partition, offsets))

    async def read(self, topic_partition: TopicPartition) -> OffsetRange | None:
        """See DeliveryIntents."""
        return self.log.newest.get(topic_partition)
