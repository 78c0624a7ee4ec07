"""The store worker: write, query and snapshot agents over the partitions this member owns."""

from __future__ import annotations

import asyncio
import logging
import time
import zlib
from collections.abc import Callable, Collection, Mapping
from contextlib import AsyncExitStack
from dataclasses import replace
from functools import partial
from typing import Any

from agents.app import PintailApp, log_options, record_decoder
from agents.assignor import Membership
from agents.fetched_batches import ByteBudget
from agents.log_consumer import LogConsumer
from agents.query_requests import RequestAnswers, RequestReading
from agents.store_files import StoreFiles
from agents.worker_name import client_id
from schemas.catalog import Catalog
from streams.adapters.kafka_intents import GroupRecords
from streams.adapters.kafka_librdkafka import RdKafkaLog, RdKafkaTail
from streams.adapters.kafka_producers import KafkaDeadLetters, KafkaReplies
from streams.adapters.kafka_topics import PART_PARTITIONS, ensure_topics, topics_of
from streams.adapters.redis_snapshots import open_snapshot_repository
from streams.adapters.snapshot_codec import SnapshotCodec
from streams.batches import RecordBatch
from streams.config import Settings
from streams.errors import SnapshotStoreUnavailableError
from streams.finishing import in_thread
from streams.limits import STANDBY_BUFFER_BYTES_MAX
from streams.positions import TopicPartition
from streams.processes.answering import QueryService
from streams.processes.drill import drill_newest
from streams.processes.gathering import PartExchange
from streams.processes.hosting import HostingParts, PartitionHost, PartitionState
from streams.processes.local_copies import LocalCopies
from streams.processes.opening_ahead import OpeningAhead
from streams.processes.rebuilding import Rebuilding
from streams.processes.recovery import Recovered, Recovery
from streams.processes.recovery_orders import RecoveryOrders
from streams.processes.snapshotting import SnapshotInfo, SnapshotSchedule, Snapshotter
from streams.processes.standby import OwnersLetters, Standbys
from streams.processes.subscriptions import Subscriptions

logger = logging.getLogger(__name__)

SNAPSHOT_CHECK_SECONDS = 1.0
DRILL_CHECK_SECONDS = 1.0
RETENTION_SWEEP_SECONDS = 60.0
ORDERS_CHECK_SECONDS = 1.0
LOG_CHECK_SECONDS = 10.0
COPIES_SECONDS = 5.0
#: How long revoked partitions wait for the replies under way, so that their new owner does not answer them again.
LAST_REPLIES_SECONDS_MAX = 1.0


class StoreOwner:
    """agents.transport.PartitionOwner of the store worker: table topics are the host's, the query topic its own."""

    def __init__(
        self,
        host: PartitionHost,
        standbys: Standbys,
        requests: RequestReading,
        query_topic: str,
        membership: Membership,
        ahead: OpeningAhead,
    ) -> None:
        self._host = host
        self._standbys = standbys
        self._requests = requests
        self._query_topic = query_topic
        self._membership = membership
        self._ahead = ahead

    async def on_assigned(self, assigned: Collection[TopicPartition], generation: int) -> None:
        """Everything starts in the background; requests are read while their partition recovers."""
        del generation
        requests = [tp for tp in assigned if tp.topic == self._query_topic]
        await self._requests.assign(requests)
        owned, given = {tp.partition for tp in assigned if tp.topic != self._query_topic}, self._membership.given
        self._membership.owned = frozenset(owned)
        standbys = given.standbys - owned
        self._ahead.settle(owned | standbys)
        await self._standbys.promote(owned, kept=standbys)
        await self._host.assign(owned, kept=standbys)
        self._standbys.follow(standbys, given.awaited)

    async def revoke(self, revoked: Collection[TopicPartition]) -> None:
        """When it returns nothing of these partitions is read, applied or answered (invariant 5); their replies under
        way have had a moment. Their files stay open until it is known whose they are."""
        await self._requests.revoke([tp for tp in revoked if tp.topic == self._query_topic])
        await self._host.suspend({tp.partition for tp in revoked})
        await self._requests.open.wait_until_replied(LAST_REPLIES_SECONDS_MAX)

    def committable(self) -> Mapping[TopicPartition, int]:
        """See agents.transport.PartitionOwner."""
        return {**self._host.committable(), **self._requests.open.positions()}

    def on_out_of_range(self, topic_partition: TopicPartition) -> None:
        """See agents.transport.PartitionOwner."""
        self._host.on_out_of_range(topic_partition)

    def on_unreadable(self, topic_partition: TopicPartition, why: str) -> None:
        """See agents.transport.PartitionOwner."""
        self._host.on_unreadable(topic_partition, why)


def store_app(settings: Settings, files: StoreFiles) -> PintailApp:
    """The Faust app of one store worker."""
    catalog, store, ahead = files
    copies = LocalCopies(store, settings.store_dir)
    membership = Membership(settings.worker, standbys=settings.standby, copies=copies.positions)
    app = PintailApp(settings.store_group, settings, assigned_only=[settings.query_topic], membership=membership)
    repository, codec = open_snapshot_repository(settings), SnapshotCodec.from_settings(settings)
    name = client_id(settings, settings.store_group)
    dead_letters, replies = KafkaDeadLetters(settings), KafkaReplies(settings, client_id=f"{name}-replies")
    rebuilding, close_rebuilding = _rebuilding(settings, catalog)
    parts = HostingParts(
        catalog=catalog,
        store=store,
        recovery=Recovery(store, repository, codec, rebuilding=rebuilding),
        snapshotter=Snapshotter(
            repository, codec, versions_kept=settings.snapshots_kept, hours_kept=settings.snapshot_hours_kept
        ),
        decoder=record_decoder(catalog, settings),
        dead_letters=dead_letters,
        orders=RecoveryOrders(settings.store_dir),
        snapshot_schedule=SnapshotSchedule(
            interval_seconds=settings.snapshot_interval_seconds, after_bytes=settings.snapshot_after_bytes
        ),
        committed_record=lambda topic_partition: app.log_reader.committed_record(topic_partition),
        confirmed=partial(membership.confirmed, settings.session_timeout_seconds),
        drill=partial(drill_newest, repository, codec, catalog, settings.data_dir / "drills"),
    )
    host = PartitionHost(parts, app.log_reader, revoke_seconds_max=settings.revoke_seconds_max)
    request_log = RdKafkaLog(
        settings,
        client_id=f"{name}-requests",
        group=settings.store_group,
        deliver=lambda batch: answer_requests(batch),
        on_out_of_range=lambda topic_partition: requests.start(topic_partition),
        on_unreadable=lambda topic_partition, why: requests.read_again(topic_partition, why),
    )
    part_replies = TopicPartition(settings.part_topic, zlib.crc32(settings.worker.encode()) % PART_PARTITIONS)
    exchange = PartExchange(replies.send, settings, reply_partition=part_replies.partition)
    parts_log = RdKafkaTail(
        settings,
        part_replies,
        client_id=f"{name}-parts",
        group=settings.store_group,
        deliver=exchange.deliver,
    )
    requests = RequestReading(request_log, app.log_reader.committed_record)
    standby_log = LogConsumer(
        log_options(settings, f"{name}-standbys"),
        deliver=lambda batch: standbys.submit(batch),
        on_out_of_range=lambda topic_partition: standbys.on_out_of_range(topic_partition),
        on_unreadable=lambda topic_partition, why: standbys.on_unreadable(topic_partition, why),
        budget=ByteBudget(STANDBY_BUFFER_BYTES_MAX),
    )
    standby_parts = replace(
        parts,
        recovery=Recovery(store, repository, codec, rebuilding=rebuilding, claims_epochs=False),
        dead_letters=OwnersLetters(parts.committed_record),
    )
    standbys = Standbys(standby_parts, standby_log, on_all_warm=app.log_reader.join_again)
    owner = app.owner = StoreOwner(host, standbys, requests, settings.query_topic, membership, ahead)
    queries = QueryService(store, catalog, host, settings, ask=exchange.ask)
    host.before_closing = queries.release
    subscriptions = Subscriptions(queries.answer, host, settings, send=replies.send)
    answers = RequestAnswers(subscriptions.answer, replies=replies, dead_letters=dead_letters)

    def answer_requests(batch: RecordBatch) -> None:
        """Begins to answer each; a slow one never holds up the next."""
        fresh = requests.accept(batch)
        if fresh is not None:
            answers.begin(fresh, requests.open)

    async def prepare() -> None:
        await ensure_topics(topics_of(catalog, settings), settings)
        try:
            async with open_snapshot_repository(settings) as probe:
                await probe.verify_configuration()
        except SnapshotStoreUnavailableError as error:
            logger.warning("starting without Redis: %s", error)

    async def start() -> None:
        await asyncio.gather(
            dead_letters.start(), replies.start(), request_log.start(), parts_log.start(), standby_log.start()
        )

    async def stop() -> None:
        """In the reverse of this order, each step also when one before it failed."""
        async with AsyncExitStack() as steps:
            steps.push_async_callback(in_thread, store.close)
            steps.push_async_callback(in_thread, ahead.close)
            steps.push_async_callback(repository.close)
            steps.push_async_callback(in_thread, close_rebuilding)
            steps.push_async_callback(replies.stop)
            steps.push_async_callback(dead_letters.stop)
            steps.push_async_callback(queries.close)
            steps.push_async_callback(parts_log.stop)
            steps.push_async_callback(subscriptions.close)
            steps.push_async_callback(answers.drain)
            steps.push_async_callback(request_log.stop)
            steps.push_async_callback(host.leave)
            steps.push_async_callback(standby_log.stop)
            steps.push_async_callback(standbys.stop)
            steps.push_async_callback(in_thread, copies.remember)

    app.before_joining.append(prepare)
    app.start_parts.append(start)
    app.stop_parts.append(stop)
    app.serve_status(lambda: status_of(host, standbys))

    @app.on_partitions_revoked.connect  # type: ignore[untyped-decorator]
    async def let_go(app: Any, revoked: Collection[Any], **_: Any) -> None:
        await owner.revoke([TopicPartition(*tp) for tp in revoked])
        await app.log_reader.commit()

    @app.agent(app.batches_of(*catalog.topics), name="write")  # type: ignore[untyped-decorator]
    async def write(batches: Any) -> None:
        """Hands each fetched batch to its partition, which commits it with whatever else is queued."""
        async for batch in batches:
            host.submit(batch)

    @app.timer(min(SNAPSHOT_CHECK_SECONDS, settings.snapshot_interval_seconds))  # type: ignore[untyped-decorator]
    async def snapshot() -> None:
        """Publishes an incremental snapshot of every partition that moved and is due."""
        await host.take_due_snapshots()

    @app.timer(DRILL_CHECK_SECONDS)  # type: ignore[untyped-decorator]
    async def rehearse() -> None:
        """Proves now and then that a partition's newest snapshot can be restored."""
        if settings.snapshot_drill_interval_seconds:
            await host.drill_next(settings.snapshot_drill_interval_seconds)

    @app.timer(RETENTION_SWEEP_SECONDS)  # type: ignore[untyped-decorator]
    async def retain() -> None:
        """Deletes rows that the tables' retention has passed."""
        now_ms = time.time_ns() // 1_000_000
        await host.delete_expired(now_ms)
        await standbys.delete_expired(now_ms)

    @app.timer(ORDERS_CHECK_SECONDS)  # type: ignore[untyped-decorator]
    async def obey() -> None:
        """Carries out `pintail recover`."""
        await host.carry_out_orders()

    @app.timer(LOG_CHECK_SECONDS)  # type: ignore[untyped-decorator]
    async def check_logs() -> None:
        """Notices a topic that was deleted and created anew, and one that lost records, while it is read."""
        await host.check_logs()

    @app.timer(COPIES_SECONDS)  # type: ignore[untyped-decorator]
    async def remember() -> None:
        """Notes how far the local copies are, for the next start."""
        await in_thread(copies.remember)

    return app


def _rebuilding(settings: Settings, catalog: Catalog) -> tuple[Rebuilding | None, Callable[[], None]]:
    """Recovery's ClickHouse rung, and what closes it. Its client is loaded only where there is a ClickHouse."""
    if not settings.clickhouse:
        return None, lambda: None
    from streams.adapters.clickhouse_history import ClickHouseHistory
    from streams.adapters.clickhouse_sink import ClickHouseSink

    sink = ClickHouseSink(settings.clickhouse)
    return Rebuilding(catalog, ClickHouseHistory(sink), GroupRecords(settings)), sink.close


_ON_ITS_WAY = (PartitionState.RECOVERING, PartitionState.REPLAYING)


def status_of(host: PartitionHost, standbys: Standbys) -> dict[str, Any]:
    """What /ready reports: ready when this worker serves all its partitions; one that has none, when all its standbys
    are warm."""
    hosted, copies = host.hosted(), standbys.standbys()
    is_warm = bool(copies) and all(standby.is_warm for standby in copies.values())
    return {
        "ready": len(host.serving()) == len(hosted) if hosted else is_warm,
        "partitions": {
            str(number): {
                "state": partition.state,
                "epoch": partition.epoch,
                "next_offsets": partition.positions,
                "lag": partition.lag,
                **({"recovered": _recovery_of(partition.recovered)} if partition.recovered else {}),
                **({"progress": partition.progress.report()} if partition.state in _ON_ITS_WAY else {}),
                **({"damage": damage} if (damage := partition.progress.damage) else {}),
                **({"snapshot": _snapshot_of(partition.snapshot)} if partition.snapshot else {}),
                **({"failure": str(failure)} if (failure := partition.failure or partition.obstacle) else {}),
            }
            for number, partition in sorted(hosted.items())
        },
        "standbys": {
            str(number): {
                "state": "restoring" if standby.lag_records is None else "standby",
                "next_offsets": standby.positions,
                "lag": standby.lag_records,
                **({"failure": standby.failure} if standby.failure else {}),
            }
            for number, standby in sorted(copies.items())
        },
    }


def _recovery_of(recovered: Recovered) -> dict[str, Any]:
    return {"rung": recovered.rung, "version": recovered.version, "seconds": round(recovered.seconds, 3)}


def _snapshot_of(info: SnapshotInfo) -> dict[str, Any]:
    return {"version": info.version, "next_offsets": dict(info.next_offsets)}
