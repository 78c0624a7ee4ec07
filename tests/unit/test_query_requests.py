"""The query topic: where its requests are read from, and that each gets its reply or its dead letter."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence

import pytest
from aiokafka.errors import KafkaTimeoutError

from agents.open_requests import OpenRequests
from agents.query_requests import RequestAnswers, RequestReading
from streams.batches import Headers, RecordBatch
from streams.ports import DeadLetter, ParkReason, Watermarks
from streams.positions import TopicPartition
from streams.processes.answering import IncomingRequest, Reply
from streams.retry import Backoff
from tests.watched_log import WatchedLog, until

TP = TopicPartition("pintail.query", 0)


@pytest.fixture(autouse=True)
def _short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Backoff, "next_delay_seconds", lambda _: 0.01)


def batch(first: int, *values: bytes) -> RecordBatch:
    count = len(values)
    return RecordBatch(
        *TP, first, first + count, list(values), [None] * count, list(range(first, first + count)), [0] * count
    )


@pytest.fixture
async def log() -> WatchedLog:
    return WatchedLog({TP: Watermarks(100, 200)})


@pytest.fixture
async def reading(log: WatchedLog) -> AsyncIterator[RequestReading]:
    reading = RequestReading(log, log.committed_record)
    yield reading
    await reading.revoke([TP])


@pytest.mark.parametrize(("committed", "position"), [(None, 100), (150, 150), (5, 100), (900, 200)])
@pytest.mark.invariant(9, place="recovery")
async def test_requests_are_read_from_the_committed_position_as_far_as_the_log_holds_it(
    committed: int | None, position: int, log: WatchedLog, reading: RequestReading
) -> None:
    if committed is not None:
        log.committed[TP] = (committed, "")
    await reading.assign([TP])
    await until(lambda: log.reads == [(TP, position)])
    assert reading.open.positions() == {TP: position}


async def test_requests_are_read_although_kafka_is_away_at_first(log: WatchedLog, reading: RequestReading) -> None:
    log.faults = [KafkaTimeoutError(), TimeoutError()]
    await reading.assign([TP])
    await until(lambda: log.active == {TP})


async def test_a_position_that_is_out_of_range_is_left_for_one_that_the_log_holds(
    log: WatchedLog, reading: RequestReading
) -> None:
    log.committed[TP] = (150, "")
    await reading.assign([TP])
    await until(lambda: log.active == {TP})
    log.marks[TP] = Watermarks(180, 200)
    for _ in range(3):
        reading.start(TP)
    await until(lambda: log.reads == [(TP, 150), (TP, 180)])
    fresh = reading.accept(batch(180, b"a", b"b"))
    assert fresh is not None
    assert reading.open.positions() == {TP: 180}, "nothing has a reply yet"
    log.marks[TP] = Watermarks(0, 3)  # the topic was made anew
    reading.start(TP)
    await until(lambda: log.reads[2:] == [(TP, 3)])


async def test_nothing_is_read_after_revoke(log: WatchedLog, reading: RequestReading) -> None:
    await reading.assign([TP])
    await until(lambda: log.active == {TP})
    await reading.revoke([TP])
    reading.start(TP)
    assert log.active == set()
    assert reading.accept(batch(100, b"a")) is None


class Producers:
    """Stands in for Kafka: replies and dead letters."""

    def __init__(self) -> None:
        self.sent: list[bytes] = []
        self.parked: list[int] = []
        self.faults: list[Exception] = []

    async def send(
        self, topic: str, *, value: bytes, key: bytes | None, partition: int | None, headers: Headers
    ) -> None:
        del topic, key, partition, headers
        self.sent.append(value)

    async def park(self, letters: Sequence[DeadLetter]) -> None:
        if self.faults:
            raise self.faults.pop(0)
        self.parked += [letter.offset for letter in letters]


async def answer(request: IncomingRequest) -> Reply | DeadLetter:
    """A reply to what is asked, a dead letter for junk, for ever nothing for `wait`."""
    if request.value == b"wait":
        await asyncio.Event().wait()
    if request.value == b"break":
        raise KeyError("a mistake in the program")
    if request.value == b"junk":
        return DeadLetter(TP, request.offset, 0, None, request.value, ParkReason.NOT_A_REQUEST, "", "dead")
    return Reply("replies", None, b"", request.value or b"", ())


@pytest.mark.invariant(6, 9, place="outage")
async def test_invariant_6_a_dead_letter_is_tried_until_it_is_parked() -> None:
    producers = Producers()
    producers.faults = [KafkaTimeoutError(), KafkaTimeoutError(), RuntimeError()]
    answers = RequestAnswers(answer, replies=producers, dead_letters=producers)
    requests = OpenRequests({TP: 7})
    requests.read(batch(7, b"junk", b"break", b"a"))
    answers.begin(batch(7, b"junk", b"break", b"a"), requests)
    await until(lambda: producers.sent == [b"a"])
    assert requests.positions() == {TP: 7}
    await until(lambda: producers.parked == [7])
    await answers.drain()
    assert requests.positions() == {TP: 10}


@pytest.mark.invariant(9, place="rebalance")
async def test_a_stopping_worker_waits_for_the_replies_on_their_way_and_not_for_ever(
    caplog: pytest.LogCaptureFixture,
) -> None:
    producers = Producers()
    answers = RequestAnswers(answer, replies=producers, dead_letters=producers)
    requests = OpenRequests({TP: 0})
    requests.read(batch(0, b"a", b"junk", b"wait"))
    answers.begin(batch(0, b"a", b"junk", b"wait"), requests)
    await answers.drain(seconds_max=0.05)
    assert (producers.sent, producers.parked) == ([b"a"], [1])
    assert "1 requests were given up" in caplog.text
    assert requests.positions() == {TP: 2}, "its next owner reads it again"
    await answers.drain()
