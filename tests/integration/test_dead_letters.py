"""Parking on a real broker: every letter is durable once, whole where its topic takes it (invariant 6)."""

from __future__ import annotations

from random import Random
from typing import Any

import pytest
from aiokafka import AIOKafkaProducer
from aiokafka.errors import KafkaTimeoutError

from schemas.dead_letters import OFFSET, TRUNCATED
from streams.adapters.kafka_producers import KafkaDeadLetters
from streams.config import Settings
from streams.limits import DEAD_LETTER_TRUNCATED_BYTES, KIB
from streams.ports import DeadLetter, ParkReason
from streams.positions import TopicPartition
from tests.conftest import NewTopicMaker
from tests.oracle import records_of


def letter_of(topic: str, offset: int, value: bytes) -> DeadLetter:
    source = TopicPartition("flights", 0)
    return DeadLetter(source, offset, 1_700_000_000_000, b"key", value, ParkReason.NOT_JSON, "not JSON", topic)


async def parked(kafka: str, letters: list[DeadLetter]) -> list[tuple[dict[str, bytes], bytes | None]]:
    """Parks them; what their topic then holds, by offset of the source."""
    dead_letters = KafkaDeadLetters(Settings(kafka=kafka))
    await dead_letters.start()
    try:
        await dead_letters.park(letters)
    finally:
        await dead_letters.stop()
    held = [
        (dict(record.headers() or []), record.value()) for record in records_of(kafka, [letters[0].dead_letter_topic])
    ]
    return sorted(held, key=lambda each: int(each[0][OFFSET]))


@pytest.mark.invariant(6, place="input")
async def test_a_storm_of_letters_is_parked_once_each(kafka: str, new_topic: NewTopicMaker) -> None:
    topic = new_topic("letters")
    letters = [letter_of(topic, offset, b"poison %d" % offset) for offset in range(5_000)]
    held = await parked(kafka, letters)
    assert [value for _, value in held] == [letter.value for letter in letters]


async def test_a_letter_that_cannot_be_sent_keeps_no_other_back(
    kafka: str, new_topic: NewTopicMaker, monkeypatch: pytest.MonkeyPatch
) -> None:
    topic = new_topic("letters")
    letters = [letter_of(topic, offset, b"poison") for offset in range(5)]
    send = AIOKafkaProducer.send

    async def refuse_the_third(self: AIOKafkaProducer, *arguments: Any, **options: Any) -> Any:
        if dict(options["headers"])[OFFSET] == b"2":
            raise KafkaTimeoutError
        return await send(self, *arguments, **options)

    monkeypatch.setattr(AIOKafkaProducer, "send", refuse_the_third)
    with pytest.raises(KafkaTimeoutError):
        await parked(kafka, letters)
    held = [int(dict(record.headers() or [])[OFFSET]) for record in records_of(kafka, [topic])]
    assert sorted(held) == [0, 1, 3, 4]


async def test_only_a_letter_that_is_too_large_for_its_topic_is_cut(kafka: str, new_topic: NewTopicMaker) -> None:
    """Letters that share a batch which is too large as a whole are parked whole, each alone."""
    topic = new_topic("letters", configuration={"max.message.bytes": str(100 * KIB)})
    random = Random(1)
    sizes = [60, 60, 60, 60, 200, 1]
    letters = [letter_of(topic, offset, random.randbytes(size * KIB)) for offset, size in enumerate(sizes)]
    held = await parked(kafka, letters)
    assert [TRUNCATED in headers for headers, _ in held] == [size > 100 for size in sizes]
    for letter, (headers, value) in zip(letters, held, strict=True):
        assert letter.value is not None
        assert value == (letter.value[:DEAD_LETTER_TRUNCATED_BYTES] if TRUNCATED in headers else letter.value)
