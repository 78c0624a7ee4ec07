"""QueryService over the real store: exactly one outcome per request, exact positions, typed refusals."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, cast

import orjson
import pytest

from schemas.messages import Answer, ArrowAnswer, Refusal, RefusalCode, read_reply
from streams.adapters.duckdb_queries import DuckDBQueries
from streams.adapters.duckdb_store import DuckDBStore
from streams.adapters.kafka_partitioner import key_of, partition_of
from streams.config import Settings
from streams.errors import StoreError
from streams.limits import QUERY_DEADLINE_MS_MAX, QUERY_IN_FLIGHT_MAX
from streams.ports import DeadLetter, ParkReason
from streams.processes.answering import IncomingRequest, QueryService, Reply
from tests.query_store import CATALOG, FLIGHTS, PARTITIONS, asks_nobody, filled_store, flight, write

MANY_GROUPS = (
    "SELECT count(DISTINCT a.id || '-' || b.id || '-' || c.id || '-' || d.id || '-' || e.id)"
    " FROM flights a, flights b, flights c, flights d, flights e"
)
SLOW = "SELECT count(*) FROM " + ", ".join(f"flights f{n}" for n in range(9))


class WorkerState:
    """ServingState under the test's control."""

    def __init__(self) -> None:
        self.partitions_total = PARTITIONS
        self.epochs = dict.fromkeys(range(PARTITIONS), 7)
        self.asked, self.applied = asyncio.Event(), asyncio.Event()
        self.waits: list[tuple[int, str, int]] = []

    def serving(self) -> Mapping[int, int]:
        return dict(self.epochs)

    async def wait_until_applied(self, partition: int, topic: str, offset: int) -> None:
        self.waits.append((partition, topic, offset))
        self.asked.set()
        await self.applied.wait()
        if partition not in self.epochs:
            raise StoreError(f"partition {partition} left this worker")


class Worker:
    """A service with its store, and a short way to ask."""

    def __init__(self, store: DuckDBStore, settings: Settings) -> None:
        self.store = store
        self.state = WorkerState()
        self.service = QueryService(self.store, CATALOG, self.state, settings, ask=asks_nobody)

    async def outcome(self, fields: Mapping[str, Any] | bytes, *, partition: int = 0, age_ms: float = 0) -> Any:
        value = fields if isinstance(fields, bytes) else orjson.dumps(fields)
        return await self.service.answer(
            IncomingRequest(value, b"key", (), partition, 41, int(time.time() * 1000 - age_ms))
        )

    async def ask(self, sql: str, *, partition: int = 0, age_ms: float = 0, **fields: Any) -> Answer | Refusal:
        request = {"id": "q1", "sql": sql, "reply_to": "replies", **fields}
        reply = await self.outcome(request, partition=partition, age_ms=age_ms)
        assert isinstance(reply, Reply)
        read = read_reply(reply.value, reply.headers)
        assert isinstance(read, Answer | Refusal)
        assert read.id == "q1"
        return read

    async def answered(self, sql: str, **fields: Any) -> Answer:
        reply = await self.ask(sql, **fields)
        assert isinstance(reply, Answer), reply
        return reply

    async def refused(self, sql: str, **fields: Any) -> Refusal:
        reply = await self.ask(sql, **fields)
        assert isinstance(reply, Refusal), reply
        return reply


WorkerMaker = Callable[..., Worker]


@pytest.fixture(scope="module")
def filled(tmp_path_factory: pytest.TempPathFactory) -> Iterator[DuckDBStore]:
    """A store for the tests that only read."""
    store = filled_store(tmp_path_factory.mktemp("answering"))
    yield store
    store.close()


@pytest.fixture
def writable(tmp_path: Path) -> Iterator[DuckDBStore]:
    """A store for one test alone."""
    store = filled_store(tmp_path)
    yield store
    store.close()


@pytest.fixture
async def new_worker(filled: DuckDBStore) -> AsyncIterator[WorkerMaker]:
    workers: list[Worker] = []

    def make(store: DuckDBStore = filled, **settings: Any) -> Worker:
        workers.append(Worker(store, Settings(**settings)))
        return workers[-1]

    yield make
    for worker in workers:
        await worker.service.close()


@pytest.fixture
def worker(new_worker: WorkerMaker) -> Worker:
    return new_worker()


@pytest.fixture
def writing_worker(new_worker: WorkerMaker, writable: DuckDBStore) -> Worker:
    return new_worker(writable)


# -- answers ---------------------------------------------------------------------------------------------------------


async def test_an_answer_states_rows_types_offsets_and_epoch(worker: Worker) -> None:
    answer = await worker.answered("SELECT carrier, count(*) AS n FROM flights GROUP BY ALL ORDER BY ALL")
    assert [(column.name, column.type) for column in answer.columns] == [("carrier", "VARCHAR"), ("n", "BIGINT")]
    assert answer.rows == [["AA", 14], ["DL", 13], ["UA", 13]]
    assert answer.offsets == {"flights": {"0": 10, "1": 10, "2": 10, "3": 10}}
    assert answer.epoch == {"0": 7, "1": 7, "2": 7, "3": 7}


async def test_offsets_name_only_the_tables_that_were_read_and_0_where_nothing_was_applied(worker: Worker) -> None:
    answer = await worker.answered("SELECT count(*) FROM airlines")
    assert answer.offsets == {"airlines": {"0": 2, "1": 0, "2": 0, "3": 0}}
    assert (await worker.answered("SELECT 1")).offsets == {}


async def test_a_key_reads_only_the_partition_that_owns_it(worker: Worker) -> None:
    owning = partition_of(b"some key", PARTITIONS)
    answer = await worker.answered("SELECT DISTINCT _partition FROM flights", key="some key", partition=owning)
    assert answer.rows == [[owning]]
    assert answer.offsets == {"flights": {str(owning): 10}}
    assert answer.epoch == {str(owning): 7}


async def test_values_arrive_as_the_protocol_says(worker: Worker) -> None:
    answer = await worker.answered(
        """SELECT fare, departed, day, stops, plane, extra, 'NaN'::DOUBLE, '-inf'::DOUBLE, 9007199254740993, 2::HUGEINT,
        170141183460469231731687303715884105727, '\\x00\\xFF'::BLOB, 'a0eebc99-9c0b-4ef8-bb6d-6bb9bd380a11'::UUID, NULL,
        TIMESTAMP '2026-01-01 00:00:00.5', TIME '10:00:00', INTERVAL '1 day 2 seconds', [1.5::DECIMAL(4, 2), NULL],
        MAP {'a': 'nan'::FLOAT}, {'d': DATE '2026-01-01', 'n': NULL}, (1, 'x'), true
        FROM flights WHERE id = 2"""
    )
    assert answer.rows == [
        [
            *("2.50", "2026-03-03T10:00:00+00:00", "2026-03-03", ["JFK", "LAX"], {"tail": "N2"}, {"meal": True}),
            *("NaN", "-Infinity", 9007199254740993, 2, "170141183460469231731687303715884105727", "AP8="),
            *("a0eebc99-9c0b-4ef8-bb6d-6bb9bd380a11", None, "2026-01-01T00:00:00.500000", "10:00:00", "P1DT2S"),
            *(["1.50", None], {"a": "NaN"}, {"d": "2026-01-01", "n": None}, [1, "x"], True),
        ]
    ]


async def test_parameters_positional_and_named(worker: Worker) -> None:
    assert (await worker.answered("SELECT carrier FROM flights WHERE id = ?", params=[4])).rows == [["UA"]]
    assert (await worker.answered("SELECT id FROM flights WHERE id IN $ids", params={"ids": [3]})).rows == [[3]]


async def test_an_arrow_answer_carries_its_head_in_the_schema(worker: Worker) -> None:
    request = {"id": "q1", "sql": "SELECT id, fare FROM flights WHERE id = 2", "reply_to": "replies", "format": "arrow"}
    reply = await worker.outcome(request)
    assert dict(reply.headers)["format"] == b"arrow"
    answer = read_reply(reply.value, reply.headers)
    assert isinstance(answer, ArrowAnswer)
    assert answer.head.offsets == {"flights": {"0": 10, "1": 10, "2": 10, "3": 10}}
    assert str(answer.table.schema.field("fare").type) == "decimal128(12, 2)"
    assert answer.table.num_rows == 1


async def test_the_reply_goes_where_the_asker_said(worker: Worker) -> None:
    request = {"id": "q1", "sql": "SELECT 1", "reply_to": "my-replies", "reply_partition": 5}
    reply = await worker.outcome(request)
    assert (reply.topic, reply.partition, reply.key) == ("my-replies", 5, b"q1")


# -- positions -------------------------------------------------------------------------------------------------------


@pytest.mark.invariant(3, place="checkpoint")
async def test_offsets_are_exactly_what_the_rows_reflect_while_records_are_applied(writing_worker: Worker) -> None:
    """Invariant 3. Partition p holds one row per record, so count(*) must equal its next_offset in every answer."""
    stop = threading.Event()

    def keep_writing() -> None:
        next_offset = 10
        while not stop.is_set():
            for partition in range(PARTITIONS):
                records = [flight(partition + PARTITIONS * (next_offset + n)) for n in range(5)]
                write(writing_worker.store, FLIGHTS, partition, next_offset, records)
            next_offset += 5

    writing = threading.Thread(target=keep_writing)
    writing.start()
    try:
        seen: set[int] = set()
        deadline = time.monotonic() + 20
        while len(seen) < 8 and time.monotonic() < deadline:
            answer = await writing_worker.answered("SELECT _partition, count(*) FROM flights GROUP BY ALL")
            counted = {str(partition): count for partition, count in cast(list[list[int]], answer.rows)}
            assert counted == answer.offsets["flights"]
            seen.add(sum(counted.values()))
            answer = await writing_worker.answered(
                "SELECT count(*) FROM flights", key=key_of(1, PARTITIONS), partition=1
            )
            assert answer.rows == [[answer.offsets["flights"]["1"]]]
        assert len(seen) == 8, "the writer made no progress, so the test proved nothing"
    finally:
        stop.set()
        writing.join()


@pytest.mark.invariant(3, place="checkpoint")
async def test_a_snapshot_shows_all_partitions_at_one_point_while_records_are_applied(writing_worker: Worker) -> None:
    """Flights are written one after the other to partition 0, 1, 2, 3, 0, 1, ...: at any one point the positions do not
    rise from one partition to the next, and differ by one at most."""
    stop = threading.Event()

    def keep_writing() -> None:
        number = 10
        while not stop.is_set():
            for partition in range(PARTITIONS):
                write(writing_worker.store, FLIGHTS, partition, number, [flight(partition + PARTITIONS * number)])
            number += 1

    writing = threading.Thread(target=keep_writing)
    writing.start()
    try:
        for _ in range(40):
            answer = await writing_worker.answered(
                "SELECT _partition, count(*) FROM flights GROUP BY ALL ORDER BY 1", consistency="snapshot"
            )
            positions = list(answer.offsets["flights"].values())
            assert answer.rows == [[partition, position] for partition, position in enumerate(positions)]
            assert positions == sorted(positions, reverse=True)
            assert positions[0] - positions[-1] <= 1
    finally:
        stop.set()
        writing.join()


async def test_a_snapshot_begins_between_commits_and_other_answers_do_not_wait(writing_worker: Worker) -> None:
    store = writing_worker.store
    with store._commits.committing():
        asking = asyncio.create_task(writing_worker.answered("SELECT count(*) FROM flights", consistency="snapshot"))
        assert (await writing_worker.answered("SELECT count(*) FROM flights")).rows == [[40]]
        assert not asking.done()
    assert (await asking).rows == [[40]]
    with store.no_commits():
        writing = threading.Thread(target=write, args=(store, FLIGHTS, 2, 10, [flight(2 + 4 * 10)]))
        writing.start()
        assert (await writing_worker.answered("SELECT count(*) FROM flights")).rows == [[40]]
        assert writing.is_alive()
    writing.join()
    assert (await writing_worker.answered("SELECT count(*) FROM flights")).rows == [[41]]


def test_duckdb_begins_a_transaction_in_each_file_when_a_statement_first_names_it(writable: DuckDBStore) -> None:
    """Why a snapshot of several partitions needs more than a transaction."""
    first = writable.query_cursor(0)
    first.execute("BEGIN TRANSACTION READ ONLY")
    assert first.execute("SELECT count(*) FROM flights").fetchone() == (10,)
    for partition in (0, 1):
        write(writable, FLIGHTS, partition, 10, [flight(partition + PARTITIONS * 10)])
    assert first.execute("SELECT count(*) FROM memory.p0.flights").fetchone() == (10,)
    assert first.execute("SELECT count(*) FROM memory.p1.flights").fetchone() == (11,)
    first.close()


async def test_a_snapshot_of_what_several_workers_serve_is_refused_with_the_way_out(writing_worker: Worker) -> None:
    writing_worker.state.epochs.pop(3)
    refusal = await writing_worker.refused("SELECT 1", consistency="snapshot")
    assert (refusal.code, refusal.retriable) == (RefusalCode.NOT_SERVING, True)
    assert "serves 3 of 4" in refusal.message
    one = await writing_worker.answered(
        "SELECT count(*) FROM flights", key=key_of(0, PARTITIONS), consistency="snapshot"
    )
    assert one.rows == [[10]]


async def test_what_several_workers_serve_is_not_subscribed_to_until_one_has_it_all(writing_worker: Worker) -> None:
    del writing_worker.state.epochs[1]
    refusal = await writing_worker.refused("SELECT 1", subscribe=True)  # gathers nothing: `asks_nobody` would fail
    assert (refusal.code, refusal.retriable) == (RefusalCode.NOT_SERVING, True)
    assert "give a key or a partition" in refusal.hint


async def test_an_answer_to_one_who_subscribes_has_its_rows_as_they_were_encoded(worker: Worker) -> None:
    sql = "SELECT '[1e400, 12345678901234567890123]'::JSON AS j UNION ALL SELECT '[1]'::JSON"
    reply = await worker.outcome({"id": "q1", "sql": sql, "reply_to": "replies", "subscribe": True})
    assert isinstance(reply, Reply)
    assert sorted(reply.rows) == [b"[[1]]", b"[[1e400, 12345678901234567890123]]"]
    assert reply.head is not None
    assert reply.head.columns[0].type == "JSON"


async def test_only_a_part_of_an_answer_has_the_limits_of_one(new_worker: WorkerMaker) -> None:
    worker = new_worker(query_rows_max=3)
    parts = Settings().part_topic
    for fields in ({"partition": 0}, {"format": "arrow"}):
        refusal = await worker.refused("SELECT id FROM flights LIMIT 4", reply_to=parts, **fields)
        assert refusal.code == RefusalCode.TOO_MANY_ROWS, fields
    part = {"id": "q1", "sql": "SELECT id FROM flights LIMIT 4", "reply_to": parts, "partition": 0, "format": "arrow"}
    reply = await worker.outcome(part)
    assert reply.is_answer
    refusal = await worker.refused("SELECT 1", reply_to=parts, partition=0, subscribe=True)
    assert refusal.code == RefusalCode.NOT_ALLOWED


async def test_read_your_writes_waits_for_the_record(writing_worker: Worker) -> None:
    asking = asyncio.create_task(
        writing_worker.answered("SELECT count(*) FROM flights", at_least={"flights": {"2": 10}})
    )
    await writing_worker.state.asked.wait()
    assert writing_worker.state.waits == [(2, "flights", 10)]
    assert not asking.done()
    write(writing_worker.store, FLIGHTS, 2, 10, [flight(2 + 4 * 10)])
    writing_worker.state.applied.set()
    answer = await asking
    assert answer.rows == [[41]]
    assert answer.offsets["flights"]["2"] == 11


async def test_read_your_writes_of_a_record_that_never_comes_is_refused_at_the_deadline(worker: Worker) -> None:
    refusal = await worker.refused("SELECT 1", at_least={"flights": {"1": 10}}, deadline_ms=50)
    assert refusal.code == RefusalCode.DEADLINE_EXCEEDED
    assert "flights[1]" in refusal.message


async def test_positions_in_partitions_that_are_not_read_are_met_trivially(worker: Worker) -> None:
    other = next(key for key in "abcdefgh" if partition_of(key.encode(), PARTITIONS) != 1)
    await worker.answered("SELECT 1", key=other, at_least={"flights": {"1": 10}})
    assert worker.state.waits == []


async def test_at_least_with_an_unknown_topic_is_refused_with_the_known_ones(worker: Worker) -> None:
    refusal = await worker.refused("SELECT 1", at_least={"flihgts": {"1": 10}})
    assert refusal.code == RefusalCode.UNKNOWN_TABLE
    assert "flights" in refusal.hint


# -- who may answer --------------------------------------------------------------------------------------------------


@pytest.mark.invariant(3, place="rebalance")
@pytest.mark.invariant(3, place="recovery")
async def test_only_serving_partitions_answer(worker: Worker) -> None:
    worker.state.epochs.pop(2)
    key_of = {partition_of(key.encode(), PARTITIONS): key for key in map(str, range(100))}

    recovering = await worker.refused("SELECT 1", key=key_of[2], partition=2)
    assert (recovering.code, recovering.retriable) == (RefusalCode.NOT_SERVING, True)
    elsewhere = await worker.refused("SELECT 1", key=key_of[2], partition=1)
    assert (elsewhere.code, elsewhere.retriable) == (RefusalCode.WRONG_PARTITION, True)
    assert "partition 2" in elsewhere.hint
    partial = await worker.refused("SELECT count(*) FROM flights", partition=1)
    assert (partial.code, partial.retriable) == (RefusalCode.NOT_SERVING, True)
    assert "nobody serves partition 2" in partial.message
    own = await worker.refused("SELECT 1", partition=2)
    assert (own.code, own.retriable) == (RefusalCode.NOT_SERVING, True)
    assert (await worker.answered("SELECT count(*) FROM flights", key=key_of[1], partition=1)).rows == [[10]]


@pytest.mark.invariant(3, 5, place="rebalance")
async def test_an_answer_computed_under_a_revoked_assignment_is_not_sent(
    worker: Worker, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Invariant 5. The epoch changes after the query read its rows and before the reply is made."""
    fetch = DuckDBQueries.prepare

    def prepare(*args: Any, **kwargs: Any) -> Any:
        worker.state.epochs[0] = 8
        return fetch(*args, **kwargs)

    monkeypatch.setattr(DuckDBQueries, "prepare", prepare)
    refusal = await worker.refused("SELECT count(*) FROM flights")
    assert (refusal.code, refusal.retriable) == (RefusalCode.NOT_SERVING, True)


@pytest.mark.invariant(9, place="rebalance")
async def test_releasing_a_partition_ends_its_queries_at_once(writing_worker: Worker) -> None:
    asking = asyncio.create_task(writing_worker.refused(SLOW, deadline_ms=60_000))
    await _until_running(writing_worker)
    writing_worker.state.epochs.pop(3)
    started = time.monotonic()
    await writing_worker.service.release([3])
    assert time.monotonic() - started < 5
    assert (await asking).code == RefusalCode.NOT_SERVING
    writing_worker.store.publish_scopes([0, 1, 2])
    writing_worker.store.close_partition(3)
    writing_worker.store.open_partition(3)  # nothing holds the file any more


# -- limits ----------------------------------------------------------------------------------------------------------


async def test_rows_over_the_limit_are_refused_and_the_smaller_limit_wins(new_worker: WorkerMaker) -> None:
    worker = new_worker(query_rows_max=5)
    assert len((await worker.answered("SELECT id FROM flights LIMIT 5")).rows) == 5
    refusal = await worker.refused("SELECT id FROM flights LIMIT 6")
    assert (refusal.code, refusal.retriable) == (RefusalCode.TOO_MANY_ROWS, False)
    asked = await worker.refused("SELECT id FROM flights LIMIT 3", limits={"rows": 2})
    assert "more than 2 rows" in asked.message
    raised = await worker.refused("SELECT id FROM flights LIMIT 6", limits={"rows": 100})
    assert "more than 5 rows" in raised.message


@pytest.mark.parametrize("answer_format", ["json", "arrow"])
async def test_bytes_over_the_limit_are_refused(new_worker: WorkerMaker, answer_format: str) -> None:
    worker = new_worker(query_answer_bytes_max=2_000)
    refusal = await worker.refused("SELECT md5(id::VARCHAR), md5(carrier) FROM flights", format=answer_format)
    assert refusal.code == RefusalCode.TOO_MANY_BYTES
    reply = await worker.outcome({"id": "1", "sql": "SELECT md5('x')", "reply_to": "r", "format": answer_format})
    assert len(reply.value) <= 2_000


@pytest.mark.invariant(9, place="input")
async def test_a_query_is_ended_at_its_deadline_and_its_slot_is_free_again(new_worker: WorkerMaker) -> None:
    """Invariant 9."""
    worker = new_worker(query_concurrency_max=1)
    started = time.monotonic()
    refusal = await worker.refused(SLOW, deadline_ms=200)
    assert refusal.code == RefusalCode.DEADLINE_EXCEEDED
    assert time.monotonic() - started < 2
    assert (await worker.answered("SELECT 1", deadline_ms=10_000)).rows == [[1]]


@pytest.mark.parametrize(("deadline_ms", "age_ms"), [(0, 0), (-5, 0), (100, 500), (None, 6_000)])
async def test_a_budget_that_is_spent_is_refused(worker: Worker, deadline_ms: int | None, age_ms: int) -> None:
    refusal = await worker.refused("SELECT 1", deadline_ms=deadline_ms, age_ms=age_ms)
    assert refusal.code == RefusalCode.DEADLINE_EXCEEDED


async def test_a_producer_clock_ahead_of_the_worker_does_not_lengthen_the_budget(worker: Worker) -> None:
    started = time.monotonic()
    refusal = await worker.refused(SLOW, deadline_ms=200, age_ms=-60_000)
    assert refusal.code == RefusalCode.DEADLINE_EXCEEDED
    assert time.monotonic() - started < 5


async def test_requests_beyond_what_the_worker_holds_are_refused_at_once(new_worker: WorkerMaker) -> None:
    worker = new_worker(query_concurrency_max=1)
    busy = asyncio.create_task(worker.refused(SLOW, deadline_ms=60_000))
    await _until_running(worker)
    queued = [asyncio.create_task(worker.ask("SELECT 1", deadline_ms=60_000)) for _ in range(QUERY_IN_FLIGHT_MAX - 1)]
    await asyncio.sleep(0)
    refusal = await worker.refused("SELECT 1")
    assert (refusal.code, refusal.retriable) == (RefusalCode.OVERLOADED, True)
    assert refusal.retry_after_ms is not None
    for task in queued:
        task.cancel()
    await asyncio.gather(*queued, return_exceptions=True)
    worker.state.epochs.clear()
    await worker.service.release(range(PARTITIONS))
    await busy


@pytest.mark.invariant(9, place="input")
async def test_a_hundred_requests_at_once_get_one_answer_each(worker: Worker) -> None:
    answers = await asyncio.gather(
        *(
            worker.answered("SELECT id FROM flights WHERE id = ?", params=[n % 40], deadline_ms=60_000)
            for n in range(100)
        )
    )
    assert [answer.rows for answer in answers] == [[[n % 40]] for n in range(100)]


# -- requests that cannot be answered ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (b"not json", "not JSON"),
        (b"", "not JSON"),
        (b"[1]", "not an object"),
        (b"\xff\xfe", "not JSON"),
        (b'{"id": "1", "sql": "SELECT 1"}', "nowhere to reply"),
        (b'{"id": "1", "sql": "SELECT 1", "reply_to": 5}', "nowhere to reply"),
        (b'{"id": "1", "sql": "SELECT 1", "reply_to": "not legal!"}', "legal topic name"),
        (b'{"id": "1", "sql": "SELECT 1", "reply_to": ".."}', "legal topic name"),
        (b'{"id": "1", "sql": "SELECT 1", "reply_to": "flights"}', "topic of a table"),
        (b'{"id": "1", "sql": "SELECT 1", "reply_to": "flights.dead-letters"}', "dead-letter topic"),
        (b'{"id": "1", "sql": "SELECT 1", "reply_to": "pintail.query"}', "Pintail's own"),
        (b'{"id": "1", "sql": "SELECT 1", "reply_to": "pintail-store-x"}', "Pintail's own"),
        (b'{"id": "1", "sql": "SELECT 1", "reply_to": "__consumer_offsets"}', "internal to Kafka"),
    ],
)
@pytest.mark.invariant(6, place="input")
async def test_a_record_that_nobody_can_be_told_about_is_parked(worker: Worker, value: bytes, words: str) -> None:
    """Invariant 6."""
    letter = await worker.outcome(value, partition=3)
    assert isinstance(letter, DeadLetter)
    assert (letter.reason, letter.value, letter.key) == (ParkReason.NOT_A_REQUEST, value, b"key")
    assert (letter.source, letter.offset) == (("pintail.query", 3), 41)
    assert letter.dead_letter_topic == "pintail.query.dead-letters"
    assert words in letter.detail


async def test_a_tombstone_is_parked(worker: Worker) -> None:
    letter = await worker.service.answer(IncomingRequest(None, None, (), 0, 1, 0))
    assert isinstance(letter, DeadLetter)


async def test_reply_to_may_come_as_a_header(worker: Worker) -> None:
    value = orjson.dumps({"id": "1", "sql": "SELECT 1"})
    headers = (("reply_to", b"from-header"),)
    reply = await worker.service.answer(IncomingRequest(value, None, headers, 0, 1, int(time.time() * 1000)))
    assert isinstance(reply, Reply)
    assert reply.topic == "from-header"


@pytest.mark.parametrize("value", [None, b"", b"SELECT 1", b"[]", b'{"id": "1", "sql":'])
async def test_a_value_that_is_no_object_is_refused_where_the_header_says(worker: Worker, value: bytes | None) -> None:
    headers = (("reply_to", b"from-header"),)
    reply = await worker.service.answer(IncomingRequest(value, None, headers, 0, 1, int(time.time() * 1000)))
    assert isinstance(reply, Reply)
    assert (reply.topic, reply.partition, reply.key) == ("from-header", None, b"")
    refusal = read_reply(reply.value, reply.headers)
    assert isinstance(refusal, Refusal)
    assert (refusal.id, refusal.code, refusal.retriable) == (None, RefusalCode.NOT_A_REQUEST, False)
    assert "send one JSON object" in refusal.hint


@pytest.mark.parametrize(
    ("fields", "code", "words"),
    [
        ({"sql": None}, RefusalCode.NOT_A_REQUEST, "sql"),
        ({"sqll": "SELECT 1"}, RefusalCode.NOT_A_REQUEST, "did you mean sql?"),
        ({"limits": {"row": 1}}, RefusalCode.NOT_A_REQUEST, "did you mean rows?"),
        ({"deadline_ms": "soon"}, RefusalCode.NOT_A_REQUEST, "deadline_ms"),
        ({"deadline_ms": QUERY_DEADLINE_MS_MAX + 1}, RefusalCode.NOT_A_REQUEST, "more than the 120000 ms"),
        ({"params": "x"}, RefusalCode.NOT_A_REQUEST, "params: must be a list or an object of JSON values"),
        ({"sql": "SELECT nope FROM flights"}, RefusalCode.UNKNOWN_COLUMN, "nope"),
        ({"sql": "SELECT f.nope FROM flights f"}, RefusalCode.UNKNOWN_COLUMN, "nope"),
        ({"sql": "SELECT g.id FROM flights f"}, RefusalCode.UNKNOWN_COLUMN, "g"),
        ({"sql": "SELECT * FROM nope"}, RefusalCode.UNKNOWN_TABLE, "nope"),
        ({"sql": "SELEC 1"}, RefusalCode.BAD_SQL, "SELEC"),
        ({"sql": "SELECT carrier::INTEGER FROM flights"}, RefusalCode.BAD_SQL, "INT32"),
        ({"sql": "SELECT id, count(*) FROM flights"}, RefusalCode.BAD_SQL, "GROUP BY"),
        ({"sql": "SELECT read_text('x')"}, RefusalCode.NOT_ALLOWED, "read_text()"),
        ({"sql": "SELECT ?"}, RefusalCode.BAD_PARAMS, "$1"),
        ({"sql": "SELECT ?::INTEGER", "params": ["x"]}, RefusalCode.BAD_SQL, "INT32"),
    ],
)
async def test_refusals_are_typed_and_say_what_to_do(
    worker: Worker, fields: dict[str, Any], code: RefusalCode, words: str
) -> None:
    refusal = await worker.refused(fields.pop("sql", "SELECT 1"), **fields)
    assert refusal.code == code
    assert words in refusal.message
    assert refusal.hint
    assert not refusal.retriable


async def test_an_unknown_table_names_the_known_ones(worker: Worker) -> None:
    refusal = await worker.refused("SELECT * FROM nosuchtable")
    assert refusal.code == RefusalCode.UNKNOWN_TABLE
    assert all(table.name in refusal.hint for table in CATALOG.tables)


@pytest.mark.invariant(9, 10, place="input")
async def test_a_failure_of_the_worker_itself_is_a_refusal_without_inner_details(
    worker: Worker, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Invariants 9 and 10."""

    def explode(*_: Any, **__: Any) -> None:
        raise ZeroDivisionError("secret path")

    monkeypatch.setattr(DuckDBQueries, "prepare", explode)
    refusal = await worker.refused("SELECT 1")
    assert refusal.code == RefusalCode.INTERNAL
    assert "secret" not in refusal.message + refusal.hint
    monkeypatch.undo()
    assert (await worker.answered("SELECT 1")).rows == [[1]]


async def test_records_are_applied_while_runaway_queries_take_every_thread_until_their_deadline(
    writing_worker: Worker,
) -> None:
    """Ingestion waits for no query: its positions move, and the queries end as refusals."""
    runaways = [
        asyncio.create_task(
            writing_worker.outcome({"id": f"q{number}", "sql": sql, "reply_to": "replies", "deadline_ms": 3_000})
        )
        for number, sql in enumerate((SLOW, MANY_GROUPS) * 2)
    ]
    await _until_running(writing_worker)
    store, applied = writing_worker.store, 0
    while not any(runaway.done() for runaway in runaways):
        number = 10 + applied
        await asyncio.to_thread(write, store, FLIGHTS, 0, number, [flight(PARTITIONS * number)])
        applied += 1
    assert applied >= 2
    assert store.partitions()[0].next_offsets()["flights"] == 10 + applied
    for runaway in runaways:
        refusal = read_reply((await runaway).value)
        assert isinstance(refusal, Refusal)
        assert refusal.code in (RefusalCode.DEADLINE_EXCEEDED, RefusalCode.OVERLOADED), refusal
    assert (await writing_worker.answered("SELECT count(*) FROM flights")).rows == [[40 + applied]]


async def _until_running(worker: Worker) -> None:
    """The slow query has a thread."""
    deadline = time.monotonic() + 10
    while not worker.service.running_count:
        assert time.monotonic() < deadline
        await asyncio.sleep(0.001)


# -- what a refusal quotes -------------------------------------------------------------------------------------------

HUGE = "x" * 900_000


@pytest.mark.parametrize(
    "fields",
    [
        {"sql": "SELECT 1", "key": HUGE},
        {"sql": "SELECT 1", "key": "\0" * 900_000},
        {"sql": "SELECT 1", HUGE: 1},
        {"sql": "SELECT 1", "at_least": {HUGE: {"0": 1}}},
        {"sql": "SELECT 1", "format": HUGE},
        {"sql": f"SELECT * FROM {HUGE[:15_000]}"},
        {"sql": "SELECT $1::INTEGER", "params": [HUGE[:20_000]]},
        {"sql": f'SELECT 1 AS "{HUGE[:15_000]}"', "limits": {"bytes": 1_000}},
    ],
)
async def test_a_refusal_stays_small_whatever_it_quotes(worker: Worker, fields: dict[str, Any]) -> None:
    del worker.state.epochs[partition_of(str(fields.get("key", "")).encode(), PARTITIONS)]
    reply = await worker.outcome({"id": "q1", "reply_to": "replies", **fields})
    assert isinstance(reply, Reply)
    assert isinstance(read_reply(reply.value, reply.headers), Refusal)
    assert len(reply.value) < 32_000


@pytest.mark.parametrize("value", [orjson.dumps({"id": "q1", "sql": "SELECT 1", "reply_to": HUGE}), HUGE.encode()])
async def test_a_dead_letters_detail_stays_small(worker: Worker, value: bytes) -> None:
    letter = await worker.outcome(value)
    assert isinstance(letter, DeadLetter)
    assert len(letter.detail) < 3_000


async def test_a_request_is_cancelled_by_its_id_and_by_its_asker(worker: Worker) -> None:
    asking = asyncio.create_task(worker.refused(SLOW, deadline_ms=60_000))
    await _until_running(worker)
    assert await worker.outcome({"cancel": "q1", "reply_to": "others"}) is None
    assert await worker.outcome({"cancel": "another", "reply_to": "replies"}) is None
    assert worker.service.running_count == 1
    assert await worker.outcome({"cancel": "q1", "reply_to": "replies"}) is None
    refusal = await asking
    assert (refusal.code, refusal.retriable) == (RefusalCode.CANCELLED, False)
    assert (await worker.answered("SELECT 1")).rows == [[1]]


async def test_callers_take_turns(new_worker: WorkerMaker) -> None:
    """One slot, one caller with many requests before another one: the other one waits for one of them."""
    worker = new_worker(query_concurrency_max=1)
    blocking = asyncio.create_task(worker.outcome({"id": "slow", "sql": SLOW, "reply_to": "slow"}))
    await _until_running(worker)
    order: list[str] = []

    async def ask(caller: str) -> None:
        await worker.answered("SELECT 1", caller=caller, deadline_ms=60_000)
        order.append(caller)

    asking = [asyncio.create_task(ask(caller)) for caller in "aaaaaab"]
    await asyncio.sleep(0)
    await worker.outcome({"cancel": "slow", "reply_to": "slow"})
    await asyncio.gather(blocking, *asking)
    assert order.index("b") <= 2


async def test_a_fault_in_a_value_is_the_askers_in_arrow_too(worker: Worker) -> None:
    for answer_format in ("json", "arrow"):
        refusal = await worker.refused("SELECT CAST(carrier AS INTEGER) FROM flights", format=answer_format)
        assert refusal.code == RefusalCode.BAD_SQL
        assert "Could not convert" in refusal.message


async def test_an_interrupt_while_arrow_is_fetched_is_a_refusal(writing_worker: Worker) -> None:
    asking = asyncio.create_task(
        writing_worker.outcome(
            {"id": "q1", "sql": f"{SLOW}", "reply_to": "r", "format": "arrow", "deadline_ms": 60_000}
        )
    )
    await _until_running(writing_worker)
    writing_worker.state.epochs.pop(3)
    await writing_worker.service.release([3])
    reply = await asking
    refusal = read_reply(reply.value, reply.headers)
    assert isinstance(refusal, Refusal)
    assert (refusal.code, refusal.retriable) == (RefusalCode.NOT_SERVING, True)
