"""What Pintail itself writes to Kafka: dead letters (durable) and replies (fast)."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterable, Sequence
from contextlib import suppress
from functools import partial

from aiokafka import AIOKafkaProducer
from aiokafka.errors import KafkaError, MessageSizeTooLargeError
from aiokafka.structs import RecordMetadata

from schemas.dead_letters import dead_letter_headers
from streams.adapters.kafka_librdkafka import RdKafkaProducer
from streams.adapters.kafka_options import kafka_client_options
from streams.adapters.kafka_topics import PART_MESSAGE_BYTES_MAX
from streams.config import Settings
from streams.errors import PublishingError
from streams.limits import DEAD_LETTER_BYTES_MAX, DEAD_LETTER_TRUNCATED_BYTES, KIB
from streams.ports import DeadLetter

logger = logging.getLogger(__name__)

#: To so many topics one producer sends replies; then another one does.
REPLY_TOPICS_MAX = 500
#: Of dead letters that travel together; below what any broker takes by default.
_BATCH_BYTES_MAX = 256 * KIB


class KafkaDeadLetters:
    """streams.ports.DeadLetters: acks=all, LZ4.

    Not idempotent: aiokafka's producer spends the sequence number of a batch that its topic refuses as too large, and
    the broker would refuse every later one. A retry may repeat a letter, which the contract allows.
    """

    def __init__(self, settings: Settings) -> None:
        self._settings = settings

    async def start(self) -> None:
        """Connects. Call it on the event loop that will park."""
        self._producer = AIOKafkaProducer(
            **kafka_client_options(self._settings),
            acks="all",
            compression_type="lz4",
            max_request_size=DEAD_LETTER_BYTES_MAX,
            max_batch_size=_BATCH_BYTES_MAX,
        )
        await self._producer.start()

    async def stop(self) -> None:
        """Sends what is buffered and disconnects."""
        await self._producer.stop()

    async def park(self, letters: Sequence[DeadLetter]) -> None:
        """See streams.ports.DeadLetters. A failure is raised once every other letter has been sent or has failed."""
        failures: list[KafkaError] = []
        underway: list[tuple[DeadLetter, asyncio.Future[RecordMetadata]]] = []
        alone = [letter for letter in letters if not _is_small(letter)]
        # One after the other into the producer's batches: as many tasks would all wake at every batch that leaves.
        for letter in letters:
            if _is_small(letter):
                try:
                    underway.append((letter, await self._send(letter, letter.value)))
                except KafkaError as error:
                    failures.append(error)
        for letter, acknowledged in underway:
            try:
                await acknowledged
            except MessageSizeTooLargeError:  # all of its batch: the topic was made with a smaller limit than ours
                alone.append(letter)
            except KafkaError as error:
                failures.append(error)
        for letter in alone:
            try:
                await self._park_alone(letter)
            except KafkaError as error:
                failures.append(error)
        if failures:
            raise failures[0]

    async def _park_alone(self, letter: DeadLetter) -> None:
        """Whole where it fits its topic; else the start of the payload, and a header that says so."""
        value = letter.value or b""
        room = DEAD_LETTER_BYTES_MAX - DEAD_LETTER_TRUNCATED_BYTES - len(letter.key or b"")
        if len(value) <= room:
            with suppress(MessageSizeTooLargeError):
                await (await self._send(letter, letter.value))
                return
        await (await self._send(letter, value[:DEAD_LETTER_TRUNCATED_BYTES], truncated=True))

    async def _send(
        self, letter: DeadLetter, value: bytes | None, *, truncated: bool = False
    ) -> asyncio.Future[RecordMetadata]:
        """Hands it to the producer; the future is done when the letter is durable."""
        headers = dead_letter_headers(
            topic=letter.source.topic,
            partition=letter.source.partition,
            offset=letter.offset,
            timestamp_ms=letter.timestamp_ms,
            reason=letter.reason,
            detail=letter.detail,
            truncated=truncated,
            value_is_null=letter.key is None and value is None,
        )
        # aiokafka refuses a record without key and value.
        value = b"" if letter.key is None and value is None else value
        sent: asyncio.Future[RecordMetadata] = await self._producer.send(
            letter.dead_letter_topic, value=value, key=letter.key, headers=headers
        )
        return sent


def _is_small(letter: DeadLetter) -> bool:
    """Whether it shares a batch with others."""
    return len(letter.value or b"") + len(letter.key or b"") <= _BATCH_BYTES_MAX // 4


class KafkaReplies:
    """Sends replies, and what workers ask one another, at once; what cannot be sent is logged, since its asker's
    deadline covers the loss."""

    def __init__(self, settings: Settings, *, client_id: str) -> None:
        self._new_producer = partial(
            RdKafkaProducer, settings, client_id=client_id, acks="1", record_bytes_max=PART_MESSAGE_BYTES_MAX
        )
        self._producer = self._new_producer()
        self._topics: set[str] = set()
        self._retired: set[asyncio.Task[None]] = set()

    async def start(self) -> None:
        """Call it on the event loop that will send."""
        self._producer.start()

    async def stop(self) -> None:
        """Sends what is buffered and disconnects."""
        await asyncio.gather(self._producer.stop(), *self._retired)

    async def send(
        self,
        topic: str,
        *,
        value: bytes,
        key: bytes | None = None,
        partition: int | None = None,
        headers: Iterable[tuple[str, bytes]] = (),
    ) -> None:
        """Never raises for what the asker asked for (an unknown reply topic, say)."""
        self._remember(topic)
        try:
            await self._producer.send(topic, value=value, key=key, partition=partition, headers=headers)
        except PublishingError as error:
            logger.warning("reply not sent: %s", error.message)

    def _remember(self, topic: str) -> None:
        """librdkafka keeps 57 KB for each topic for ever, and askers may name as many as they like."""
        self._topics.add(topic)
        if len(self._topics) > REPLY_TOPICS_MAX:
            retired = asyncio.create_task(self._producer.stop())
            self._retired.add(retired)
            retired.add_done_callback(self._retired.discard)
            self._topics = {topic}
            self._producer = self._new_producer()
            self._producer.start()
