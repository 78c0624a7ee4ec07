"""The delivery protocol's decisions and its behaviour at the end of an assignment, against a sink in memory."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from itertools import pairwise
from random import Random

import pyarrow as pa
import pytest

from schemas.table import TableDefinition
from streams.adapters.memory_intents import IntentLog
from streams.batches import RecordBatch
from streams.errors import (
    DeliveryBrokenError,
    LogGapError,
    RowsRefusedError,
    SchemaRegistryError,
    SchemaRegistryRejectedError,
    SchemaRegistryUnavailableError,
    SinkOverloadedError,
    SinkRejectedError,
    SinkUnavailableError,
    StaleEpochError,
)
from streams.ports import DecodedBatch, ParkReason
from streams.positions import OffsetRange, TopicPartition
from streams.processes import delivery as delivery_module
from streams.processes.delivery import Circuit, Delivery, DeliveryState, PartitionDelivery
from streams.processes.microbatches import FlushLimits
from streams.retry import Backoff
from tests.sink_log import MemoryDeadLetters, PartitionLog, append_table, submit_all
from tests.store_samples import DECODER
from tests.virtual_time import VirtualTimeLoop

TABLE = append_table("t")
TP = TopicPartition(TABLE.topic, 0)
SECONDS_MAX = 20


@dataclass
class MemorySink:
    """Rows by token; `faults` are raised one per insert; inserts wait while `gate` is closed."""

    offsets: list[int] = field(default_factory=list)
    tokens: list[OffsetRange] = field(default_factory=list)
    faults: list[Exception] = field(default_factory=list)
    #: Offsets of rows that no insert may hold.
    refused: set[int] = field(default_factory=set)
    gate: threading.Event = field(default_factory=threading.Event)
    entered: threading.Event = field(default_factory=threading.Event)

    def last_offset(self, table: TableDefinition, topic_partition: TopicPartition) -> int | None:
        del table, topic_partition
        return max(self.offsets, default=None)

    def insert(
        self, table: TableDefinition, topic_partition: TopicPartition, offsets: OffsetRange, rows: pa.Table
    ) -> None:
        del table, topic_partition
        self.entered.set()
        if not self.gate.wait(SECONDS_MAX):
            raise AssertionError("the gate was never opened")
        if self.faults:
            raise self.faults.pop(0)
        if self.refused.intersection(rows.column("_offset").to_pylist()):
            raise RowsRefusedError("a rule is broken", code=469)
        if offsets not in self.tokens:
            self.tokens.append(offsets)
            self.offsets += rows.column("_offset").to_pylist()


@dataclass
class AwayUntil(MemorySink):
    """A sink that is away for a time."""

    back_at: float = 0.0
    now: Callable[[], float] = time.monotonic
    #: When inserts were tried in vain, and when not.
    tried_at: list[float] = field(default_factory=list)
    taken_at: list[float] = field(default_factory=list)

    def insert(
        self, table: TableDefinition, topic_partition: TopicPartition, offsets: OffsetRange, rows: pa.Table
    ) -> None:
        if self.now() < self.back_at:
            self.tried_at.append(self.now())
            raise SinkUnavailableError("away")
        self.taken_at.append(self.now())
        super().insert(table, topic_partition, offsets, rows)


@dataclass
class Setting:
    """A log, a sink and the group's intents."""

    log: PartitionLog
    sink: MemorySink
    intents: IntentLog
    dead_letters: MemoryDeadLetters = field(default_factory=MemoryDeadLetters)
    shared: list[Delivery] = field(default_factory=list)
    #: Raised one per try to decode.
    schema_faults: list[SchemaRegistryError] = field(default_factory=list)

    def decode(self, table: TableDefinition, batch: RecordBatch) -> DecodedBatch:
        """A decoder that may have to wait for the schema registry."""
        if self.schema_faults:
            raise self.schema_faults.pop(0)
        return DECODER.decode(table, batch)

    def assign(
        self, *, rows_max: int = 100, buffer_bytes_max: int = 1 << 20, refused_in_a_row_max: int = 100
    ) -> PartitionDelivery:
        """A new owner."""
        limits = FlushLimits(rows_max=rows_max, bytes_max=1 << 20, age_seconds_max=0.01)
        self.shared.append(
            Delivery(
                sink=self.sink,
                intents=self.intents.join(),
                decoder=self,
                dead_letters=self.dead_letters,
                limits=limits,
                buffer_bytes_max=buffer_bytes_max,
                refused_in_a_row_max=refused_in_a_row_max,
            )
        )
        return self.shared[-1].open(TP, TABLE)

    @property
    def ranges(self) -> list[OffsetRange]:
        """Every BEFORE record, in order."""
        return [offsets for _, _, offsets in self.intents.history]


@pytest.fixture
async def setting(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Setting]:
    monkeypatch.setattr(delivery_module, "IDLE_SECONDS", 0.05)
    log = PartitionLog(TP)
    log.fill(Random(5), 1000)
    setting = Setting(log, MemorySink(), IntentLog())
    setting.sink.gate.set()
    yield setting
    setting.sink.gate.set()
    for shared in setting.shared:
        shared.close()


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(SECONDS_MAX):
        while not condition():  # noqa: ASYNC110  # waits, with a deadline, for what no event announces
            await asyncio.sleep(0.005)


async def deliver_all(setting: Setting, owner: PartitionDelivery) -> None:
    resume = await owner.start()
    await submit_all(owner, setting.log, resume, Random(6))
    async with asyncio.timeout(SECONDS_MAX):
        await owner.wait_until_delivered(setting.log.next_offset)


async def test_ranges_follow_one_another_and_hold_every_deliverable_record(setting: Setting) -> None:
    owner = setting.assign()
    await deliver_all(setting, owner)
    await owner.stop()
    assert setting.sink.offsets == setting.log.deliverable
    assert setting.ranges[0].lo == 0
    assert all(a.hi == b.lo for a, b in zip(setting.ranges, setting.ranges[1:], strict=False))
    assert owner.records_left_out == len(setting.log.offsets) - len(setting.log.deliverable)


async def test_a_delivery_waits_for_the_schema_registry_under_the_range_it_recorded(
    setting: Setting, monkeypatch: pytest.MonkeyPatch
) -> None:
    failures: list[object] = []

    def delay(_: Backoff) -> float:
        failures.append(owner.failure)
        return 0.0

    monkeypatch.setattr(Backoff, "next_delay_seconds", delay)
    setting.schema_faults = [SchemaRegistryUnavailableError("away"), SchemaRegistryRejectedError("wrong password")]
    faults = list(setting.schema_faults)
    owner = setting.assign()
    await deliver_all(setting, owner)
    await owner.stop()
    assert setting.sink.offsets == setting.log.deliverable
    assert failures == [None, faults[0]], "each try shows why the one before it failed"
    assert owner.failure is None
    assert setting.ranges[0] == setting.sink.tokens[0]


@pytest.mark.parametrize(
    ("stored", "intent", "resume", "replay"),
    [
        (None, None, None, None),
        (49, None, 50, None),
        (None, (0, 60), 0, (0, 60)),
        (49, (50, 60), 50, (50, 60)),
        (50, (50, 60), 60, None),  # one row of the range proves all of it: the rest is parked or a hole
        (59, (50, 60), 60, None),
        (49, (50, 50), 50, None),
        (49, (80, 80), 80, None),
        (99, (50, 60), 100, None),  # the group was reset to an earlier position: the table knows better
    ],
)
async def test_where_a_new_owner_goes_on(
    stored: int | None,
    intent: tuple[int, int] | None,
    resume: int | None,
    replay: tuple[int, int] | None,
    setting: Setting,
) -> None:
    if stored is not None:
        setting.sink.offsets.append(stored)
    if intent is not None:
        setting.intents.newest[TP] = OffsetRange(*intent)
    owner = setting.assign(rows_max=7)
    assert await owner.start() == resume
    await submit_all(owner, setting.log, resume, Random(7))
    await until(lambda: bool(setting.sink.tokens))
    await owner.stop()
    assert setting.sink.tokens[0] == replay or (replay is None and setting.sink.tokens[0].lo == (resume or 0))


async def test_an_idle_partition_records_that_nothing_is_under_way(setting: Setting) -> None:
    owner = setting.assign()
    await deliver_all(setting, owner)
    end = setting.log.next_offset
    await until(lambda: setting.intents.newest[TP] == OffsetRange(end, end))
    await owner.stop()
    assert await setting.assign().start() == end


@pytest.mark.parametrize("intent", [OffsetRange(50, 60), None])
async def test_an_owner_whose_predecessor_ended_before_it_recorded_so_does_it_although_nothing_arrives(
    setting: Setting, intent: OffsetRange | None
) -> None:
    """Else the group showed a lag for ever, and no audit could prove what was delivered last."""
    setting.sink.offsets.append(59)
    if intent is not None:
        setting.intents.newest[TP] = intent
    owner = setting.assign()
    assert await owner.start() == 60
    await until(lambda: setting.intents.newest.get(TP) == OffsetRange(60, 60))
    await owner.stop()


async def test_records_that_are_all_parked_move_the_position_on_without_an_insert(setting: Setting) -> None:
    setting.log = PartitionLog(TP)
    for _ in range(10):
        setting.log.append(b"not json", is_poison=True)
    setting.log.skip(5)
    owner = setting.assign()
    await deliver_all(setting, owner)
    assert owner.next_offset == 15
    assert owner.records_left_out == 10
    assert not setting.sink.entered.is_set()
    await owner.stop()


@pytest.mark.invariant(7, place="outage")
async def test_failures_back_off_visibly_and_the_same_range_is_tried_until_it_succeeds(setting: Setting) -> None:
    setting.sink.faults = [SinkUnavailableError("away"), SinkRejectedError("no access", code=497)]
    owner = setting.assign()
    resume = await owner.start()
    feeding = asyncio.create_task(submit_all(owner, setting.log, resume, Random(6)))
    await until(lambda: isinstance(owner.failure, SinkRejectedError))
    assert owner.failures == 2
    assert owner.backoff_seconds > 0
    assert owner.circuit in (Circuit.OPEN, Circuit.HALF_OPEN)
    assert owner.failing_seconds > 0
    await feeding
    async with asyncio.timeout(SECONDS_MAX):
        await owner.wait_until_delivered(setting.log.next_offset)
    healthy = (owner.failure, owner.failures, owner.backoff_seconds, owner.circuit)
    assert healthy == (None, 0, 0.0, Circuit.CLOSED)
    assert setting.sink.offsets == setting.log.deliverable
    await owner.stop()


def test_after_an_outage_of_hours_the_pauses_are_at_their_ceiling_and_everything_is_delivered_once() -> None:
    with asyncio.Runner(loop_factory=VirtualTimeLoop) as runner:
        runner.run(_an_outage_of_hours())


async def _an_outage_of_hours() -> None:
    log, hours = PartitionLog(TP), 2
    log.fill(Random(5), 1000)
    sink, loop = AwayUntil(), asyncio.get_running_loop()
    sink.back_at = loop.time() + hours * 3600
    sink.now = loop.time
    sink.gate.set()
    setting = Setting(log, sink, IntentLog())
    owner = setting.assign()
    await submit_all(owner, log, await owner.start(), Random(6))
    await owner.wait_until_delivered(log.next_offset)
    pauses = [later - earlier for earlier, later in pairwise(sink.tried_at)]
    ceiling = delivery_module.BACKOFF_SECONDS_MAX
    assert sink.taken_at[0] - sink.back_at < ceiling + 1, "it goes on within a pause"
    assert max(pauses) < ceiling + 1
    assert min(pauses[20:]) > ceiling / 2
    assert len(set(pauses[20:])) > len(pauses) / 2, "workers that failed together do not try together"
    assert sink.offsets == log.deliverable
    assert owner.circuit is Circuit.CLOSED
    await owner.stop()
    setting.shared[0].close()


@pytest.mark.invariant(5, place="rebalance")
async def test_after_stop_nothing_is_recorded_or_delivered(setting: Setting) -> None:
    setting.sink.gate.clear()
    owner = setting.assign()
    resume = await owner.start()
    await submit_all(owner, setting.log, resume, Random(6))
    await asyncio.to_thread(setting.sink.entered.wait, SECONDS_MAX)
    recorded = list(setting.intents.history)
    stopping = asyncio.create_task(owner.stop())
    await until(lambda: owner.state is DeliveryState.STOPPED)
    setting.sink.gate.set()
    await stopping
    # The insert in flight was waited for; nothing follows it, and late batches are dropped.
    assert len(setting.sink.tokens) == 1
    await owner.submit(setting.log.batch(0, 10))
    with pytest.raises(StaleEpochError):
        await owner.wait_until_delivered(setting.log.next_offset)
    assert setting.intents.history == recorded
    assert setting.shared[0].budget.bytes_used == 0


@pytest.mark.invariant(5, 7, place="rebalance")
async def test_an_insert_that_outlives_the_stop_changes_nothing_and_is_replayed(setting: Setting) -> None:
    setting.sink.gate.clear()
    old = setting.assign()
    await submit_all(old, setting.log, await old.start(), Random(6))
    await asyncio.to_thread(setting.sink.entered.wait, SECONDS_MAX)
    await old.stop(wait_seconds_max=0)
    new = setting.assign(rows_max=33)
    assert await new.start() == 0
    setting.sink.gate.set()
    await submit_all(new, setting.log, 0, Random(8))
    async with asyncio.timeout(SECONDS_MAX):
        await new.wait_until_delivered(setting.log.next_offset)
    await new.stop()
    assert sorted(setting.sink.offsets) == setting.log.deliverable
    assert old.next_offset is None or old.next_offset == 0


@pytest.mark.invariant(5, place="rebalance")
async def test_a_zombie_is_fenced_before_it_inserts(setting: Setting) -> None:
    zombie = setting.assign()
    resume = await zombie.start()
    new = setting.assign()
    await deliver_all(setting, new)
    inserted = list(setting.sink.tokens)
    await submit_all(zombie, setting.log, resume, Random(6))
    await until(lambda: zombie.state is DeliveryState.FENCED)
    assert setting.sink.tokens == inserted
    await zombie.submit(setting.log.batch(0, 10))
    await zombie.stop()
    await new.stop()
    assert setting.shared[0].budget.bytes_used == 0


async def test_start_waits_for_the_sink_and_ends_with_stop(setting: Setting, monkeypatch: pytest.MonkeyPatch) -> None:
    def away(*_: object) -> int | None:
        raise SinkUnavailableError("away")

    monkeypatch.setattr(setting.sink, "last_offset", away)
    owner = setting.assign()
    starting = asyncio.create_task(owner.start())
    await until(lambda: owner.failures > 0)
    await owner.stop()
    with pytest.raises(StaleEpochError):
        await asyncio.wait_for(starting, SECONDS_MAX)


async def test_missing_records_are_named_never_skipped(setting: Setting) -> None:
    owner = setting.assign()
    await owner.start()
    await owner.submit(setting.log.batch(0, 10))
    with pytest.raises(LogGapError, match="from 10 on"):
        await owner.submit(setting.log.batch(20, 30))
    await owner.submit(setting.log.batch(5, 30))
    async with asyncio.timeout(SECONDS_MAX):
        await owner.wait_until_delivered(30)
    assert setting.sink.offsets == [offset for offset in setting.log.deliverable if offset < 30]
    await owner.stop()


async def test_submitting_waits_while_too_many_bytes_are_under_way(setting: Setting) -> None:
    setting.sink.gate.clear()
    owner = setting.assign(rows_max=10, buffer_bytes_max=5_000)
    await owner.start()
    feeding = asyncio.create_task(submit_all(owner, setting.log, 0, Random(6)))
    await asyncio.to_thread(setting.sink.entered.wait, SECONDS_MAX)
    whole = setting.log.batch(0, setting.log.next_offset).size_bytes
    assert not feeding.done()
    assert setting.shared[0].budget.bytes_used < whole / 2
    setting.sink.gate.set()
    await asyncio.wait_for(feeding, SECONDS_MAX)
    async with asyncio.timeout(SECONDS_MAX):
        await owner.wait_until_delivered(setting.log.next_offset)
    assert setting.shared[0].budget.bytes_used == 0
    await owner.stop()


async def test_a_replay_does_not_wait_for_room_that_only_deliveries_make(setting: Setting) -> None:
    setting.intents.newest[TP] = OffsetRange(0, setting.log.next_offset)
    owner = setting.assign(buffer_bytes_max=100)
    setting.shared[0].budget.bytes_used = 100
    async with asyncio.timeout(SECONDS_MAX):
        await deliver_all(setting, owner)
    assert setting.sink.tokens == [OffsetRange(0, setting.log.next_offset)]
    await owner.stop()


async def test_a_fault_of_the_program_ends_the_delivery_and_comes_out_where_its_end_is_waited_for(
    setting: Setting, monkeypatch: pytest.MonkeyPatch
) -> None:
    owner = setting.assign()
    monkeypatch.setattr(setting.shared[0], "decoder", None)
    await owner.start()
    await owner.submit(setting.log.batch(0, 10))
    with pytest.raises(DeliveryBrokenError, match="AttributeError"):
        await owner.wait_until_ended()
    with pytest.raises(DeliveryBrokenError):
        await owner.wait_until_delivered(10)
    await owner.submit(setting.log.batch(10, 20))
    assert owner.state is DeliveryState.FAILED
    assert setting.shared[0].budget.bytes_used == 0
    await owner.stop()


@pytest.mark.invariant(6, 10, place="checkpoint")
async def test_rows_that_clickhouse_refuses_are_parked_and_the_rest_goes_on(setting: Setting) -> None:
    refused = [setting.log.deliverable[number] for number in (0, 1, 400, 401, 777, -1)]
    setting.sink.refused = set(refused)
    owner = setting.assign()
    await deliver_all(setting, owner)
    await owner.stop()
    assert setting.sink.offsets == [offset for offset in setting.log.deliverable if offset not in refused]
    assert [letter.offset for letter in setting.dead_letters.letters] == refused
    letter = setting.dead_letters.letters[2]
    assert letter.value == setting.log.values[setting.log.offsets.index(letter.offset)]
    assert (letter.reason, letter.detail) == (ParkReason.REFUSED_BY_SINK, "a rule is broken")
    assert letter.dead_letter_topic == TABLE.dead_letter_topic
    assert owner.records_refused == len(refused)
    assert owner.records_left_out == len(setting.log.offsets) - len(setting.log.deliverable)
    # Each insert under a record of its own, made before it: a new owner always knows what may be under way.
    assert set(setting.sink.tokens) <= set(setting.ranges)
    assert setting.shared[0].budget.bytes_used == 0


async def test_a_rule_that_refuses_everything_stops_the_delivery_until_it_is_lifted(
    setting: Setting, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(delivery_module, "BACKOFF_SECONDS_MAX", 0.02)
    first, *others = setting.log.deliverable
    setting.sink.refused = set(others)
    owner = setting.assign(refused_in_a_row_max=7)
    resume = await owner.start()
    await submit_all(owner, setting.log, resume, Random(6))
    await until(lambda: owner.failures > 2)
    assert "7 records in a row" in str(owner.failure)
    assert "SINK_REFUSED_IN_A_ROW_MAX" in owner.failure.hint  # type: ignore[union-attr]
    assert [letter.offset for letter in setting.dead_letters.letters] == others[:7]
    setting.sink.refused = set()
    async with asyncio.timeout(SECONDS_MAX):
        await owner.wait_until_delivered(setting.log.next_offset)
    assert setting.sink.offsets == [first, *others[7:]]
    assert owner.failure is None
    await owner.stop()


async def test_a_refused_range_that_landed_before_is_not_split(setting: Setting) -> None:
    """The answer to its first insert was lost, and the table got a new rule since."""
    owner = setting.assign(rows_max=100)
    await owner.start()
    setting.sink.offsets += setting.log.batch(0, 50).offsets
    setting.sink.refused = {20}
    await owner.submit(setting.log.batch(0, 50))
    async with asyncio.timeout(SECONDS_MAX):
        await owner.wait_until_delivered(50)
    await owner.stop()
    assert not setting.sink.tokens
    assert not setting.dead_letters.letters


async def test_too_many_parts_slow_the_table_down_and_fail_nothing(setting: Setting) -> None:
    setting.sink.faults = [SinkOverloadedError("too many parts")]
    owner = setting.assign()
    age_seconds = setting.shared[0].pace_of(TABLE).limits.age_seconds_max
    feeding = asyncio.create_task(submit_all(owner, setting.log, await owner.start(), Random(6)))
    await until(lambda: owner.failures == 1)
    assert setting.shared[0].pace_of(TABLE).limits.age_seconds_max == 2 * age_seconds
    await feeding
    async with asyncio.timeout(SECONDS_MAX):
        await owner.wait_until_delivered(setting.log.next_offset)
    await owner.stop()
    assert setting.sink.offsets == setting.log.deliverable
