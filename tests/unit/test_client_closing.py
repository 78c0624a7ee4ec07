"""A client that is closed while threads wait for it, and requests that cannot be sent; no broker is asked."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from schemas.messages import AnswerTiming, Push, PushKind
from streams.adapters.kafka_librdkafka import Sent
from streams.client import AsyncClient, Client, QueryRefusedError, RequestTimeoutError
from streams.client.blocking import _LoopThread
from streams.config import Settings
from streams.errors import PublishingError
from streams.limits import QUERY_REQUEST_BYTES_MAX
from tests.watched_log import until


class Broker:
    """Takes every record, or refuses it, and nobody replies."""

    def __init__(self) -> None:
        self.error: PublishingError | None = None
        self.is_asked = threading.Event()

    def send(self, topic: str, **record: Any) -> asyncio.Future[Sent]:
        """See RdKafkaProducer."""
        del record
        sent: asyncio.Future[Sent] = asyncio.get_running_loop().create_future()
        if self.error is None:
            sent.set_result(Sent(topic, 0, 0))
        else:
            sent.set_exception(self.error)
        self.is_asked.set()
        return sent

    async def stop(self) -> None:
        """See RdKafkaProducer."""


class Fixture:
    """A blocking client of such a broker."""

    def __init__(self) -> None:
        self.broker = Broker()
        thread = _LoopThread()
        self.client = Client(thread, thread.run(connected(self.broker)))

    def push(self, rows: list[list[int]]) -> None:
        """What a worker sends for the only subscription."""
        ((subscription, pushes),) = self.client._client._pushes.items()
        push = Push(
            id=subscription,
            columns=[],
            rows=rows,
            offsets={},
            epoch={},
            timing=AnswerTiming(queued_ms=0, waited_ms=0, executed_ms=0),
            sequence=0,
            kind=PushKind.FULL,
            removed=[],
            inserted=[],
        )
        value = push.model_dump_json().encode()
        self.client._thread._loop.call_soon_threadsafe(pushes.put, value)


async def connected(broker: Broker) -> AsyncClient:
    """A client of this broker, on the running loop."""
    client = AsyncClient(Settings(kafka="127.0.0.1:1"), query_partitions=1, reply_partition=0)
    client._producer = broker  # type: ignore[assignment]
    client._replies = broker  # type: ignore[assignment]
    return client


@pytest.fixture
def fixture() -> Iterator[Fixture]:
    made = Fixture()
    yield made
    made.client.close()


@pytest.mark.parametrize(
    "wait",
    [lambda client: next(client.subscribe("SELECT 1")), lambda client: client.query("SELECT 1")],
    ids=["a change", "an answer"],
)
def test_who_waits_when_the_client_is_closed_is_told(fixture: Fixture, wait: Callable[[Client], Any]) -> None:
    with ThreadPoolExecutor(1) as threads:
        waiting = threads.submit(wait, fixture.client)
        assert fixture.broker.is_asked.wait(20)
        fixture.client.close()
        with pytest.raises(RequestTimeoutError, match="the client was closed"):
            waiting.result(20)
    with pytest.raises(RequestTimeoutError, match="the client was closed"):
        wait(fixture.client)


def test_a_subscription_is_closed_after_its_client(fixture: Fixture) -> None:
    changes = fixture.client.subscribe("SELECT 1")
    with ThreadPoolExecutor(1) as threads:
        coming = threads.submit(next, changes)
        assert fixture.broker.is_asked.wait(20)
        fixture.push([[1]])
        assert coming.result(20).answer.rows == [(1,)]
    fixture.client.close()
    changes.close()


async def test_a_subscription_ends_with_its_asyncio_client() -> None:
    broker = Broker()
    client = await connected(broker)
    changes = client.subscribe("SELECT 1", deadline_ms=60_000)
    waiting = asyncio.create_task(anext(changes))
    await until(broker.is_asked.is_set)
    await client.close()
    async with asyncio.timeout(20):
        with pytest.raises(RequestTimeoutError, match="the client was closed"):
            await waiting


def test_what_runs_ends_with_the_loop() -> None:
    thread, has_begun = _LoopThread(), threading.Event()

    async def forever() -> None:
        has_begun.set()
        await asyncio.Event().wait()

    with ThreadPoolExecutor(1) as threads:
        waiting = threads.submit(lambda: thread.run(forever()))
        assert has_begun.wait(20)
        thread.stop()
        with pytest.raises(RequestTimeoutError, match="the client was closed"):
            waiting.result(20)


def test_a_request_that_kafka_would_not_take_is_refused_at_once(fixture: Fixture) -> None:
    params = ["x" * QUERY_REQUEST_BYTES_MAX]
    for ask in (fixture.client.query, fixture.client.subscribe):
        with pytest.raises(QueryRefusedError, match=f"more than the {QUERY_REQUEST_BYTES_MAX}"):
            ask("SELECT ?", params)
    assert not fixture.broker.is_asked.is_set()


def test_a_topic_that_is_not_there_is_named(fixture: Fixture) -> None:
    fixture.broker.error = PublishingError("unknown topic")
    with pytest.raises(RequestTimeoutError, match=r"unknown topic.*has the topic pintail\.") as caught:
        fixture.client.query("SELECT 1")
    assert "store worker" in caught.value.hint
