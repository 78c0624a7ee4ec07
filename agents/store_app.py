"""The store worker: write, query and snapshot agents over the partitions this member owns."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Collection, Mapping
from typing import Any

from agents.app import PintailApp, record_decoder
from agents.open_requests import OpenRequests
from schemas.catalog import load_catalog
from streams.adapters.duckdb_store import DuckDBStore
from streams.adapters.kafka_producers import KafkaDeadLetters, KafkaReplies
from streams.adapters.kafka_topics import ensure_topics, topics_of
from streams.adapters.redis_snapshots import open_snapshot_repository
from streams.adapters.snapshot_codec import SnapshotCodec
from streams.batches import RecordBatch
from streams.config import Settings
from streams.errors import SnapshotStoreUnavailableError
from streams.ports import DeadLetter
from streams.positions import TopicPartition
from streams.processes.answering import IncomingRequest, QueryService
from streams.processes.hosting import HostingParts, PartitionHost
from streams.processes.recovery import Recovered, Recovery
from streams.processes.snapshotting import SnapshotInfo, Snapshotter
from streams.retry import Backoff, retrying

logger = logging.getLogger(__name__)

RETENTION_SWEEP_SECONDS = 60.0
#: How long revoked partitions wait for the replies under way, so that their new owner does not answer them again.
LAST_REPLIES_SECONDS_MAX = 1.0


class StoreOwner:
    """agents.transport.PartitionOwner of the store worker: table topics are the host's, the query topic its own."""

    def __init__(self, app: PintailApp, host: PartitionHost, query_topic: str) -> None:
        self._app = app
        self._host = host
        self._query_topic = query_topic
        self.requests = OpenRequests({})

    async def on_assigned(self, assigned: Collection[TopicPartition], generation: int) -> Mapping[TopicPartition, int]:
        """Partitions recover in the background; requests are read at once, since each deserves at least a refusal."""
        del generation
        await self._host.assign({tp.partition for tp in assigned if tp.topic != self._query_topic})
        requests = [tp for tp in assigned if tp.topic == self._query_topic]
        marks = await self._app.log_reader.watermarks(requests)
        positions = {}
        for tp in requests:
            committed = await self._app.log_reader.committed_record(tp)
            positions[tp] = min(max(committed[0] if committed else 0, marks[tp].low), marks[tp].high)
        self.requests = OpenRequests(positions)
        return positions

    def committable(self) -> Mapping[TopicPartition, int]:
        """See agents.transport.PartitionOwner."""
        return {**self._host.committable(), **self.requests.positions()}

    def on_out_of_range(self, topic_partition: TopicPartition) -> None:
        """See agents.transport.PartitionOwner."""
        if topic_partition.topic != self._query_topic:
            self._host.on_out_of_range(topic_partition)


def store_app(settings: Settings) -> PintailApp:
    """The Faust app of one store worker."""
    settings.require("kafka", "redis", "snapshot_key")
    catalog = load_catalog(settings.tables_dir)
    app = PintailApp(settings.store_group, settings, unbudgeted_topics=[settings.query_topic])

    store = DuckDBStore(
        settings.store_dir, catalog, memory_limit=settings.store_memory_limit, threads=settings.store_threads
    )
    repository, codec = open_snapshot_repository(settings), SnapshotCodec.from_settings(settings)
    dead_letters, replies = KafkaDeadLetters(settings), KafkaReplies(settings)
    parts = HostingParts(
        catalog=catalog,
        store=store,
        recovery=Recovery(store, repository, codec),
        snapshotter=Snapshotter(repository, codec, versions_kept=settings.snapshots_kept),
        decoder=record_decoder(catalog, settings),
        dead_letters=dead_letters,
    )
    host = PartitionHost(parts, app.log_reader)
    owner = app.owner = StoreOwner(app, host, settings.query_topic)
    queries = QueryService(store, catalog, host, settings)
    host.before_closing = queries.release

    async def prepare() -> None:
        await ensure_topics(topics_of(catalog, settings), settings)
        try:
            async with open_snapshot_repository(settings) as probe:
                await probe.verify_configuration()
        except SnapshotStoreUnavailableError as error:
            logger.warning("starting without Redis: %s", error)

    async def start() -> None:
        await asyncio.gather(dead_letters.start(), replies.start())

    async def stop() -> None:
        await host.revoke(list(host.hosted()))
        await queries.close()
        await asyncio.gather(dead_letters.stop(), replies.stop(), repository.close())
        await asyncio.to_thread(store.close)

    app.before_joining.append(prepare)
    app.start_parts.append(start)
    app.stop_parts.append(stop)
    app.serve_status(lambda: status_of(host))

    @app.on_partitions_revoked.connect  # type: ignore[untyped-decorator]
    async def let_go(app: Any, revoked: Collection[Any], **_: Any) -> None:
        await host.revoke({tp.partition for tp in revoked})
        await owner.requests.wait_until_replied(LAST_REPLIES_SECONDS_MAX)
        await app.log_reader.commit()

    @app.agent(app.batches_of(*catalog.topics), name="write")  # type: ignore[untyped-decorator]
    async def write(batches: Any) -> None:
        """Hands each fetched batch to its partition, which commits it with whatever else is queued."""
        async for batch in batches:
            host.submit(batch)

    @app.agent(app.batches_of(settings.query_topic), name="query")  # type: ignore[untyped-decorator]
    async def query(batches: Any) -> None:
        """Answers each request in a task of its own: a slow one never holds up the next."""
        answering: set[asyncio.Task[None]] = set()
        async for batch in batches:
            owner.requests.read(batch)
            for request in requests_of(batch):
                task = asyncio.create_task(answer(request, owner.requests, batch.topic_partition))
                answering.add(task)
                task.add_done_callback(answering.discard)

    async def answer(request: IncomingRequest, requests: OpenRequests, source: TopicPartition) -> None:
        reply = await queries.answer(request)
        if isinstance(reply, DeadLetter):
            await retrying(lambda: dead_letters.park([reply]), what="parking a request", backoff=Backoff())
        else:
            await replies.send(
                reply.topic, value=reply.value, key=reply.key, partition=reply.partition, headers=reply.headers
            )
        requests.replied(source, request.offset)

    @app.timer(settings.snapshot_interval_seconds)  # type: ignore[untyped-decorator]
    async def snapshot() -> None:
        """Publishes an incremental snapshot of every partition that moved."""
        await host.take_snapshots()

    @app.timer(RETENTION_SWEEP_SECONDS)  # type: ignore[untyped-decorator]
    async def retain() -> None:
        """Deletes rows that the tables' retention has passed."""
        await host.delete_expired(time.time_ns() // 1_000_000)

    return app


def requests_of(batch: RecordBatch) -> list[IncomingRequest]:
    """The records of the query topic, one request each."""
    return [
        IncomingRequest(
            value=batch.values[index],
            key=batch.keys[index],
            headers=batch.headers.get(index, ()),
            partition=batch.partition,
            offset=batch.offsets[index],
            timestamp_ms=batch.timestamps_ms[index],
        )
        for index in range(len(batch))
    ]


def status_of(host: PartitionHost) -> dict[str, Any]:
    """What /ready reports: ready when this worker has partitions and serves all of them."""
    hosted = host.hosted()
    return {
        "ready": bool(hosted) and len(host.serving()) == len(hosted),
        "partitions": {
            str(number): {
                "state": partition.state,
                "epoch": partition.epoch,
                "next_offsets": partition.positions,
                **({"recovered": _recovery_of(partition.recovered)} if partition.recovered else {}),
                **({"snapshot": _snapshot_of(partition.snapshot)} if partition.snapshot else {}),
                **({"failure": str(failure)} if (failure := partition.failure or partition.obstacle) else {}),
            }
            for number, partition in sorted(hosted.items())
        },
    }


def _recovery_of(recovered: Recovered) -> dict[str, Any]:
    return {"rung": recovered.rung, "version": recovered.version, "seconds": round(recovered.seconds, 3)}


def _snapshot_of(info: SnapshotInfo) -> dict[str, Any]:
    return {"version": info.version, "next_offsets": dict(info.next_offsets)}
