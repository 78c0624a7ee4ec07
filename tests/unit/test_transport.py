"""The batched transport: what a fetch becomes, and how much of it may wait."""

from __future__ import annotations

import asyncio
import gc
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
from aiokafka.consumer.fetcher import READ_COMMITTED, FetchResult, PartitionRecords
from aiokafka.consumer.group_coordinator import GroupCoordinator
from aiokafka.errors import CorruptRecordException, UnknownTopicOrPartitionError
from aiokafka.record.default_records import DefaultRecordBatchBuilder
from aiokafka.record.memory_records import MemoryRecords
from aiokafka.structs import OffsetAndMetadata
from faust.types import TP

from agents import fetched_batches
from agents.fetched_batches import FETCH_WAIT_MS_MAX, PAUSE_WAITS, ByteBudget, Fetches, drain
from agents.transport import BatchConsumer, BatchConsumerThread
from streams.batches import RECORD_OVERHEAD_BYTES, RecordBatch
from streams.errors import SinkFencedError, SinkUnavailableError
from streams.limits import GATHERED_BYTES, MIB
from streams.positions import TopicPartition

FLIGHTS = TP("flights", 0)


def log_batch(
    base_offset: int,
    values: list[bytes | None],
    *,
    producer_id: int = -1,
    transactional: bool = False,
    control: bool = False,
    missing: frozenset[int] = frozenset(),
) -> bytes:
    """A Kafka record batch as a broker sends it; offsets in `missing` were compacted away."""
    builder = DefaultRecordBatchBuilder(
        magic=2,
        compression_type=0,
        is_transactional=transactional,
        producer_id=producer_id,
        producer_epoch=0,
        base_sequence=0,
        batch_size=1 << 20,
    )
    for index, value in enumerate(values):
        if index not in missing:
            key = b"\x00\x00\x00\x00" if control else b"k%d" % index
            builder.append(index, timestamp=1000 + index, key=key, value=value, headers=[("h", b"1")] if index else [])
    raw = bytearray(builder.build())
    raw[0:8] = base_offset.to_bytes(8, "big")
    if control:
        attributes = int.from_bytes(raw[21:23], "big") | 0x20
        raw[21:23] = attributes.to_bytes(2, "big")
    return bytes(raw)


def fetched(
    *log_batches: bytes, position: int = 0, aborted: list[tuple[int, int]] | None = None, check_crcs: bool = False
) -> tuple[FetchResult, Any]:
    state = SimpleNamespace(position=position, highwater=1000, paused=False)

    def consumed_to(offset: int) -> None:
        state.position = offset

    state.consumed_to = consumed_to
    assignment = SimpleNamespace(active=True, state_value=lambda _: state)
    records = PartitionRecords(
        FLIGHTS, MemoryRecords(b"".join(log_batches)), aborted, position, None, None, check_crcs, READ_COMMITTED
    )
    return FetchResult(FLIGHTS, assignment=assignment, partition_records=records, backoff=0), state


def drained(result: FetchResult, *, bytes_max: int = MIB) -> RecordBatch:
    batch = drain(result, FLIGHTS, 7, bytes_max)
    assert batch is not None
    return batch


def test_a_fetch_becomes_one_batch_of_parallel_columns() -> None:
    result, state = fetched(log_batch(0, [b"a", None]), log_batch(2, [b"ccc"]))
    batch = drained(result)
    assert (batch.first_offset, batch.next_offset, batch.generation) == (0, 3, 7)
    assert batch.values == [b"a", None, b"ccc"]
    assert batch.offsets == [0, 1, 2]
    assert batch.keys == [b"k0", b"k1", b"k0"]
    assert batch.timestamps_ms == [1000, 1001, 1000]
    assert batch.headers == {1: (("h", b"1"),)}
    assert batch.size_bytes == len(b"a") + len(b"ccc") + 3 * len(b"k0") + 3 * RECORD_OVERHEAD_BYTES
    assert state.position == 3
    assert not result.has_more()


def test_records_below_the_position_are_left_out() -> None:
    result, _ = fetched(log_batch(0, [b"a", b"b", b"c"]), position=2)
    batch = drained(result)
    assert (batch.first_offset, batch.offsets, batch.values) == (2, [2], [b"c"])


def test_offsets_need_not_be_dense() -> None:
    result, _ = fetched(log_batch(0, [b"a", b"b", b"c"], missing=frozenset({1})), log_batch(10, [b"z"]))
    batch = drained(result)
    assert batch.offsets == [0, 2, 10]
    assert (batch.first_offset, batch.next_offset) == (0, 11)


def test_aborted_transactions_and_control_records_move_the_position_and_nothing_else() -> None:
    aborted = log_batch(0, [b"x"], producer_id=5, transactional=True)
    marker = log_batch(1, [b"\x00\x00\x00\x00\x00\x00"], producer_id=5, transactional=True, control=True)
    result, state = fetched(aborted, marker, aborted=[(5, 0)])
    batch = drained(result)
    assert len(batch) == 0
    assert (batch.first_offset, batch.next_offset) == (0, 2)
    assert state.position == 2


def test_a_corrupt_log_batch_is_an_error_and_never_data() -> None:
    raw = bytearray(log_batch(0, [b"hello"]))
    raw[-3] ^= 0x01
    result, _ = fetched(bytes(raw), check_crcs=True)
    with pytest.raises(CorruptRecordException):
        drain(result, FLIGHTS, 1)


def test_what_comes_before_a_corrupt_log_batch_is_read_and_the_next_fetch_starts_at_it() -> None:
    raw = bytearray(log_batch(2, [b"damaged"]))
    raw[-3] ^= 0x01
    result, state = fetched(log_batch(0, [b"a", b"b"]), bytes(raw), log_batch(3, [b"behind"]), check_crcs=True)
    batch = drained(result)
    assert (batch.values, batch.next_offset, state.position) == ([b"a", b"b"], 2, 2)
    assert not result.has_more(), "what is left of the fetch must not be read past the damage"


def test_a_large_fetch_is_handed_out_in_parts_that_continue_each_other() -> None:
    result, _ = fetched(log_batch(0, [b"aaaa"]), log_batch(1, [b"bbbb"]))
    first = drained(result, bytes_max=100)
    assert result.has_more()
    second = drained(result, bytes_max=100)
    assert (first.first_offset, first.next_offset) == (0, 1)
    assert (second.first_offset, second.next_offset) == (1, 2)
    assert not result.has_more()


def live_batch(size_bytes: int) -> RecordBatch:
    return RecordBatch("flights", 0, 0, 1, size_bytes=size_bytes)


async def test_the_budget_is_full_until_batches_are_garbage() -> None:
    budget = ByteBudget(100)
    batches = [live_batch(60), live_batch(60)]
    for batch in batches:
        budget.take(FLIGHTS, batch)
    del batch
    assert not budget.admits(TP("flights", 1), partitions=2)
    waiting = asyncio.create_task(budget.wait_for_room())
    await asyncio.sleep(0)
    assert not waiting.done()
    batches.clear()
    gc.collect()
    await asyncio.wait_for(waiting, timeout=5)
    assert budget.admits(TP("flights", 1), partitions=2)
    assert budget.bytes_used == 0


def test_a_hot_partition_leaves_room_for_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fetched_batches, "FETCHED_BATCH_BYTES_MAX", 10)
    budget = ByteBudget(100)
    hot = []
    while budget.admits(FLIGHTS, partitions=2):
        hot.append(live_batch(10))
        budget.take(FLIGHTS, hot[-1])
    assert budget.bytes_used == 50
    assert budget.admits(TP("flights", 1), partitions=2)


def test_a_batch_larger_than_the_budget_that_a_stream_remembers_stops_nothing() -> None:
    budget = ByteBudget(100)
    remembered = live_batch(1000)
    budget.take(FLIGHTS, remembered)
    assert budget.admits(FLIGHTS, partitions=2)
    assert budget.admits(TP("flights", 1), partitions=2)


async def test_batches_may_be_given_back_while_the_budget_is_asked() -> None:
    """A finalizer runs between any two steps, also on the thread that counts: garbage in a cycle, say."""
    budget = ByteBudget(1 << 40)
    for size in range(1, 2_000):
        batch: Any = live_batch(size)
        batch.headers[0] = batch  # a cycle
        budget.take(FLIGHTS, batch)
        budget.admits(FLIGHTS, partitions=2)
    del batch
    gc.collect()
    assert budget.bytes_used == 0


class Consumer:
    """BatchConsumer's way of seeking and draining, without Faust and Kafka behind it."""

    perform_seek = BatchConsumer.perform_seek
    read_from = BatchConsumer.read_from
    stop_reading = BatchConsumer.stop_reading

    def __init__(self, *tps: TP) -> None:
        self.app = SimpleNamespace(consumer_generation_id=1, assigned_only={"queries"})
        self.left_alone: list[TopicPartition] = []
        self._thread = self
        self.owner: Any = None
        self.active = set(tps)
        self._tps = set(tps)

    def assignment(self) -> set[TP]:
        return set(self._tps)

    async def leave_alone(self, topic_partitions: list[TopicPartition]) -> None:
        self.left_alone += topic_partitions

    def pause_partitions(self, tps: set[TP]) -> None:
        self.active -= tps

    def resume_partitions(self, tps: set[TP]) -> None:
        self.active |= tps

    async def seek_wait(self, positions: dict[TP, int]) -> None:
        assert positions.keys() <= self._tps


async def test_a_partition_that_is_ready_before_the_assignment_is_through_is_read() -> None:
    ready, late = TopicPartition("flights", 0), TopicPartition("flights", 1)
    queries = TopicPartition("queries", 0)
    consumer = Consumer(TP(*ready), TP(*late), TP(*queries))

    class QuickOwner:
        async def on_assigned(self, assigned: set[TopicPartition], generation: int) -> None:
            assert (assigned, generation) == ({ready, late, queries}, 1)
            await consumer.read_from({ready: 5})  # type: ignore[misc]

    consumer.owner = QuickOwner()
    await consumer.perform_seek()  # type: ignore[misc]
    assert consumer.active == {TP(*ready)}
    assert consumer.left_alone == [queries]


class Reports:
    """Who is told of faults."""

    def __init__(self) -> None:
        self.unreadable: list[tuple[TP, str]] = []

    def report_out_of_range(self, tp: TP) -> None:
        raise AssertionError(f"{tp} is in range")

    def report_unreadable(self, tp: TP, why: str) -> None:
        self.unreadable.append((tp, why))


def fetches_over(fetched: dict[TP, FetchResult]) -> tuple[Fetches, Any, Reports]:
    """A consumer's fetches, a fetcher that holds this, and who is told of faults."""
    fetcher = SimpleNamespace(
        _records=fetched,
        _notify=lambda _: None,
        _wait_consume_future=None,
        _create_fetch_waiter=lambda: asyncio.get_running_loop().create_future(),
        _closed=False,
        _fetch_min_bytes=1,
        _fetch_max_wait_ms=FETCH_WAIT_MS_MAX,
        _subscriptions=SimpleNamespace(reassignment_in_progress=False, fetch_context=nullcontext),
    )
    reports = Reports()
    consumer = SimpleNamespace(_fetcher=fetcher, _closed=False, _coordinator=SimpleNamespace(generation=1))
    return Fetches(consumer, reports, budget=ByteBudget(MIB)), fetcher, reports


async def test_a_damaged_fetch_of_one_partition_costs_no_other_its_records_and_is_fetched_again() -> None:
    damaged = bytearray(log_batch(0, [b"hello"]))
    damaged[-3] ^= 0x01
    other = TP("flights", 1)
    whole, _ = fetched(log_batch(0, [b"a", b"b"]))
    broken, state = fetched(bytes(damaged), log_batch(1, [b"behind"]), check_crcs=True)
    fetches, fetcher, reports = fetches_over({FLIGHTS: whole, other: broken})
    batches = await fetches.next_batches({FLIGHTS, other}, 1.0)
    assert {tp: batch.values for tp, (batch,) in batches.items()} == {FLIGHTS: [b"a", b"b"]}
    assert fetcher._records == {}, "what is left of the damaged fetch must not be read past the damage"
    assert state.position == 0
    ((reported, why),) = reports.unreadable
    assert reported == other
    assert "CRC" in why


async def test_the_broker_gathers_for_a_fetch_that_follows_another_one_and_not_after_a_pause() -> None:
    whole, _ = fetched(log_batch(0, [b"a"]))
    fetches, fetcher, _ = fetches_over({FLIGHTS: whole})
    assert await fetches.next_batches({FLIGHTS}, 1.0)
    assert fetcher._fetch_min_bytes == GATHERED_BYTES
    assert await fetches.next_batches({FLIGHTS}, 2 * PAUSE_WAITS * FETCH_WAIT_MS_MAX / 1000) == {}
    assert fetcher._fetch_min_bytes == 1


@pytest.mark.parametrize("is_joining", [False, True])
async def test_while_the_group_assigns_nothing_is_committed_because_that_would_make_it_assign_once_more(
    is_joining: bool,
) -> None:
    committed: list[Any] = []

    async def commit(offsets: Any) -> None:
        committed.append(offsets)

    thread: Any = BatchConsumerThread.__new__(BatchConsumerThread)
    coordinator = SimpleNamespace(_performed_join_prepare=is_joining)
    thread._consumer = SimpleNamespace(_coordinator=coordinator, assignment=lambda: {FLIGHTS}, commit=commit)
    assert await thread._commit_quietly({FLIGHTS: 5}) is not is_joining
    failures = await thread._commit_records({FLIGHTS: (5, "5:5")})
    assert [type(failure) for failure in failures.values()] == ([SinkFencedError] if is_joining else [])
    assert bool(committed) is not is_joining


async def test_a_record_that_cannot_be_committed_fails_alone() -> None:
    """One partition now belongs to another member, and the topic of another one is gone."""
    other, lost = TP("flights", 1), TP("flights", 2)
    committed: list[Any] = []

    async def commit(offsets: Any) -> None:
        if other in offsets:
            raise UnknownTopicOrPartitionError
        committed.append(offsets)

    thread: Any = BatchConsumerThread.__new__(BatchConsumerThread)
    coordinator = SimpleNamespace(_performed_join_prepare=False)
    thread._consumer = SimpleNamespace(_coordinator=coordinator, assignment=lambda: {FLIGHTS, other}, commit=commit)
    failures = await thread._commit_records({FLIGHTS: (5, "5:9"), other: (6, "6:7"), lost: (7, "7:8")})
    assert {tp: type(failure) for tp, failure in failures.items()} == {
        other: SinkUnavailableError,
        lost: SinkFencedError,
    }
    assert committed == [{FLIGHTS: OffsetAndMetadata(5, "5:9")}]


def test_aiokafka_says_whether_a_member_is_joining() -> None:
    assert "_performed_join_prepare" in GroupCoordinator.__init__.__code__.co_names


@pytest.mark.invariant(5, place="rebalance")
async def test_invariant_5_what_was_fetched_under_an_earlier_generation_reaches_nobody() -> None:
    """As it does when a worker that was stopped wakes up after its group has gone on."""
    batches = {
        TP("flights", partition): [RecordBatch("flights", partition, 0, 5, generation=generation)]
        for partition, generation in enumerate([7, 7, 6])
    }

    async def wait_next_records(timeout: float) -> tuple[Any, Any]:
        del timeout
        return batches, None

    consumer: Any = SimpleNamespace(
        _wait_next_records=wait_next_records,
        _to_message=lambda tp, batch: BatchConsumer._to_message(consumer, tp, batch),
        should_stop=False,
        flow_active=True,
        scheduler=SimpleNamespace(iterate=lambda fetched: [(tp, each) for tp, (each,) in fetched.items()]),
        app=SimpleNamespace(consumer_generation_id=7),
    )
    given = [(tp, message.offset) async for tp, message in BatchConsumer.getmany(consumer, 1.0)]
    assert given == [(TP("flights", 0), 4), (TP("flights", 1), 4)]
