"""Creates the topics Pintail needs and checks those that exist. Called by each worker before it joins its group."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from dataclasses import dataclass, field

from aiokafka.admin import AIOKafkaAdminClient, NewTopic
from aiokafka.errors import KafkaError, TopicAlreadyExistsError, for_code

from schemas.catalog import Catalog
from streams.adapters.kafka_options import kafka_client_options
from streams.config import Settings
from streams.errors import ConfigurationError, TopicShapeError
from streams.limits import (
    DEAD_LETTER_BYTES_MAX,
    MIB,
    QUERY_DEADLINE_MS_MAX,
    QUERY_PART_BYTES_MAX,
    RECORD_BYTES_MAX,
)

logger = logging.getLogger(__name__)

REPLY_PARTITIONS = 8
#: Requests and replies are worthless after their deadline; Kafka may drop them soon after.
QUERY_RETENTION_MS = 10 * QUERY_DEADLINE_MS_MAX
#: Each worker listens on one of them, so the count is part of where they find one another.
PART_PARTITIONS = 4
#: Of the topic of parts: with room for the head of one, and for LZ4 that makes nothing smaller.
PART_MESSAGE_BYTES_MAX = QUERY_PART_BYTES_MAX + 2 * MIB


@dataclass(frozen=True)
class TopicSpecification:
    """A topic as Pintail wants it. `exact` makes another partition count an error."""

    name: str
    partitions: int
    exact: bool = True
    configuration: dict[str, str] = field(default_factory=dict)


def topics_of(catalog: Catalog, settings: Settings) -> list[TopicSpecification]:
    """Every topic of a deployment."""
    short_lived = {"retention.ms": str(QUERY_RETENTION_MS)}
    large = {"max.message.bytes": str(DEAD_LETTER_BYTES_MAX)}
    partitions_max = max((table.partitions for table in catalog.tables), default=1)
    specifications = [
        TopicSpecification(settings.query_topic, partitions_max, configuration=short_lived),
        TopicSpecification(settings.reply_topic, REPLY_PARTITIONS, exact=False, configuration=short_lived),
        TopicSpecification(
            settings.part_topic,
            PART_PARTITIONS,
            configuration={**short_lived, "max.message.bytes": str(PART_MESSAGE_BYTES_MAX)},
        ),
        TopicSpecification(settings.query_dead_letter_topic, 1, exact=False, configuration=large),
    ]
    for table in catalog.tables:
        accepts_large = {"max.message.bytes": str(RECORD_BYTES_MAX + RECORD_BYTES_MAX // 2)}
        specifications += [
            TopicSpecification(table.topic, table.partitions, configuration=accepts_large),
            TopicSpecification(table.dead_letter_topic, 1, exact=False, configuration=large),
        ]
    return specifications


async def ensure_topics(specifications: Iterable[TopicSpecification], settings: Settings) -> None:
    """Creates what is missing; safe from several workers at once.

    Raises TopicShapeError when a topic has another partition count, ConfigurationError when Kafka cannot be reached or
    refuses to create a topic.
    """
    admin = AIOKafkaAdminClient(**kafka_client_options(settings))
    try:
        await admin.start()
        wanted = list(specifications)
        existing = await _partition_counts(admin, [topic.name for topic in wanted])
        for topic in wanted:
            if topic.name in existing:
                _check_shape(topic, existing[topic.name])
        await _create(admin, [topic for topic in wanted if topic.name not in existing], settings)
    except KafkaError as error:
        raise ConfigurationError(
            f"Kafka at {settings.kafka}: {error!r}", hint="check PINTAIL_KAFKA and that the broker runs"
        ) from error
    finally:
        await admin.close()


async def _partition_counts(admin: AIOKafkaAdminClient, names: list[str]) -> dict[str, int]:
    """Of those topics that exist."""
    known = set(await admin.list_topics())
    present = [name for name in names if name in known]
    described = await admin.describe_topics(present) if present else []
    return {topic["topic"]: len(topic["partitions"]) for topic in described}


def _check_shape(topic: TopicSpecification, partitions: int) -> None:
    if topic.exact and partitions != topic.partitions:
        raise TopicShapeError(
            f"topic {topic.name!r} has {partitions} partitions, its definition says {topic.partitions}",
            hint=f"set partitions={partitions} in the table's WITH options, or create the topic anew",
        )


async def _create(admin: AIOKafkaAdminClient, missing: list[TopicSpecification], settings: Settings) -> None:
    if not missing:
        return
    if admin._client.cluster.controller is None:  # librdkafka's in-memory broker has none
        names = ", ".join(topic.name for topic in missing)
        raise ConfigurationError(
            f"this broker cannot create topics, and these are missing: {names}", hint="use a real broker"
        )
    response = await admin.create_topics(
        [
            NewTopic(
                name=topic.name,
                num_partitions=topic.partitions,
                replication_factor=settings.topic_replication_factor,
                topic_configs=topic.configuration,
            )
            for topic in missing
        ]
    )
    for name, code, *details in response.topic_errors:
        failure = for_code(code)
        if code == 0:
            logger.info("created topic %s", name)
        elif failure is not TopicAlreadyExistsError:
            raise ConfigurationError(
                f"Kafka refused to create topic {name!r}: {failure.__name__} {' '.join(filter(None, details))}".strip(),
                hint="create it yourself with the partitions of its table, or give this user the CREATE permission",
            )
