"""What Pintail itself writes to Kafka: dead letters (durable) and replies (fast)."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterable, Sequence
from contextlib import suppress

from aiokafka import AIOKafkaProducer
from aiokafka.errors import KafkaError, MessageSizeTooLargeError

from schemas.dead_letters import dead_letter_headers
from streams.adapters.kafka_options import kafka_client_options
from streams.config import Settings
from streams.limits import DEAD_LETTER_BYTES_MAX, DEAD_LETTER_TRUNCATED_BYTES
from streams.ports import DeadLetter

logger = logging.getLogger(__name__)


class KafkaDeadLetters:
    """streams.ports.DeadLetters: idempotent producer, acks=all, LZ4."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings

    async def start(self) -> None:
        """Connects. Call it on the event loop that will park."""
        self._producer = AIOKafkaProducer(
            **kafka_client_options(self._settings),
            acks="all",
            enable_idempotence=True,
            compression_type="lz4",
            max_request_size=DEAD_LETTER_BYTES_MAX,
        )
        await self._producer.start()

    async def stop(self) -> None:
        """Sends what is buffered and disconnects."""
        await self._producer.stop()

    async def park(self, letters: Sequence[DeadLetter]) -> None:
        """See streams.ports.DeadLetters. A failure is raised once every other letter has been sent or has failed."""
        outcomes = await asyncio.gather(*[self._park(letter) for letter in letters], return_exceptions=True)
        for outcome in outcomes:
            if outcome is not None:
                raise outcome

    async def _park(self, letter: DeadLetter) -> None:
        """Whole where it fits its topic; else the start of the payload, and a header that says so."""
        value = letter.value or b""
        room = DEAD_LETTER_BYTES_MAX - DEAD_LETTER_TRUNCATED_BYTES - len(letter.key or b"")
        if len(value) <= room:
            with suppress(MessageSizeTooLargeError):  # the topic was made with a smaller limit than ours
                return await self._send(letter, letter.value)
        return await self._send(letter, value[:DEAD_LETTER_TRUNCATED_BYTES], truncated=True)

    async def _send(self, letter: DeadLetter, value: bytes | None, *, truncated: bool = False) -> None:
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
        await self._producer.send_and_wait(letter.dead_letter_topic, value=value, key=letter.key, headers=headers)


class KafkaReplies:
    """Sends replies at once; a reply that cannot be sent is logged, since its asker's deadline covers the loss."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings

    async def start(self) -> None:
        """Connects. Call it on the event loop that will send."""
        self._producer = AIOKafkaProducer(**kafka_client_options(self._settings), acks=1, linger_ms=0)
        await self._producer.start()

    async def stop(self) -> None:
        """Sends what is buffered and disconnects."""
        await self._producer.stop()

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
        try:
            await self._producer.send_and_wait(topic, value=value, key=key, partition=partition, headers=list(headers))
        except (KafkaError, AssertionError) as error:
            logger.warning("reply to %s not sent: %r", topic, error)
