"""The positions of the sink's consumer group, for an operator's command: the log's edges, and setting them anew.

Kafka lets nobody but its members set a group's positions while it has any, so the sink workers must be stopped.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Collection, Mapping
from contextlib import asynccontextmanager

from aiokafka import AIOKafkaConsumer
from aiokafka.errors import CommitFailedError, IllegalGenerationError, KafkaError, UnknownMemberIdError
from aiokafka.structs import OffsetAndMetadata
from aiokafka.structs import TopicPartition as KafkaTopicPartition

from streams.adapters.kafka_groups import describe_group
from streams.adapters.kafka_intents import metadata_of
from streams.adapters.kafka_options import kafka_client_options
from streams.adapters.kafka_watermarks import read_watermarks
from streams.config import Settings
from streams.errors import RebuildRefusedError, SinkUnavailableError
from streams.ports import Watermarks
from streams.positions import OffsetRange, TopicPartition

_STOPPED = frozenset({"Empty", "Dead"})


class GroupPositions:
    """Of the group of `settings`. All methods raise SinkUnavailableError while Kafka is away."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._group = settings.sink_group

    async def check_stopped(self) -> None:
        """Raises RebuildRefusedError while the group has members."""
        try:
            state = (await describe_group(self._settings, self._group)).state
        except KafkaError as error:
            raise self._unavailable(error) from error
        if state not in _STOPPED:
            raise self._still_runs(state)

    async def watermarks(self, topic_partitions: Collection[TopicPartition]) -> Mapping[TopicPartition, Watermarks]:
        """Where the log begins and ends."""
        async with self._consumer() as consumer:
            return await read_watermarks(consumer, topic_partitions)

    async def set(self, positions: Mapping[TopicPartition, int]) -> None:
        """Deliveries go on there and nothing is under way. Raises RebuildRefusedError if the group has members."""
        async with self._consumer() as consumer:
            consumer.assign([KafkaTopicPartition(*each) for each in positions])
            try:
                await consumer.commit(
                    {
                        KafkaTopicPartition(*each): OffsetAndMetadata(at, metadata_of(OffsetRange(at, at)))
                        for each, at in positions.items()
                    }
                )
            except (CommitFailedError, IllegalGenerationError, UnknownMemberIdError) as error:
                raise self._still_runs("has members") from error

    @asynccontextmanager
    async def _consumer(self) -> AsyncIterator[AIOKafkaConsumer]:
        options = kafka_client_options(self._settings)
        consumer = AIOKafkaConsumer(**options, group_id=self._group, enable_auto_commit=False)
        try:
            await consumer.start()
            yield consumer
        except KafkaError as error:
            raise self._unavailable(error) from error
        finally:
            await consumer.stop()

    def _unavailable(self, error: KafkaError) -> SinkUnavailableError:
        return SinkUnavailableError(f"Kafka: {error!r}", hint="is Kafka up, and may this user alter the sink's group?")

    def _still_runs(self, state: str) -> RebuildRefusedError:
        return RebuildRefusedError(
            f"sink workers run: group {self._group} {state}",
            hint="stop every sink worker, rebuild, then start them again; the store and queries are not affected",
        )
