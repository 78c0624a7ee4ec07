"""Subscriptions over a table in memory: what is pushed and when, how each ends, and what a client makes of it."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar

import orjson
import pytest

from schemas.messages import (
    Answer,
    AnswerHead,
    AnswerTiming,
    Push,
    QueryRequest,
    Refusal,
    RefusalCode,
    read_envelope,
    read_push,
    serialise_request,
)
from streams.adapters.duckdb_refusals import not_serving
from streams.batches import Headers
from streams.client.subscription import Change, Pushes, changes
from streams.config import Settings
from streams.errors import QueryRefusedError, RequestTimeoutError, StaleEpochError
from streams.processes.answering import IncomingRequest, Reply, refusal_reply
from streams.processes.subscriptions import Subscriptions
from tests.watched_log import until

#: As values, or as the encoder's JSON.
Row = list[Any] | bytes


class Table:
    """One partition of a table: the rows that every query gets, the state of its worker, and the answers."""

    def __init__(self) -> None:
        self.rows: Sequence[Row] = []
        self.next_offset = 0
        self.epochs = {0: 1}
        self.partitions_total = 1
        self.asked = 0
        self.refusal: QueryRefusedError | None = None
        self.fault: Exception | None = None
        #: Answers wait for it.
        self.may_answer = asyncio.Event()
        self.may_answer.set()
        self._moved = asyncio.Condition()

    async def put(self, *rows: Row) -> None:
        """The rows are these from now on."""
        async with self._moved:
            self.rows = list(rows)
            self.next_offset += 1
            self._moved.notify_all()

    async def leave(self) -> None:
        """The partition is another worker's from now on."""
        async with self._moved:
            self.epochs = {}
            self._moved.notify_all()

    def serving(self) -> Mapping[int, int]:
        """See streams.ports.ServingState."""
        return self.epochs

    async def wait_until_applied(self, partition: int, topic: str, offset: int) -> None:
        """See streams.ports.ServingState."""
        del topic
        async with self._moved:
            await self._moved.wait_for(lambda: self.next_offset > offset or partition not in self.epochs)
        if partition not in self.epochs:
            raise StaleEpochError("partition 0 left this worker")

    async def answer(self, incoming: IncomingRequest) -> Reply | None:
        """What QueryService answers."""
        self.asked += 1
        await self.may_answer.wait()
        if self.fault is not None:
            raise self.fault
        envelope = read_envelope(incoming.value)
        if envelope.cancels is not None:
            return None
        if not self.epochs or self.refusal is not None:
            return refusal_reply(envelope, self.refusal or not_serving("it is moving"))
        head = AnswerHead(
            id=envelope.id or "",
            columns=[],
            offsets={"flights": {"0": self.next_offset}},
            epoch={str(partition): epoch for partition, epoch in self.epochs.items()},
            timing=AnswerTiming(queued_ms=0, waited_ms=0, executed_ms=0),
        )
        rows = Rows(row if isinstance(row, bytes) else orjson.dumps(row) for row in self.rows)
        return Reply("replies", 0, b"s1", b"", (("status", b"ok"), ("format", b"json")), head=head, rows=rows)


class Rows(list[bytes]):
    """Knows which threads looked through them."""

    read_by: ClassVar[set[threading.Thread]] = set()

    def __iter__(self) -> Iterator[bytes]:
        self.read_by.add(threading.current_thread())
        return super().__iter__()


class Worker:
    """Subscriptions to a table, and what they sent."""

    def __init__(self, **settings: Any) -> None:
        self.table = Table()
        self.sent: asyncio.Queue[bytes] = asyncio.Queue()
        self.subscriptions = Subscriptions(
            self.table.answer, self.table, Settings(subscription_every_ms_min=1, **settings), send=self._send
        )

    async def _send(
        self, topic: str, *, value: bytes, key: bytes | None, partition: int | None, headers: Headers
    ) -> None:
        del topic, key, partition, headers
        self.sent.put_nowait(value)

    async def take(self, **fields: Any) -> Push | Refusal | Answer | None:
        """Hands in a record; gives what is replied to it at once."""
        asked = {"id": "s1", "sql": "SELECT 1", "reply_to": "replies", "subscribe": True, "every_ms": 1} | fields
        value = orjson.dumps({name: field for name, field in asked.items() if field is not None})
        reply = await self.subscriptions.answer(IncomingRequest(value, None, (), 0, 7, int(time.time() * 1000)))
        assert reply is None or isinstance(reply, Reply)
        return None if reply is None else read_push(reply.value)

    async def next(self) -> Push | Refusal:
        """The next thing that is sent."""
        async with asyncio.timeout(20):
            return read_push(await self.sent.get())

    async def pushed(self) -> Push:
        """The next push."""
        push = await self.next()
        assert isinstance(push, Push), push
        return push

    async def ended(self) -> Refusal:
        """The next thing that is sent is the end."""
        end = await self.next()
        assert isinstance(end, Refusal), end
        return end


@pytest.fixture
async def new_worker() -> AsyncIterator[Callable[..., Worker]]:
    workers: list[Worker] = []

    def make(**settings: Any) -> Worker:
        workers.append(Worker(**settings))
        return workers[-1]

    yield make
    for worker in workers:
        await worker.subscriptions.close()


@pytest.fixture
def worker(new_worker: Callable[..., Worker]) -> Worker:
    return new_worker()


MANY = [[number, "x" * 20] for number in range(50)]


async def test_rows_that_change_are_pushed_and_no_others(worker: Worker) -> None:
    await worker.table.put(*MANY)
    assert await worker.take() is None
    first = await worker.pushed()
    assert (first.sequence, first.kind, first.rows, first.offsets) == (0, "full", MANY, {"flights": {"0": 1}})
    await worker.table.put(*MANY[:10], *MANY[11:], [99, "new"])
    second = await worker.pushed()
    assert (second.sequence, second.kind) == (1, "delta")
    assert (second.removed, second.inserted, second.rows) == ([10], [49], [[99, "new"]])
    assert second.offsets == {"flights": {"0": 2}}


async def test_a_position_that_moves_without_a_changed_row_is_not_pushed(worker: Worker) -> None:
    await worker.table.put(*MANY)
    await worker.take()
    await worker.pushed()
    asked = worker.table.asked
    await worker.table.put(*MANY)
    await until(lambda: worker.table.asked > asked)
    await worker.table.put(*MANY[1:])
    assert (await worker.pushed()).sequence == 1


async def test_the_query_runs_once_in_its_interval_however_fast_positions_move(worker: Worker) -> None:
    await worker.take(every_ms=200)
    await worker.pushed()
    for _ in range(20):
        await worker.table.put()
        await asyncio.sleep(0)
    await worker.table.put([1])
    assert (await worker.pushed()).rows == [[1]]
    assert worker.table.asked <= 3


async def test_the_whole_answer_is_pushed_where_a_delta_would_be_larger(worker: Worker) -> None:
    await worker.table.put(*MANY)
    await worker.take()
    await worker.pushed()
    await worker.table.put([1])
    push = await worker.pushed()
    assert (push.kind, push.rows, push.removed, push.sequence) == ("full", [[1]], [], 1)


async def test_sorted_rows_come_in_their_order(worker: Worker) -> None:
    await worker.table.put(*MANY)
    await worker.take(sql="SELECT 1 ORDER BY 1")
    await worker.pushed()
    await worker.table.put(*MANY[:5], [4.5, "y"], *MANY[5:])
    push = await worker.pushed()
    assert (push.kind, push.inserted) == ("delta", [5])
    await worker.table.put(*reversed(MANY))
    assert ((again := await worker.pushed()).kind, again.rows) == ("full", MANY[::-1])


async def test_a_renewal_has_a_push_of_its_own(worker: Worker) -> None:
    """By which the caller knows that the worker still is there, and that no push before it was lost."""
    await worker.table.put(*MANY)
    await worker.take()
    await worker.pushed()
    assert await worker.take() is None
    push = await worker.pushed()
    assert (push.sequence, push.kind, push.rows, push.removed) == (1, "delta", [], [])


async def test_a_lease_that_is_not_renewed_ends_with_a_message_that_says_so(worker: Worker) -> None:
    await worker.take(lease_ms=30)
    await worker.pushed()
    end = await worker.ended()
    assert (end.id, end.code, end.retriable) == ("s1", RefusalCode.LEASE_EXPIRED, True)
    await worker.take()
    assert (await worker.pushed()).sequence == 0, "the same request begins it anew"


async def test_a_subscription_is_cancelled_by_its_id(worker: Worker) -> None:
    await worker.take()
    await worker.pushed()
    await worker.take(cancel="s1", sql=None, subscribe=None, every_ms=None, id=None)
    assert (await worker.ended()).code == RefusalCode.CANCELLED


async def test_a_partition_that_leaves_ends_it_so_that_it_can_begin_elsewhere(worker: Worker) -> None:
    await worker.take()
    await worker.pushed()
    await worker.table.leave()
    end = await worker.ended()
    assert (end.code, end.retriable) == (RefusalCode.NOT_SERVING, True)


async def test_an_answer_that_is_refused_later_ends_it(worker: Worker) -> None:
    await worker.take()
    await worker.pushed()
    worker.table.refusal = QueryRefusedError("too many", code=RefusalCode.TOO_MANY_ROWS)
    await worker.table.put([1])
    assert (await worker.ended()).code == RefusalCode.TOO_MANY_ROWS


async def test_a_worker_that_stops_says_so(worker: Worker) -> None:
    await worker.take()
    await worker.pushed()
    await worker.subscriptions.close()
    assert (await worker.ended()).code == RefusalCode.NOT_SERVING


async def test_rows_are_pushed_as_the_encoder_wrote_them(worker: Worker) -> None:
    """A parser would round a JSON column's numbers, drop its repeated keys, and refuse what no float can hold."""
    await worker.table.put(b'[{"a":12345678901234567890123,"a":1.10}]', b"[1e400]", *MANY)
    await worker.take()
    assert b'"rows":[[{"a":12345678901234567890123,"a":1.10}],[1e400],[0,' in await worker.sent.get()
    await worker.table.put(b'[{"a":12345678901234567890124,"a":1.10}]', b"[1e400]", *MANY)
    push = await worker.sent.get()
    assert b'"rows":[[{"a":12345678901234567890124,"a":1.10}]]' in push
    assert orjson.loads(push)["removed"] == [0]


async def test_the_loop_does_not_look_through_rows(worker: Worker) -> None:
    Rows.read_by.clear()
    await worker.table.put(*MANY)
    await worker.take()
    await worker.table.put(*MANY[1:])
    assert [(await worker.pushed()).kind for _ in range(2)] == ["full", "delta"]
    assert Rows.read_by
    assert threading.current_thread() not in Rows.read_by


async def test_a_failure_that_nobody_foresaw_is_a_refusal(worker: Worker) -> None:
    worker.table.fault = ValueError("of the first answer")
    refusal = await worker.take()
    assert isinstance(refusal, Refusal)
    assert (refusal.id, refusal.code) == ("s1", RefusalCode.INTERNAL)
    worker.table.fault = None
    await worker.take()
    await worker.pushed()
    worker.table.fault = ValueError("of a later one")
    await worker.table.put([1])
    assert (await worker.ended()).code == RefusalCode.INTERNAL


async def test_one_that_ends_by_itself_while_the_worker_stops_ends_once(worker: Worker) -> None:
    await worker.take()
    await worker.pushed()
    worker.table.may_answer.clear()
    worker.table.refusal = QueryRefusedError("too many", code=RefusalCode.TOO_MANY_ROWS)
    asked = worker.table.asked
    await worker.table.put([1])
    await until(lambda: worker.table.asked > asked)
    worker.table.may_answer.set()
    await worker.subscriptions.close()
    assert (await worker.ended()).code == RefusalCode.TOO_MANY_ROWS
    assert worker.sent.empty()


async def test_the_rows_of_all_have_so_much_memory_and_no_more(new_worker: Callable[..., Worker]) -> None:
    worker = new_worker(subscriptions_bytes_max=5_000)
    await worker.table.put(*MANY)
    assert await worker.take() is None
    await worker.pushed()
    refusal = await worker.take(id="s2")
    assert isinstance(refusal, Refusal)
    assert (refusal.code, refusal.retriable) == (RefusalCode.OVERLOADED, True)
    assert "fewer rows" in refusal.hint
    await worker.table.put(*MANY, *MANY, *MANY)
    assert (await worker.ended()).code == RefusalCode.OVERLOADED


async def test_a_caller_and_a_worker_have_so_many_and_no_more(new_worker: Callable[..., Worker]) -> None:
    worker = new_worker(subscriptions_max=3, subscriptions_per_caller_max=2)
    for number, caller in enumerate(("a", "a", "b")):
        assert await worker.take(id=f"s{number}", caller=caller) is None
    for caller, words in (("a", "this caller has 2"), ("c", "this worker has 3")):
        refusal = await worker.take(id="more", caller=caller)
        assert isinstance(refusal, Refusal)
        assert refusal.code == RefusalCode.OVERLOADED
        assert words in refusal.message


@pytest.mark.parametrize("fields", [{"format": "arrow"}, {"chunked": True}, {"every_ms": 0}, {"lease_ms": "long"}])
async def test_a_faulty_request_is_refused_as_any_other(worker: Worker, fields: dict[str, Any]) -> None:
    worker.table.refusal = QueryRefusedError("as QueryService says", code=RefusalCode.NOT_A_REQUEST)
    refusal = await worker.take(**fields)
    assert isinstance(refusal, Refusal)
    assert refusal.code == RefusalCode.NOT_A_REQUEST


# -- the client --------------------------------------------------------------------------------------------------------


class ToWorker:
    """streams.client.subscription.Line to a worker in the same process, which loses what the test says."""

    def __init__(self, worker: Worker) -> None:
        self.worker = worker
        self.lost: set[int] = set()
        self.is_deaf = False
        self._pushes: dict[str, Pushes] = {}
        self._count = 0
        worker.subscriptions._send = self._deliver

    async def _deliver(
        self, topic: str, *, value: bytes, key: bytes | None, partition: int | None, headers: Headers
    ) -> None:
        del topic, key, partition, headers
        self._count += 1
        pushes = self._pushes.get(orjson.loads(value)["id"])
        if pushes is not None and self._count not in self.lost:
            pushes.put(value)

    @contextmanager
    def pushes_of(self, request: QueryRequest) -> Iterator[Pushes]:
        """See Line."""
        pushes = self._pushes[request.id] = Pushes()
        try:
            yield pushes
        finally:
            del self._pushes[request.id]

    async def send(self, request: QueryRequest) -> None:
        """See Line."""
        if self.is_deaf:
            return
        value = serialise_request(request)
        reply = await self.worker.subscriptions.answer(IncomingRequest(value, None, (), 0, 7, int(time.time() * 1000)))
        if reply is not None:
            assert isinstance(reply, Reply)
            await self._deliver("", value=reply.value, key=None, partition=None, headers=())


class Watching:
    """A client's subscription, one change at a time."""

    def __init__(self, line: ToWorker, *, lease_ms: int = 60_000, deadline_ms: int = 20_000) -> None:
        request = QueryRequest(
            id="t", sql="SELECT 1", reply_to="replies", subscribe=True, every_ms=1, lease_ms=lease_ms
        )
        self._changes = changes(line, request, every_ms=1, lease_ms=lease_ms, deadline_ms=deadline_ms)

    async def next(self) -> Change:
        async with asyncio.timeout(20):
            return await anext(self._changes)

    async def close(self) -> None:
        await self._changes.aclose()


async def test_the_client_gives_all_rows_and_what_changed(worker: Worker) -> None:
    await worker.table.put([1, "a"], [2, "b"])
    watching = Watching(ToWorker(worker))
    first = await watching.next()
    assert (first.answer.rows, first.added, first.removed) == ([(1, "a"), (2, "b")], [(1, "a"), (2, "b")], [])
    await worker.table.put([1, "a"], [2, "c"])
    second = await watching.next()
    assert (second.answer.rows, second.added, second.removed) == ([(1, "a"), (2, "c")], [(2, "c")], [(2, "b")])
    assert second.answer.offsets == {"flights": {0: 2}}
    await watching.close()


async def test_a_lost_push_is_noticed_and_nothing_is_missed(worker: Worker) -> None:
    await worker.table.put(*MANY)
    line = ToWorker(worker)
    watching = Watching(line)
    await watching.next()
    line.lost = {2}
    await worker.table.put(*MANY[1:])
    await until(lambda: line._count == 2)
    await worker.table.put(*MANY[2:])
    change = await watching.next()
    assert [list(row) for row in change.answer.rows] == MANY[2:]
    assert [list(row) for row in change.removed] == MANY[:2]
    await watching.close()


async def test_the_last_push_that_is_lost_is_noticed_by_the_renewal(worker: Worker) -> None:
    await worker.table.put(*MANY)
    line = ToWorker(worker)
    watching = Watching(line, lease_ms=150)
    await watching.next()
    line.lost = {2}
    await worker.table.put(*MANY[1:])
    assert len((await watching.next()).answer.rows) == 49
    await watching.close()


async def test_a_delta_of_the_next_subscription_is_not_applied_to_rows_of_the_last_one(worker: Worker) -> None:
    await worker.table.put(*MANY)
    line = ToWorker(worker)
    watching = Watching(line)
    await watching.next()
    worker.table.refusal = not_serving("it is moving")
    await worker.table.put(*MANY[5:])
    await until(lambda: line._count == 2)
    worker.table.refusal = None
    line.lost = {3}
    coming = asyncio.create_task(watching.next())
    await until(lambda: line._count == 3)
    await worker.table.put(*MANY[6:])
    assert [list(row) for row in (await coming).answer.rows] == MANY[6:]
    await watching.close()


async def test_the_client_takes_any_json(worker: Worker) -> None:
    await worker.table.put(b"[12345678901234567890123]", [{"a": 1}])
    line = ToWorker(worker)
    watching = Watching(line)
    assert (await watching.next()).answer.rows == [(12345678901234567890123,), ({"a": 1},)]
    await worker.table.leave()
    await until(lambda: not worker.subscriptions._kept)
    worker.table.epochs = {0: 2}
    worker.table.rows = [b"[12345678901234567890123]", [{"a": True}]]
    change = await watching.next()
    assert (change.added, change.removed) == ([({"a": True},)], [({"a": 1},)])
    await watching.close()


async def test_who_comes_too_late_for_many_pushes_gets_the_newest_rows(worker: Worker) -> None:
    line = ToWorker(worker)
    watching = Watching(line)
    await watching.next()
    for number in range(150):
        count = line._count
        await worker.table.put([number])
        await until(lambda count=count: line._count > count)  # type: ignore[misc]
    assert (await watching.next()).answer.rows == [(149,)]
    await watching.close()


async def test_the_client_goes_on_where_the_partition_went(worker: Worker, new_worker: Callable[..., Worker]) -> None:
    await worker.table.put([1])
    line = ToWorker(worker)
    watching = Watching(line)
    await watching.next()
    other = new_worker()
    await other.table.put([1], [2])
    other.table.epochs = {0: 2}
    other.subscriptions._send = line._deliver
    await worker.table.leave()
    line.worker = other
    change = await watching.next()
    assert (change.answer.rows, change.added, change.answer.epoch) == ([(1,), (2,)], [(2,)], {0: 2})
    await watching.close()


async def test_a_caller_who_comes_late_subscribes_anew_by_coming(worker: Worker) -> None:
    await worker.table.put([1])
    watching = Watching(ToWorker(worker), lease_ms=20)
    await watching.next()
    await until(lambda: not worker.subscriptions._kept)
    await worker.table.put([2])
    change = await watching.next()
    assert (change.answer.rows, change.removed) == ([(2,)], [(1,)])
    await watching.close()


async def test_the_client_says_so_when_no_worker_is_heard_of(worker: Worker) -> None:
    line = ToWorker(worker)
    line.is_deaf = True
    with pytest.raises(RequestTimeoutError, match="pintail worker store"):
        await Watching(line, deadline_ms=50).next()


async def test_a_refusal_that_asking_again_does_not_mend_is_raised_at_once(worker: Worker) -> None:
    worker.table.refusal = QueryRefusedError("no", code=RefusalCode.BAD_SQL)
    with pytest.raises(QueryRefusedError, match="no"):
        await Watching(ToWorker(worker)).next()
