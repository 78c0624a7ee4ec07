"""Which topic a name means: the id that Kafka gives a topic when it is created (KIP-516).

A topic that was deleted and created again has its old name, offsets that start anew, and another id. aiokafka speaks
version 5 of the Metadata API and librdkafka's admin client would be a second driver in every worker, so version 12 of
that API (Kafka 3.1 and newer) is described here. Called by kafka_watermarks with a consumer's own connection.
"""

from __future__ import annotations

import logging
import uuid
from collections.abc import Collection, Mapping
from io import BytesIO
from typing import Any

from aiokafka.client import AIOKafkaClient
from aiokafka.errors import IncompatibleBrokerVersion
from aiokafka.protocol.api import Request, RequestStruct, Response
from aiokafka.protocol.types import (
    AbstractType,
    Boolean,
    CompactArray,
    CompactString,
    Int16,
    Int32,
    Schema,
    TaggedFields,
)

logger = logging.getLogger(__name__)

_NO_ID = uuid.UUID(int=0)


class _Uuid(AbstractType[uuid.UUID]):  # type: ignore[misc]
    @classmethod
    def encode(cls, value: uuid.UUID) -> bytes:
        return value.bytes

    @classmethod
    def decode(cls, data: BytesIO) -> uuid.UUID:
        return uuid.UUID(bytes=data.read(16))


class _MetadataResponse(Response):  # type: ignore[misc]
    API_KEY = 3
    API_VERSION = 12
    SCHEMA = Schema(
        ("throttle_time_ms", Int32),
        (
            "brokers",
            CompactArray(
                ("node_id", Int32),
                ("host", CompactString()),
                ("port", Int32),
                ("rack", CompactString()),
                ("tags", TaggedFields),
            ),
        ),
        ("cluster_id", CompactString()),
        ("controller_id", Int32),
        (
            "topics",
            CompactArray(
                ("error_code", Int16),
                ("name", CompactString()),
                ("topic_id", _Uuid),
                ("is_internal", Boolean),
                (
                    "partitions",
                    CompactArray(
                        ("error_code", Int16),
                        ("partition", Int32),
                        ("leader", Int32),
                        ("leader_epoch", Int32),
                        ("replicas", CompactArray(Int32)),
                        ("isr", CompactArray(Int32)),
                        ("offline_replicas", CompactArray(Int32)),
                        ("tags", TaggedFields),
                    ),
                ),
                ("authorized_operations", Int32),
                ("tags", TaggedFields),
            ),
        ),
        ("tags", TaggedFields),
    )


class _MetadataRequestStruct(RequestStruct):  # type: ignore[misc]
    API_KEY = 3
    API_VERSION = 12
    FLEXIBLE_VERSION = True
    RESPONSE_TYPE = _MetadataResponse
    SCHEMA = Schema(
        ("topics", CompactArray(("topic_id", _Uuid), ("name", CompactString()), ("tags", TaggedFields))),
        ("allow_auto_topic_creation", Boolean),
        ("include_topic_authorized_operations", Boolean),
        ("tags", TaggedFields),
    )


class _MetadataRequest(Request[_MetadataRequestStruct]):  # type: ignore[misc]
    API_KEY = 3

    def __init__(self, topics: Collection[str]) -> None:
        no_tags: dict[int, bytes] = {}
        self._topics = [(_NO_ID, topic, no_tags) for topic in topics]

    def build(self, request_struct_class: type[_MetadataRequestStruct]) -> _MetadataRequestStruct:
        return request_struct_class(self._topics, False, False, {})


async def read_topic_ids(client: AIOKafkaClient, topics: Collection[str]) -> Mapping[str, str]:
    """Topic -> id, in hexadecimal, of those that exist. Empty where the broker knows no ids. Raises KafkaError."""
    try:
        response: Any = await client.send(client.get_random_node(), _MetadataRequest(sorted(topics)))
    except (IncompatibleBrokerVersion, NotImplementedError):
        logger.debug("this broker gives topics no ids: one that is created anew is known by its offsets only")
        return {}
    return {
        name: topic_id.hex
        for error_code, name, topic_id, *_ in response.topics
        if error_code == 0 and topic_id != _NO_ID
    }
