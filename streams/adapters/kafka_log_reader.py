"""KafkaLogReader: what the log of a topic partition holds, read from outside any consumer group.

Reads `read_committed`, like the workers, so a partition ends where its newest finished transaction does. Called by the
audit, on its event loop.
"""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Collection, Mapping
from types import TracebackType
from typing import Any, Self

from aiokafka import AIOKafkaConsumer
from aiokafka.admin import AIOKafkaAdminClient
from aiokafka.admin.config_resource import ConfigResource, ConfigResourceType
from aiokafka.errors import KafkaError
from aiokafka.structs import TopicPartition as KafkaTopicPartition

from streams.adapters.kafka_options import kafka_client_options
from streams.adapters.kafka_watermarks import read_watermarks
from streams.batches import RecordBatch, headers_of, size_of
from streams.config import Settings
from streams.errors import ConfigurationError, RequestTimeoutError
from streams.ports import Watermarks
from streams.positions import OffsetRange, TopicPartition

_RECORDS_TOGETHER_MAX = 5_000
_POLL_MS = 500
_FETCH_WAIT_MS_MAX = 10
#: A log that does not go on for so long is reported.
_SECONDS_MAX = 30.0


class KafkaLogReader:
    """One reader, which reads one partition at a time. `async with` connects it."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings

    async def __aenter__(self) -> Self:
        """Raises ConfigurationError when Kafka cannot be reached."""
        self._consumer = AIOKafkaConsumer(
            **kafka_client_options(self._settings),
            enable_auto_commit=False,
            auto_offset_reset="none",
            isolation_level="read_committed",
            # Before another partition can be fetched, the fetch that waits for more of the one before must end.
            fetch_max_wait_ms=_FETCH_WAIT_MS_MAX,
        )
        try:
            await self._consumer.start()
        except KafkaError as error:
            await self._consumer.stop()
            raise ConfigurationError(
                f"Kafka at {self._settings.kafka}: {error!r}", hint="check PINTAIL_KAFKA and that the broker runs"
            ) from error
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._consumer.stop()

    async def partitions(self, topic: str) -> list[TopicPartition]:
        """Those that the topic has; none if there is no such topic."""
        try:
            await self._consumer._client.force_metadata_update()
            known = await self._consumer._client.fetch_all_metadata()
        except KafkaError as error:
            raise _unreadable(topic, error) from error
        return [TopicPartition(topic, number) for number in sorted(known.partitions_for_topic(topic) or ())]

    async def is_compacted(self, topic: str) -> bool:
        """Whether Kafka removes records of the topic that have a newer one of their key."""
        admin = AIOKafkaAdminClient(**kafka_client_options(self._settings))
        try:
            await admin.start()
            (reply,) = await admin.describe_configs([ConfigResource(ConfigResourceType.TOPIC, topic)])
            ((_, _, _, _, entries),) = reply.resources
            return any(name == "cleanup.policy" and "compact" in value for name, value, *_ in entries)
        except KafkaError as error:
            raise _unreadable(f"the configuration of {topic}", error) from error
        finally:
            await admin.close()

    async def watermarks(self, topic_partitions: Collection[TopicPartition]) -> Mapping[TopicPartition, Watermarks]:
        """What the log holds at this moment. Raises RequestTimeoutError."""
        if not topic_partitions:
            return {}
        try:
            return await read_watermarks(self._consumer, topic_partitions)
        except KafkaError as error:
            raise _unreadable(", ".join(map(str, topic_partitions)), error) from error

    async def read(self, topic_partition: TopicPartition, offsets: OffsetRange) -> AsyncIterator[RecordBatch]:
        """The records of the range, as batches that touch one another and cover it.

        Raises RequestTimeoutError if the log does not go on."""
        key = KafkaTopicPartition(*topic_partition)
        self._consumer.assign([key])
        self._consumer.seek(key, offsets.lo)
        position, progressed = offsets.lo, time.monotonic()
        while position < offsets.hi:
            try:
                fetched = await self._consumer.getmany(key, timeout_ms=_POLL_MS, max_records=_RECORDS_TOGETHER_MAX)
                reached = await self._consumer.position(key)
            except KafkaError as error:
                raise _unreadable(str(topic_partition), error) from error
            if reached > position:
                yield _batch(topic_partition, position, reached, fetched.get(key, [])).ending_at(offsets.hi)
                position, progressed = reached, time.monotonic()
            elif time.monotonic() - progressed > _SECONDS_MAX:
                raise RequestTimeoutError(
                    f"{topic_partition} does not go on at offset {position}", hint="check that its broker runs"
                )


def _batch(topic_partition: TopicPartition, first_offset: int, next_offset: int, records: list[Any]) -> RecordBatch:
    values, keys = [record.value for record in records], [record.key for record in records]
    return RecordBatch(
        *topic_partition,
        first_offset=first_offset,
        next_offset=next_offset,
        values=values,
        keys=keys,
        offsets=[record.offset for record in records],
        timestamps_ms=[record.timestamp for record in records],
        headers={index: headers_of(record.headers) for index, record in enumerate(records) if record.headers},
        size_bytes=size_of(values, keys),
    )


def _unreadable(what: str, error: KafkaError) -> RequestTimeoutError:
    return RequestTimeoutError(f"{what} cannot be read: {error!r}", hint="check that the broker runs")
