"""`python -m tests.zombie_owner`: the owner of one partition, in a process that a test can stop and let go on.

The group's intents are in the test's process; this one reaches them through a manager of multiprocessing, as a worker
reaches Kafka. It makes the test's log anew from its seed, delivers all of it, and prints the state in which it ended.
"""

from __future__ import annotations

import asyncio
import json
import sys
from multiprocessing.managers import BaseManager
from random import Random
from typing import Any

from streams.adapters.clickhouse_sink import ClickHouseSink
from streams.adapters.memory_intents import MemoryIntents
from streams.positions import OffsetRange, TopicPartition
from streams.processes.delivery import Delivery, DeliveryState
from streams.processes.microbatches import FlushLimits
from tests.sink_log import MemoryDeadLetters, PartitionLog, append_table, submit_all
from tests.store_samples import DECODER


class SharedIntents:
    """An owner's view of the IntentLog, for a manager: plain values in and out."""

    def __init__(self, intents: MemoryIntents) -> None:
        self._intents = intents

    def record(self, topic: str, partition: int, lo: int, hi: int) -> None:
        """Raises SinkFencedError."""
        asyncio.run(self._intents.record(TopicPartition(topic, partition), OffsetRange(lo, hi)))

    def read(self, topic: str, partition: int) -> tuple[int, int] | None:
        """The newest BEFORE record."""
        return asyncio.run(self._intents.read(TopicPartition(topic, partition)))


class IntentServer(BaseManager):
    """Where the test's process serves `SharedIntents` as `intents`."""


class RemoteIntents:
    """streams.ports.DeliveryIntents over an IntentServer."""

    def __init__(self, shared: Any) -> None:
        self._shared = shared

    async def record(self, topic_partition: TopicPartition, offsets: OffsetRange) -> None:
        """See streams.ports.DeliveryIntents."""
        await asyncio.to_thread(lambda: self._shared.record(*topic_partition, *offsets))

    async def read(self, topic_partition: TopicPartition) -> OffsetRange | None:
        """See streams.ports.DeliveryIntents."""
        found = await asyncio.to_thread(lambda: self._shared.read(*topic_partition))
        return None if found is None else OffsetRange(*found)


def log_of(table_name: str, seed: int, records: int) -> PartitionLog:
    """The log that both processes know."""
    log = PartitionLog(TopicPartition(append_table(table_name).topic, 0))
    log.fill(Random(seed), records)
    return log


async def own(url: str, port: int, table_name: str, seed: int, records: int) -> DeliveryState:
    """Delivers until everything is there or the assignment has ended."""
    IntentServer.register("intents")
    server = IntentServer(("127.0.0.1", port), authkey=table_name.encode())
    server.connect()
    sink = ClickHouseSink(url)
    delivery = Delivery(
        sink=sink,
        intents=RemoteIntents(server.intents()),  # type: ignore[attr-defined]
        decoder=DECODER,
        dead_letters=MemoryDeadLetters(),
        limits=FlushLimits(rows_max=40, bytes_max=1 << 20, age_seconds_max=0.02),
    )
    log = log_of(table_name, seed, records)
    owner = delivery.open(log.topic_partition, append_table(table_name))
    feeding = asyncio.create_task(submit_all(owner, log, await owner.start(), Random(seed)))
    delivered = asyncio.create_task(owner.wait_until_delivered(log.next_offset))
    ended = asyncio.create_task(owner.wait_until_ended())
    await asyncio.wait({delivered, ended}, return_when=asyncio.FIRST_COMPLETED)
    state = owner.state
    for task in (feeding, delivered, ended):
        task.cancel()
    await asyncio.gather(feeding, delivered, ended, return_exceptions=True)
    await owner.stop()
    delivery.close()
    sink.close()
    return state


if __name__ == "__main__":
    url, port, table_name, seed, records = sys.argv[1:]
    print(json.dumps(asyncio.run(own(url, int(port), table_name, int(seed), int(records)))))
