"""Nothing is lost and nothing is doubled in ClickHouse, whatever happens on the way (D8, invariants 5 and 7).

Owners of one partition deliver the same log through a faulty network and end at random: killed (nothing is waited
for), stopped, or left behind as zombies that go on. One row ClickHouse refuses for what it holds, and it is looked for
while owners end. A seed replays a run; PINTAIL_CHAOS_SEEDS=100 runs more of them.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from random import Random
from typing import Any

import clickhouse_connect
import pytest

from schemas.catalog import Catalog
from streams.adapters.clickhouse_sink import ClickHouseSink
from streams.adapters.memory_intents import IntentLog
from streams.positions import TopicPartition
from streams.processes import delivery as delivery_module
from streams.processes.delivery import Delivery, DeliveryState, PartitionDelivery
from streams.processes.microbatches import FlushLimits
from tests.clickhouse_proxy import ClickHouseProxy, Fault, FaultKind
from tests.sink_log import MemoryDeadLetters, PartitionLog, append_table, submit_all
from tests.store_samples import DECODER
from tests.zombie_owner import IntentServer, SharedIntents, log_of

SEEDS = range(int(os.environ.get("PINTAIL_CHAOS_SEEDS", "30")))
RECORDS = 400
OWNERS_MAX = 100
#: What ClickHouse refuses in a run: a rule of the table, and the same in Python.
RULE, REFUSED_ID = "id != 207", 207
DRAIN_SECONDS_MAX = 60


@pytest.fixture
def proxy(clickhouse_url: str) -> Iterator[ClickHouseProxy]:
    with ClickHouseProxy(clickhouse_url) as proxy:
        yield proxy


def some_faults(random: Random) -> list[Fault]:
    """What the network does to the inserts of one owner."""
    choices = [
        Fault(FaultKind.DROP_AFTER),
        Fault(FaultKind.CUT_REPLY),
        Fault(FaultKind.DROP_BEFORE),
        Fault(FaultKind.UNAVAILABLE),
        Fault(FaultKind.EXCEPTION, code=252),
        Fault(FaultKind.LATE, seconds=0.05),
        Fault(FaultKind.LATE, seconds=0.4),
        Fault(FaultKind.SLOW, seconds=0.0),
        Fault(FaultKind.SLOW, seconds=0.0),
    ]
    return random.choices(choices, k=random.randint(1, 4))


class Chaos:
    """One run: a log, the group's intents, and the owners so far."""

    def __init__(self, seed: int, proxy: ClickHouseProxy, table_name: str) -> None:
        self.random = Random(seed)
        self.proxy = proxy
        self.table = append_table(table_name)
        self.log = PartitionLog(TopicPartition(self.table.topic, 0))
        self.log.fill(self.random, RECORDS)
        self.intents = IntentLog()
        self.dead_letters = MemoryDeadLetters()
        self.zombies: list[tuple[PartitionDelivery, asyncio.Task[None]]] = []
        self.closing: list[Callable[[], None]] = []

    @property
    def refused(self) -> list[int]:
        """Offsets of the records that ClickHouse refuses."""
        return [
            offset
            for offset, value in zip(self.log.offsets, self.log.values, strict=True)
            if offset in self.log.deliverable and json.loads(value or b"")["id"] == REFUSED_ID
        ]

    async def run(self) -> int:
        """Owners follow one another until one has delivered the whole log; how many it took."""
        for owner in range(1, OWNERS_MAX):
            if await self._own():
                return owner
        raise AssertionError("the log was never delivered")

    async def close(self) -> None:
        for zombie, feeding in self.zombies:
            feeding.cancel()
            await zombie.stop()
        for close in self.closing:
            close()

    async def _own(self) -> bool:
        sink = ClickHouseSink(self.proxy.url)
        limits = FlushLimits(rows_max=self.random.randint(20, 150), bytes_max=1 << 20, age_seconds_max=0.02)
        delivery = Delivery(
            sink=sink,
            intents=self.intents.join(),
            decoder=DECODER,
            dead_letters=self.dead_letters,
            limits=limits,
        )
        self.closing += [delivery.close, sink.close]
        partition = delivery.open(self.log.topic_partition, self.table)
        resume = await partition.start()
        self.proxy.inject(*some_faults(self.random))
        feeding = asyncio.create_task(submit_all(partition, self.log, resume, Random(self.random.random())))
        delivered = asyncio.create_task(partition.wait_until_delivered(self.log.next_offset))
        last_insert = len(self.proxy.inserts) + self.random.randint(1, 12)
        loop, end = asyncio.get_running_loop(), asyncio.Event()
        self.proxy.call_at_insert(last_insert, lambda: loop.call_soon_threadsafe(end.set))
        waiting = asyncio.create_task(end.wait())
        await asyncio.wait({delivered, waiting}, return_when=asyncio.FIRST_COMPLETED)
        waiting.cancel()
        if delivered.done():
            await feeding
            await partition.stop()
            return True
        delivered.cancel()
        if self.random.random() < 0.3:
            self.zombies.append((partition, feeding))
        else:
            feeding.cancel()
            await partition.stop(wait_seconds_max=self.random.choice([0, 0, 5]))
        return False


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.invariant(5, 6, 7, place="checkpoint")
@pytest.mark.invariant(5, 6, 7, place="rebalance")
@pytest.mark.invariant(7, place="outage")
async def test_every_record_is_in_clickhouse_exactly_once(
    seed: int,
    proxy: ClickHouseProxy,
    clickhouse_url: str,
    unique_name: Callable[[str], str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(delivery_module, "BACKOFF_SECONDS_MAX", 0.02)
    chaos = Chaos(seed, proxy, unique_name("chaos"))
    admin = ClickHouseSink(clickhouse_url)
    admin.ensure_tables(Catalog((chaos.table,)))
    reader = clickhouse_connect.get_client(dsn=clickhouse_url, autogenerate_session_id=False)
    reader.command(f"ALTER TABLE {chaos.table.name} ADD CONSTRAINT rule CHECK {RULE}")
    try:
        async with asyncio.timeout(DRAIN_SECONDS_MAX):
            owners = await chaos.run()
        await asyncio.to_thread(proxy.wait_idle)
        offsets = [row[0] for row in reader.query(f"SELECT _offset FROM {chaos.table.name} ORDER BY 1").result_rows]
        refused = chaos.refused
        assert refused, "nothing was refused: the run proves less"
        assert offsets == [offset for offset in chaos.log.deliverable if offset not in refused]
        assert chaos.dead_letters.offsets == refused
        assert reader.query(f"SELECT countIf(value != 7 * id) FROM {chaos.table.name}").result_rows == [(0,)]
        assert owners > 1, "no owner was interrupted: the run proves nothing"
    finally:
        await chaos.close()
        admin.close()
        reader.close()


def serve(server: Any) -> None:
    """Until it is stopped, which it takes for the end of a process."""
    with contextlib.suppress(SystemExit):
        server.serve_forever()


#: What becomes of the insert under which the process is stopped.
UNDER_WAY = [None, Fault(FaultKind.SLOW, seconds=0.3), Fault(FaultKind.DROP_AFTER), Fault(FaultKind.DROP_BEFORE)]
ZOMBIE_RECORDS = 600


@pytest.mark.invariant(5, 7, place="rebalance")
@pytest.mark.parametrize("seed", range(len(UNDER_WAY)))
async def test_a_process_that_was_stopped_in_an_insert_changes_nothing_when_it_goes_on(
    seed: int, proxy: ClickHouseProxy, clickhouse_url: str, unique_name: Callable[[str], str]
) -> None:
    """A zombie as they are: SIGSTOP, another owner takes over, SIGCONT while that one delivers."""
    name = unique_name("zombie")
    log, intents, random = log_of(name, seed, ZOMBIE_RECORDS), IntentLog(), Random(seed)
    sink = ClickHouseSink(proxy.url)
    await asyncio.to_thread(sink.ensure_tables, Catalog((append_table(name),)))
    shared = SharedIntents(intents.join())
    IntentServer.register("intents", callable=lambda: shared)
    server = IntentServer(("127.0.0.1", 0), authkey=name.encode()).get_server()
    threading.Thread(target=serve, args=(server,), daemon=True).start()
    port = str(server.listener.address[1])  # type: ignore[attr-defined]
    command = [sys.executable, "-m", "tests.zombie_owner", proxy.url, port, name, str(seed)]
    command.append(str(ZOMBIE_RECORDS))
    zombie = await asyncio.to_thread(subprocess.Popen, command, stdout=subprocess.PIPE, text=True)
    try:
        stopped = threading.Event()

        def stop() -> None:
            zombie.send_signal(signal.SIGSTOP)
            stopped.set()

        stop_at = random.randint(2, 5)
        proxy.inject(*[Fault(FaultKind.SLOW)] * (stop_at - 1), *[fault for fault in [UNDER_WAY[seed]] if fault])
        proxy.call_at_insert(stop_at, stop)
        assert await asyncio.to_thread(stopped.wait, DRAIN_SECONDS_MAX)
        delivery = Delivery(
            sink=sink,
            intents=intents.join(),
            decoder=DECODER,
            dead_letters=MemoryDeadLetters(),
            limits=FlushLimits(rows_max=50, bytes_max=1 << 20, age_seconds_max=0.02),
        )
        owner = delivery.open(log.topic_partition, append_table(name))
        proxy.call_at_insert(len(proxy.inserts) + 3, lambda: zombie.send_signal(signal.SIGCONT))
        async with asyncio.timeout(DRAIN_SECONDS_MAX):
            await submit_all(owner, log, await owner.start(), random)
            await owner.wait_until_delivered(log.next_offset)
        said, _ = await asyncio.to_thread(zombie.communicate, timeout=DRAIN_SECONDS_MAX)
        await owner.stop()
        delivery.close()
        await asyncio.to_thread(proxy.wait_idle)
    finally:
        zombie.kill()
        zombie.wait()
        sink.close()
        server.stop_event.set()  # type: ignore[attr-defined]
        server.listener.close()  # type: ignore[attr-defined]
    assert json.loads(said) == DeliveryState.FENCED
    reader = clickhouse_connect.get_client(dsn=clickhouse_url, autogenerate_session_id=False)
    offsets = [row[0] for row in reader.query(f"SELECT _offset FROM {name} ORDER BY 1").result_rows]
    reader.close()
    assert offsets == log.deliverable
