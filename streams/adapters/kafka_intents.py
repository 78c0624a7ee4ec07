"""The BEFORE records of the sink's consumer group: how they are written there, and reading them from outside the group.

The committed position is `lo`, its metadata `lo:hi`. The sink worker writes and reads them as a member
(agents/sink_app.py); a store worker that rebuilds a partition from ClickHouse only reads them.
"""

from __future__ import annotations

import re

from aiokafka.admin import AIOKafkaAdminClient
from aiokafka.errors import KafkaError
from aiokafka.structs import TopicPartition as KafkaTopicPartition

from streams.adapters.kafka_options import kafka_client_options
from streams.config import Settings
from streams.errors import SinkUnavailableError
from streams.positions import OffsetRange, TopicPartition

_INTENT = re.compile(r"(?P<lo>[0-9]{1,19}):(?P<hi>[0-9]{1,19})")


def metadata_of(offsets: OffsetRange) -> str:
    """What is committed with the position `offsets.lo`."""
    return f"{offsets.lo}:{offsets.hi}"


def recorded_intent(offset: int, metadata: str) -> OffsetRange | None:
    """The BEFORE record in a committed position; None if somebody else committed it (an operator's reset)."""
    record = _INTENT.fullmatch(metadata)
    if record and int(record["lo"]) == offset <= int(record["hi"]):
        return OffsetRange(offset, int(record["hi"]))
    return None


class GroupRecords:
    """streams.ports.RecordedIntents of the sink's group, for who is no member of it.

    A position that somebody else committed is no record: it does not say that what lies below it was delivered."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings

    async def read(self, topic_partition: TopicPartition) -> OffsetRange | None:
        """See streams.ports.RecordedIntents. Raises SinkUnavailableError."""
        key = KafkaTopicPartition(*topic_partition)
        admin = AIOKafkaAdminClient(**kafka_client_options(self._settings))
        try:
            await admin.start()
            committed = await admin.list_consumer_group_offsets(self._settings.sink_group, partitions=[key])
        except KafkaError as error:
            raise SinkUnavailableError(
                f"the positions of group {self._settings.sink_group} cannot be read: {error!r}",
                hint="is Kafka up, and may this user describe the group?",
            ) from error
        finally:
            await admin.close()
        record = committed.get(key)
        return None if record is None or record.offset < 0 else recorded_intent(record.offset, record.metadata)
