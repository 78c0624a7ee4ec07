"""Who is in a consumer group, as its coordinator describes it (DescribeGroups)."""

from __future__ import annotations

from typing import NamedTuple

from aiokafka.admin import AIOKafkaAdminClient

from streams.adapters.kafka_options import kafka_client_options
from streams.config import Settings


class GroupMember(NamedTuple):
    """A member, alive or not missed yet."""

    client_id: str
    host: str


class DescribedGroup(NamedTuple):
    """A group at one moment; its state is Kafka's word, `Dead` for one that never was."""

    state: str
    members: tuple[GroupMember, ...]


async def describe_group(settings: Settings, group: str) -> DescribedGroup:
    """Raises KafkaError."""
    admin = AIOKafkaAdminClient(**kafka_client_options(settings))
    try:
        await admin.start()
        (described,) = await admin.describe_consumer_groups([group])
        ((_, _, state, _, _, members, *_),) = described.groups
    finally:
        await admin.close()
    return DescribedGroup(state, tuple(GroupMember(client_id, host) for _, client_id, host, *_ in members))
