"""The clients over a real broker, against QueryService with a real store behind a plain consumer."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import asynccontextmanager
from decimal import Decimal
from typing import Any, Literal

import pytest
from aiokafka import AIOKafkaConsumer, AIOKafkaProducer
from aiokafka.structs import TopicPartition

import pintail
from schemas.messages import Refusal, RefusalCode, serialise_refusal
from streams.adapters.duckdb_store import DuckDBStore
from streams.adapters.kafka_partitioner import key_of, partition_of
from streams.adapters.kafka_topics import TopicSpecification, ensure_topics
from streams.client import AsyncClient, Client, QueryRefusedError, RequestTimeoutError
from streams.config import Settings
from streams.errors import ConfigurationError
from streams.ports import DeadLetter
from streams.processes.answering import IncomingRequest, QueryService
from tests.conftest import unique_name
from tests.query_store import CATALOG, PARTITIONS, asks_nobody, filled_store


class AllServing:
    """ServingState of a worker that owns everything but what a test takes away."""

    def __init__(self) -> None:
        self.partitions_total = PARTITIONS
        self.epochs = dict.fromkeys(range(PARTITIONS), 1)

    def serving(self) -> Mapping[int, int]:
        return dict(self.epochs)

    async def wait_until_applied(self, partition: int, topic: str, offset: int) -> None:
        del partition, topic, offset
        await asyncio.Event().wait()  # nothing is ever written


class StandIn:
    """What a store worker does with the query topic, without Faust."""

    def __init__(self, settings: Settings, store: DuckDBStore) -> None:
        self.state = AllServing()
        self.requests: list[IncomingRequest] = []
        self.silent = False
        #: What is sent after each reply, under its key: a worker that crashed answers again.
        self.afterthoughts: list[bytes] = []
        self._settings = settings
        self.service = QueryService(store, CATALOG, self.state, settings, ask=asks_nobody)

    @asynccontextmanager
    async def running(self) -> AsyncIterator[StandIn]:
        await ensure_topics([TopicSpecification(self._settings.query_topic, PARTITIONS)], self._settings)
        consumer = AIOKafkaConsumer(bootstrap_servers=self._settings.kafka, auto_offset_reset="earliest")
        producer = AIOKafkaProducer(bootstrap_servers=self._settings.kafka, linger_ms=0, acks=1)
        await consumer.start()
        await producer.start()
        consumer.assign([TopicPartition(self._settings.query_topic, partition) for partition in range(PARTITIONS)])
        serving = asyncio.create_task(self._serve(consumer, producer))
        try:
            yield self
        finally:
            serving.cancel()
            await asyncio.gather(serving, return_exceptions=True)
            await self.service.close()
            await consumer.stop()
            await producer.stop()

    async def _serve(self, consumer: AIOKafkaConsumer, producer: AIOKafkaProducer) -> None:
        async with asyncio.TaskGroup() as answering:
            async for record in consumer:
                request = IncomingRequest(
                    record.value, record.key, tuple(record.headers), record.partition, record.offset, record.timestamp
                )
                self.requests.append(request)
                if not self.silent:
                    answering.create_task(self._answer(request, producer))

    async def _answer(self, request: IncomingRequest, producer: AIOKafkaProducer) -> None:
        reply = await self.service.answer(request)
        if reply is None:
            return
        assert not isinstance(reply, DeadLetter), reply
        for value, headers in (*reply.records(), *((value, reply.headers) for value in self.afterthoughts)):
            await producer.send(
                reply.topic, value=value, key=reply.key, partition=reply.partition, headers=list(headers)
            )


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[DuckDBStore]:
    store = filled_store(tmp_path_factory.mktemp("client"))
    yield store
    store.close()


@pytest.fixture
def settings(kafka: str) -> Settings:
    return Settings(kafka=kafka, application=unique_name("app"))


@pytest.fixture
async def worker(settings: Settings, store: DuckDBStore) -> AsyncIterator[StandIn]:
    async with StandIn(settings, store).running() as worker:
        yield worker


@pytest.fixture
async def client(settings: Settings, worker: StandIn) -> AsyncIterator[AsyncClient]:
    async with await AsyncClient.connect(settings) as client:
        for partition in range(PARTITIONS):  # leaders of new partitions take a moment
            await client.query("SELECT 1", key=key_of(partition, PARTITIONS), deadline_ms=60_000)
        worker.requests.clear()
        yield client


async def test_a_query_is_answered_with_rows_and_positions(client: AsyncClient) -> None:
    answer = await client.query("SELECT carrier, count(*) AS n FROM flights GROUP BY ALL ORDER BY ALL")
    assert answer.to_dicts() == [{"carrier": "AA", "n": 14}, {"carrier": "DL", "n": 13}, {"carrier": "UA", "n": 13}]
    assert answer.offsets == {"flights": {0: 10, 1: 10, 2: 10, 3: 10}}
    assert answer.epoch == {0: 1, 1: 1, 2: 1, 3: 1}
    assert answer.to_arrow().to_pydict() == {"carrier": ["AA", "DL", "UA"], "n": [14, 13, 13]}


async def test_arrow_answers_are_typed(client: AsyncClient) -> None:
    answer = await client.query("SELECT fare FROM flights WHERE id = $id", {"id": 2}, format="arrow")
    assert answer.rows == [(Decimal("2.50"),)]
    assert str(answer.to_arrow().schema.field("fare").type) == "decimal128(12, 2)"
    assert answer.offsets["flights"][2] == 10


async def test_many_requests_in_flight_each_get_their_own_answer(client: AsyncClient) -> None:
    answers = await asyncio.gather(
        *(client.query("SELECT id FROM flights WHERE id = ?", [n % 40], deadline_ms=60_000) for n in range(200))
    )
    assert [answer.rows for answer in answers] == [[(n % 40,)] for n in range(200)]


async def test_a_key_is_sent_to_the_partition_that_kafka_gives_it(client: AsyncClient, worker: StandIn) -> None:
    for key in ("a", "Zürich", "AA-1545-2013"):
        answer = await client.query("SELECT DISTINCT _partition FROM flights", key=key)
        owning = partition_of(key.encode(), PARTITIONS)
        assert answer.rows == [(owning,)]
        assert (worker.requests[-1].partition, worker.requests[-1].key) == (owning, key.encode())


async def test_two_clients_do_not_see_each_others_replies(settings: Settings, client: AsyncClient) -> None:
    async with await AsyncClient.connect(settings) as other:
        answers = await asyncio.gather(
            *((client, other)[n % 2].query("SELECT ?::INTEGER", [n], deadline_ms=60_000) for n in range(40))
        )
    assert [answer.rows for answer in answers] == [[(n,)] for n in range(40)]


async def test_a_refusal_raises_with_code_and_hint(client: AsyncClient) -> None:
    with pytest.raises(QueryRefusedError, match="did you mean flights") as caught:
        await client.query("SELECT * FROM flihgts")
    assert caught.value.code == RefusalCode.UNKNOWN_TABLE
    assert not caught.value.retriable


async def test_a_retriable_refusal_is_asked_again_until_it_is_answered(client: AsyncClient, worker: StandIn) -> None:
    worker.state.epochs.clear()
    asking = asyncio.create_task(client.query("SELECT 1", deadline_ms=60_000))
    await _until(lambda: len(worker.requests) >= 3)
    worker.state.epochs.update(dict.fromkeys(range(PARTITIONS), 2))
    answer = await asking
    assert answer.rows == [(1,)]
    assert answer.epoch[0] == 2
    ids = [request.value for request in worker.requests]
    assert len(set(ids)) == len(ids)


async def test_a_retriable_refusal_is_raised_at_the_deadline(client: AsyncClient, worker: StandIn) -> None:
    worker.state.epochs.clear()
    with pytest.raises(QueryRefusedError) as caught:
        await client.query("SELECT 1", deadline_ms=1_000)
    assert caught.value.code == RefusalCode.NOT_SERVING
    assert caught.value.retriable


async def test_the_workers_refusal_arrives_before_the_client_gives_up(client: AsyncClient) -> None:
    with pytest.raises(QueryRefusedError) as caught:
        await client.query("SELECT 1", at_least={"flights": {0: 10_000}}, deadline_ms=2_000)
    assert caught.value.code == RefusalCode.DEADLINE_EXCEEDED


async def test_no_reply_before_the_deadline_is_a_timeout_that_says_what_to_check(
    client: AsyncClient, worker: StandIn
) -> None:
    worker.silent = True
    started = time.monotonic()
    with pytest.raises(RequestTimeoutError, match="pintail worker store"):
        await client.query("SELECT 1", deadline_ms=300)
    assert time.monotonic() - started < 5


@pytest.mark.parametrize(
    ("options", "code", "words"),
    [
        ({"sql": ""}, RefusalCode.NOT_A_REQUEST, "sql"),
        ({"params": [Decimal("1.5")]}, RefusalCode.NOT_A_REQUEST, "params.0: a Decimal"),
        ({"deadline_ms": 0}, RefusalCode.DEADLINE_EXCEEDED, "budget of 0 ms"),
        ({"deadline_ms": -5}, RefusalCode.DEADLINE_EXCEEDED, "budget of -5 ms"),
        ({"deadline_ms": 999_999}, RefusalCode.NOT_A_REQUEST, "more than the 120000 ms"),
    ],
)
async def test_what_no_worker_would_accept_is_refused_without_asking(
    client: AsyncClient, worker: StandIn, options: dict[str, Any], code: RefusalCode, words: str
) -> None:
    with pytest.raises(QueryRefusedError) as caught:
        await client.query(**{"sql": "SELECT 1", **options})
    assert (caught.value.code, caught.value.retriable) == (code, False)
    assert words in caught.value.message
    assert caught.value.hint
    assert worker.requests == []


async def test_without_a_query_topic_the_client_says_that_no_worker_has_run(settings: Settings) -> None:
    with pytest.raises(ConfigurationError, match="no store worker"):
        await AsyncClient.connect(settings)


async def test_a_broker_that_is_away_is_one_clear_error(settings: Settings) -> None:
    with pytest.raises(ConfigurationError, match="PINTAIL_KAFKA"):
        await AsyncClient.connect(settings.model_copy(update={"kafka": "127.0.0.1:1"}))


async def test_both_clients_connect_by_the_name_that_is_installed(settings: Settings, worker: StandIn) -> None:
    del worker
    given = {"kafka": settings.kafka, "application": settings.application}
    async with await pintail.connect_async(**given) as client:
        assert (await client.query("SELECT 1", deadline_ms=60_000)).rows == [(1,)]

    def ask() -> list[tuple[Any, ...]]:
        with pintail.connect(**given) as client:
            return list(client.query("SELECT 2", deadline_ms=60_000))

    assert await asyncio.to_thread(ask) == [(2,)]


async def test_the_blocking_client_is_shared_by_threads(settings: Settings, worker: StandIn) -> None:
    del worker

    def ask_from_threads() -> list[int]:
        results: list[int] = []
        with Client.connect(settings) as client:

            def ask(number: int) -> None:
                results.append(client.query("SELECT ?::INTEGER", [number], deadline_ms=60_000).rows[0][0])

            threads = [threading.Thread(target=ask, args=(number,)) for number in range(8)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
        client.close()
        return sorted(results)

    assert await asyncio.to_thread(ask_from_threads) == list(range(8))


async def _until(condition: object) -> None:
    assert callable(condition)
    async with asyncio.timeout(20):
        while not condition():  # noqa: ASYNC110  # the stand-in counts in a list
            await asyncio.sleep(0.005)


async def test_a_request_that_is_answered_twice_has_its_first_answer(client: AsyncClient, worker: StandIn) -> None:
    """A request that a worker read again after a crash: the second reply may be an answer, late, or no reply at all."""
    late = Refusal(id="again", code=RefusalCode.DEADLINE_EXCEEDED, message="late")
    worker.afterthoughts = [serialise_refusal(late), b"not a reply", b""]
    for number in range(5):
        assert (await client.query("SELECT $1", [number])).rows == [(number,)]
    answers = await asyncio.gather(*[client.query("SELECT $1", [number]) for number in range(50)])
    assert [answer.rows for answer in answers] == [[(number,)] for number in range(50)]


async def test_a_task_that_is_cancelled_ends_its_query_on_the_worker(client: AsyncClient, worker: StandIn) -> None:
    slow = "SELECT count(*) FROM " + ", ".join(f"flights f{number}" for number in range(9))
    asking = asyncio.create_task(client.query(slow, deadline_ms=60_000))
    await _until(lambda: worker.service.running_count == 1)
    asking.cancel()
    with pytest.raises(asyncio.CancelledError):
        await asking
    await _until(lambda: worker.service.running_count == 0)
    assert (await client.query("SELECT 1")).rows == [(1,)]


async def test_what_the_client_wrote_is_an_at_least(settings: Settings, client: AsyncClient, worker: StandIn) -> None:
    """The stand-in applies nothing, so the positions show in the request."""
    topic = f"{settings.application}.written"
    await ensure_topics([TopicSpecification(topic, 1)], settings)
    written = [await client.publish(topic, {"id": number}, key=str(number)) for number in range(3)]
    assert [(each.topic, each.partition, each.offset) for each in written] == [(topic, 0, n) for n in range(3)]
    with pytest.raises(QueryRefusedError, match="belongs to no table"):
        await client.query("SELECT 1", at_least=written)
    assert json.loads(worker.requests[-1].value or b"")["at_least"] == {topic: {"0": 2}}


@pytest.mark.parametrize("answer_format", ["json", "arrow"])
async def test_a_large_answer_comes_in_chunks(client: AsyncClient, answer_format: Literal["json", "arrow"]) -> None:
    many = "SELECT sha256(a.id || '-' || b.id || '-' || c.id) AS h FROM flights a, flights b, flights c ORDER BY 1"
    with pytest.raises(QueryRefusedError) as caught:
        await client.query(many, deadline_ms=60_000)
    assert caught.value.code == RefusalCode.TOO_MANY_ROWS
    answer = await client.query(many, deadline_ms=60_000, format=answer_format, chunked=True)
    assert len(answer) == 64_000
    assert [row[0] for row in answer] == sorted(row[0] for row in answer)
