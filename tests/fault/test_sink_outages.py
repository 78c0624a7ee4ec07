"""ClickHouse goes away and comes back; tokens expire: every record is still there exactly once (invariant 7)."""

from __future__ import annotations

import asyncio
import json
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random

import clickhouse_connect
import pytest

from schemas.catalog import Catalog
from schemas.clickhouse_ddl import create_table_sql
from schemas.table import TableDefinition
from streams.adapters.clickhouse_sink import ClickHouseSink
from streams.adapters.duckdb_decoder import DuckDBDecoder
from streams.adapters.memory_intents import IntentLog
from streams.errors import SinkRejectedError, SinkUnavailableError
from streams.localstack.ports import choose_port
from streams.positions import OffsetRange, TopicPartition
from streams.processes import delivery as delivery_module
from streams.processes.delivery import Circuit, Delivery, PartitionDelivery
from streams.processes.microbatches import FlushLimits
from tests.clickhouse_proxy import ClickHouseProxy, Fault, FaultKind
from tests.sink_log import MemoryDeadLetters, PartitionLog, append_table, submit_all

SECONDS_MAX = 90


class ClickHouseProcess:
    """The embedded ClickHouse on one directory and port, which can be killed and started again."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self.port = choose_port(server="ClickHouse")
        self.url = f"http://127.0.0.1:{self.port}"
        self._process: subprocess.Popen[str] | None = None

    def start(self) -> None:
        arguments = ["--path", str(self._directory), "--port", str(self.port)]
        command = [sys.executable, "-m", "streams.localstack.clickhouse_front", *arguments]
        self._process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert self._process.stdout is not None
        assert json.loads(self._process.stdout.readline())["url"] == self.url

    def end(self, how: signal.Signals = signal.SIGKILL) -> None:
        if self._process is not None:
            self._process.send_signal(how)
            self._process.wait(timeout=30)
            assert self._process.stdout is not None
            self._process.stdout.close()
            self._process = None


@pytest.fixture
def clickhouse(tmp_path: Path) -> Iterator[ClickHouseProcess]:
    process = ClickHouseProcess(tmp_path)
    process.start()
    yield process
    process.end()


def delivery_to(
    sink: ClickHouseSink, intents: IntentLog, *, rows_max: int = 200, dead_letters: MemoryDeadLetters | None = None
) -> Delivery:
    limits = FlushLimits(rows_max=rows_max, bytes_max=1 << 20, age_seconds_max=0.02)
    return Delivery(
        sink=sink,
        intents=intents.join(),
        decoder=DuckDBDecoder(),
        dead_letters=dead_letters or MemoryDeadLetters(),
        limits=limits,
    )


def stored_offsets(url: str, table: TableDefinition, partition: int = 0) -> list[int]:
    client = clickhouse_connect.get_client(dsn=url, autogenerate_session_id=False)
    query = f"SELECT _offset FROM {table.name} WHERE _partition = {partition} ORDER BY 1"
    offsets = [row[0] for row in client.query(query).result_rows]
    client.close()
    return offsets


async def until_failing(owner: PartitionDelivery) -> None:
    async with asyncio.timeout(SECONDS_MAX):
        while owner.failures < 2:  # noqa: ASYNC110  # waits, with a deadline, for what no event announces
            await asyncio.sleep(0.01)


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM])
@pytest.mark.invariant(7, place="outage")
async def test_deliveries_catch_up_exactly_after_clickhouse_was_away(
    how: signal.Signals, clickhouse: ClickHouseProcess
) -> None:
    table = append_table("t")
    log = PartitionLog(TopicPartition(table.topic, 0))
    log.fill(Random(1), 4_000)
    sink = ClickHouseSink(clickhouse.url)
    await asyncio.to_thread(sink.ensure_tables, Catalog((table,)))
    delivery = delivery_to(sink, IntentLog())
    owner = delivery.open(log.topic_partition, table)
    # What is fed only after the end is there to fail, however fast the rest was delivered.
    held_back = log.next_offset * 3 // 4
    feeding = asyncio.create_task(submit_all(owner, log, await owner.start(), Random(2), end=held_back))
    async with asyncio.timeout(SECONDS_MAX):
        await owner.wait_until_delivered(log.next_offset // 4)
    await asyncio.to_thread(clickhouse.end, how)
    await feeding
    await submit_all(owner, log, held_back, Random(3))
    await until_failing(owner)
    assert isinstance(owner.failure, SinkUnavailableError)
    assert owner.backoff_seconds > 0
    await asyncio.to_thread(clickhouse.start)
    async with asyncio.timeout(SECONDS_MAX):
        await owner.wait_until_delivered(log.next_offset)
    await owner.stop()
    delivery.close()
    sink.close()
    assert stored_offsets(clickhouse.url, table) == log.deliverable


@pytest.mark.invariant(7, place="outage")
async def test_an_owner_that_starts_while_clickhouse_is_away_goes_on_when_it_is_back(
    clickhouse: ClickHouseProcess,
) -> None:
    table = append_table("t")
    log = PartitionLog(TopicPartition(table.topic, 0))
    log.fill(Random(3), 500)
    sink = ClickHouseSink(clickhouse.url)
    await asyncio.to_thread(sink.ensure_tables, Catalog((table,)))
    await asyncio.to_thread(clickhouse.end)
    delivery = delivery_to(sink, IntentLog())
    owner = delivery.open(log.topic_partition, table)
    starting = asyncio.create_task(owner.start())
    await until_failing(owner)
    await asyncio.to_thread(clickhouse.start)
    async with asyncio.timeout(SECONDS_MAX):
        await submit_all(owner, log, await starting, Random(4))
        await owner.wait_until_delivered(log.next_offset)
    await owner.stop()
    delivery.close()
    sink.close()
    assert stored_offsets(clickhouse.url, table) == log.deliverable


#: What happens -> what makes the engine refuse every insert, what lifts that, and how the failure shows.
REAL_FAULTS = {
    "out_of_disk": (
        ["ALTER TABLE {} MODIFY SETTING min_free_disk_bytes_to_perform_insert = 1000000000000000000"],
        ["ALTER TABLE {} RESET SETTING min_free_disk_bytes_to_perform_insert"],
        "NOT_ENOUGH_SPACE",
    ),
    "read_only": (
        ["ALTER TABLE {} MODIFY SETTING table_readonly = 1"],
        ["ALTER TABLE {} MODIFY SETTING table_readonly = 0"],
        "READ_ONLY",
    ),
}


@pytest.mark.invariant(7, place="outage")
@pytest.mark.parametrize("fault", REAL_FAULTS)
async def test_what_the_engine_refuses_for_a_while_is_delivered_exactly_afterwards(
    fault: str, clickhouse_url: str, unique_name: Callable[[str], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(delivery_module, "BACKOFF_SECONDS_MAX", 0.05)
    breaking, mending, shown = REAL_FAULTS[fault]
    table = append_table(unique_name("outage"))
    log = PartitionLog(TopicPartition(table.topic, 0))
    log.fill(Random(7), 1_000)
    sink, letters = ClickHouseSink(clickhouse_url), MemoryDeadLetters()
    await asyncio.to_thread(sink.ensure_tables, Catalog((table,)))
    client = clickhouse_connect.get_client(dsn=clickhouse_url, autogenerate_session_id=False)
    delivery = delivery_to(sink, IntentLog(), dead_letters=letters)
    owner = delivery.open(log.topic_partition, table)
    half = log.next_offset // 2
    await submit_all(owner, log, await owner.start(), Random(8), end=half)
    async with asyncio.timeout(SECONDS_MAX):
        await owner.wait_until_delivered(half)
    for statement in breaking:
        await asyncio.to_thread(client.command, statement.format(table.name))
    await submit_all(owner, log, half, Random(9))
    await until_failing(owner)
    assert shown in str(owner.failure)
    assert owner.circuit is not Circuit.CLOSED
    for statement in mending:
        await asyncio.to_thread(client.command, statement.format(table.name))
    async with asyncio.timeout(SECONDS_MAX):
        await owner.wait_until_delivered(log.next_offset)
    assert owner.failures == 0
    await owner.stop()
    delivery.close()
    sink.close()
    client.close()
    assert stored_offsets(clickhouse_url, table) == log.deliverable
    assert not letters.letters


@pytest.mark.invariant(7, place="outage")
async def test_a_password_that_is_refused_for_a_while_stops_nothing_for_good(
    clickhouse_url: str, unique_name: Callable[[str], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(delivery_module, "BACKOFF_SECONDS_MAX", 0.05)
    refused = Fault(FaultKind.EXCEPTION, code=516)  # AUTHENTICATION_FAILED
    table = append_table(unique_name("login"))
    log = PartitionLog(TopicPartition(table.topic, 0))
    log.fill(Random(10), 500)
    with ClickHouseProxy(clickhouse_url) as proxy:
        sink = ClickHouseSink(proxy.url)
        await asyncio.to_thread(sink.ensure_tables, Catalog((table,)))
        sink.close()
        proxy.standing = refused
        delivery = delivery_to(sink, IntentLog())
        owner = delivery.open(log.topic_partition, table)
        starting = asyncio.create_task(owner.start())
        await until_failing(owner)
        assert isinstance(owner.failure, SinkRejectedError)
        assert owner.failure.code == refused.code
        proxy.standing = None
        async with asyncio.timeout(SECONDS_MAX):
            await submit_all(owner, log, await starting, Random(11), end=100)
            await owner.wait_until_delivered(100)
        proxy.standing = refused
        await submit_all(owner, log, 100, Random(12))
        await until_failing(owner)
        proxy.standing = None
        async with asyncio.timeout(SECONDS_MAX):
            await owner.wait_until_delivered(log.next_offset)
        await owner.stop()
        delivery.close()
        sink.close()
    assert stored_offsets(clickhouse_url, table) == log.deliverable


@pytest.mark.invariant(7, place="outage")
async def test_clickhouse_killed_in_the_middle_of_inserts_loses_and_doubles_nothing(
    clickhouse: ClickHouseProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(delivery_module, "BACKOFF_SECONDS_MAX", 0.2)
    table = append_table("t")
    log = PartitionLog(TopicPartition(table.topic, 0))
    log.fill(Random(13), 3_000)
    with ClickHouseProxy(clickhouse.url) as proxy:
        sink = ClickHouseSink(proxy.url)
        await asyncio.to_thread(sink.ensure_tables, Catalog((table,)))
        delivery = delivery_to(sink, IntentLog(), rows_max=100)
        owner = delivery.open(log.topic_partition, table)
        feeding = asyncio.create_task(submit_all(owner, log, await owner.start(), Random(14)))
        for delay_seconds in (0.0, 0.004, 0.008):
            killed = threading.Event()

            def kill(killed: threading.Event = killed) -> None:
                clickhouse.end()
                killed.set()

            proxy.call_at_insert(len(proxy.inserts) + 3, threading.Timer(delay_seconds, kill).start)
            assert await asyncio.to_thread(killed.wait, SECONDS_MAX)
            await asyncio.to_thread(clickhouse.start)
        async with asyncio.timeout(SECONDS_MAX):
            await feeding
            await owner.wait_until_delivered(log.next_offset)
        await owner.stop()
        delivery.close()
        sink.close()
    assert stored_offsets(clickhouse.url, table) == log.deliverable


@pytest.mark.invariant(7, place="checkpoint")
async def test_a_range_is_not_doubled_when_its_token_has_expired_and_its_last_records_are_poison(
    clickhouse_url: str, unique_name: Callable[[str], str]
) -> None:
    """The restart of a partition that was idle while the others wrote more inserts than the window remembers."""
    table = append_table(unique_name("window"))
    idle, busy = (PartitionLog(TopicPartition(table.topic, partition)) for partition in (0, 1))
    idle.append(b'{"id": 1}')
    idle.append(b"not json", is_poison=True)
    busy.fill(Random(5), 300)
    sink = ClickHouseSink(clickhouse_url)
    client = clickhouse_connect.get_client(dsn=clickhouse_url, autogenerate_session_id=False)
    client.command(create_table_sql(table, dedup_window=1))
    client.close()
    await asyncio.to_thread(sink.ensure_tables, Catalog((table,)))
    intents = IntentLog()
    for log in (idle, busy):
        delivery = delivery_to(sink, intents, rows_max=20)
        owner = delivery.open(log.topic_partition, table)
        async with asyncio.timeout(SECONDS_MAX):
            await submit_all(owner, log, await owner.start(), Random(6))
            await owner.wait_until_delivered(log.next_offset)
        await owner.stop()
        delivery.close()
    assert intents.newest[idle.topic_partition] == OffsetRange(0, 2)
    delivery = delivery_to(sink, intents)
    again = delivery.open(idle.topic_partition, table)
    assert await again.start() == 2
    await again.stop()
    delivery.close()
    sink.close()
    assert stored_offsets(clickhouse_url, table, 0) == idle.deliverable
    assert stored_offsets(clickhouse_url, table, 1) == busy.deliverable
