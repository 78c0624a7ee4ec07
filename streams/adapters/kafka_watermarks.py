"""Where the log of a partition begins and ends, and which topic it is of, asked over a consumer's own connection."""

from __future__ import annotations

import asyncio
from collections.abc import Collection, Mapping

from aiokafka import AIOKafkaConsumer
from aiokafka.structs import TopicPartition as KafkaTopicPartition

from streams.adapters.kafka_topic_ids import read_topic_ids
from streams.ports import Watermarks
from streams.positions import TopicPartition


async def read_watermarks(
    consumer: AIOKafkaConsumer, topic_partitions: Collection[TopicPartition]
) -> Mapping[TopicPartition, Watermarks]:
    """The low and high watermarks at this moment, and the ids of the topics. Raises KafkaError."""
    keys = [KafkaTopicPartition(*each) for each in topic_partitions]
    # The ids first: a topic that is created anew in between shows by its offsets, or the next time.
    topic_ids = await read_topic_ids(consumer._client, {key.topic for key in keys})
    low, high = await asyncio.gather(consumer.beginning_offsets(keys), consumer.end_offsets(keys))
    return {TopicPartition(*key): Watermarks(low[key], high[key], topic_ids.get(key.topic)) for key in keys}
