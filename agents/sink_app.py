"""The sink worker: one agent that hands batches to the deliveries of the partitions this member owns."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Collection, Mapping
from contextlib import AsyncExitStack
from dataclasses import dataclass
from typing import Any

from agents.app import PintailApp, record_decoder
from schemas.catalog import load_catalog
from streams.adapters.clickhouse_sink import ClickHouseSink
from streams.adapters.kafka_intents import metadata_of, recorded_intent
from streams.adapters.kafka_producers import KafkaDeadLetters
from streams.adapters.kafka_topics import ensure_topics, topics_of
from streams.config import Settings
from streams.errors import SinkError, SinkUnavailableError
from streams.positions import OffsetRange, TopicPartition
from streams.processes.delivery import Delivery, PartitionDelivery
from streams.processes.microbatches import FlushLimits
from streams.processes.sink_hosting import SinkHost
from streams.retry import Backoff, retrying

logger = logging.getLogger(__name__)

#: The broker gathers for no longer, whatever the interval: a fetch holds up what else it is asked on the connection.
FETCH_WAIT_MS_MAX = 250


@dataclass
class _WaitingRecord:
    offsets: OffsetRange
    #: Why it could not be committed; None once it is.
    outcome: asyncio.Future[SinkError | None]


class GroupIntents:
    """streams.ports.DeliveryIntents in the consumer group: the committed position is `lo`, its metadata `lo:hi`. Kafka
    refuses the commit of a member that a rebalance has left behind, which is the fence.

    A group commits one request at a time, and partitions are flushed together: what is to be recorded while a commit is
    under way shares the next one."""

    def __init__(self, app: PintailApp) -> None:
        self._app = app
        self._waiting: dict[TopicPartition, _WaitingRecord] = {}
        self._committing = asyncio.Lock()

    async def record(self, topic_partition: TopicPartition, offsets: OffsetRange) -> None:
        """See streams.ports.DeliveryIntents."""
        mine = _WaitingRecord(offsets, asyncio.get_running_loop().create_future())
        self._waiting[topic_partition] = mine
        try:
            async with self._committing:
                if not mine.outcome.done():
                    together, self._waiting = self._waiting, {}
                    await self._commit(together)
        finally:
            # Cancelled while it waited: its assignment has ended, so nobody may commit it.
            if self._waiting.get(topic_partition) is mine:
                del self._waiting[topic_partition]
        if failure := mine.outcome.result():
            raise failure

    async def _commit(self, together: Mapping[TopicPartition, _WaitingRecord]) -> None:
        """Settles the outcome of each; of a commit that ends without an answer, that it is to be tried again."""
        records = {each: (waiting.offsets.lo, metadata_of(waiting.offsets)) for each, waiting in together.items()}
        failures: Mapping[TopicPartition, SinkError] | None = None
        try:
            failures = await self._app.log_reader.commit_records(records)
        finally:
            for each, waiting in together.items():
                if failures is None:
                    waiting.outcome.set_result(SinkUnavailableError(f"the commit for {each} was interrupted"))
                else:
                    waiting.outcome.set_result(failures.get(each))

    async def read(self, topic_partition: TopicPartition) -> OffsetRange | None:
        """See streams.ports.DeliveryIntents."""
        committed = await self._app.log_reader.committed_record(topic_partition)
        return None if committed is None else intent_of(*committed)


def intent_of(offset: int, metadata: str) -> OffsetRange:
    """The BEFORE record in a committed position. One with other metadata than `lo:hi`, or with none, was committed by
    somebody else (an operator's reset): it says where to go on and that nothing is under way."""
    if record := recorded_intent(offset, metadata):
        return record
    if metadata:
        logger.warning("goes on at %d: its metadata %r is not ours", offset, metadata)
    return OffsetRange(offset, offset)


def sink_app(settings: Settings) -> PintailApp:
    """The Faust app of one sink worker."""
    settings.require("kafka", "clickhouse")
    catalog = load_catalog(settings.tables_dir)
    app = PintailApp(settings.sink_group, settings)
    # The broker gathers what one insert is made of: a wake-up per fetch that only waits here would cost more.
    app.consumer_options["fetch_max_wait_ms"] = min(settings.sink_flush_interval_ms, FETCH_WAIT_MS_MAX)
    sink, dead_letters = (
        ClickHouseSink(settings.clickhouse, cluster=settings.clickhouse_cluster),
        KafkaDeadLetters(settings),
    )
    delivery = Delivery(
        sink=sink,
        intents=GroupIntents(app),
        decoder=record_decoder(catalog, settings),
        dead_letters=dead_letters,
        limits=FlushLimits.of(settings),
        # The transport's own budget stops the fetching first; this one must never make the agent wait for it.
        buffer_bytes_max=2 * settings.ingest_buffer_bytes_max,
        refused_in_a_row_max=settings.sink_refused_in_a_row_max,
    )
    host = app.owner = SinkHost(delivery, catalog, app.log_reader)

    async def prepare() -> None:
        await ensure_topics(topics_of(catalog, settings), settings)
        await retrying(
            lambda: asyncio.to_thread(sink.ensure_tables, catalog),
            what="preparing ClickHouse's tables",
            backoff=Backoff(ceiling_seconds=10.0),
        )

    async def stop() -> None:
        """In the reverse of this order, each step also when one before it failed."""
        async with AsyncExitStack() as steps:
            steps.push_async_callback(asyncio.to_thread, sink.close)
            steps.callback(delivery.close)
            steps.push_async_callback(dead_letters.stop)
            steps.push_async_callback(host.revoke, list(host.hosted()))

    app.before_joining.append(prepare)
    app.start_parts.append(dead_letters.start)
    app.stop_parts.append(stop)
    app.serve_status(lambda: status_of(host))

    @app.on_partitions_revoked.connect  # type: ignore[untyped-decorator]
    async def let_go(app: Any, revoked: Collection[Any], **_: Any) -> None:
        del app
        await host.revoke([TopicPartition(*tp) for tp in revoked])

    @app.agent(app.batches_of(*catalog.topics), name="deliver")  # type: ignore[untyped-decorator]
    async def deliver(batches: Any) -> None:
        """Hands each fetched batch to its delivery, which flushes by rows, bytes and age."""
        async for batch in batches:
            await host.submit(batch)

    return app


def status_of(host: SinkHost) -> dict[str, Any]:
    """What /ready reports: ready when this worker has partitions and delivers all of them."""
    partitions: dict[str, dict[str, Any]] = {}
    for topic_partition, each in sorted(host.hosted().items()):
        failure = each.failure or each.delivery.failure
        partitions[str(topic_partition)] = {
            "state": each.state,
            "next_offset": each.delivery.next_offset,
            "lag": each.lag,
            "circuit": each.delivery.circuit,
            **(_trouble_of(each.delivery) if each.delivery.failures else {}),
            **({"failure": str(failure)} if failure else {}),
        }
    running = [each.is_running for each in host.hosted().values()]
    return {"ready": bool(running) and all(running), "partitions": partitions}


def _trouble_of(delivery: PartitionDelivery) -> dict[str, Any]:
    """Of a delivery whose circuit is not closed."""
    return {
        "failures": delivery.failures,
        "failing_seconds": round(delivery.failing_seconds, 1),
        "backoff_seconds": round(delivery.backoff_seconds, 1),
    }
