"""`make bench-query`: how long answers take over the query topic, on this machine, next to plain Faust's `ask()`.

On a fresh local stack one store worker holds a table of orders. Timed from a client in this process, request to reply
through the broker: a key lookup while nothing else happens, an aggregate over all rows, the same lookup while another
process writes into the same worker, and many clients with a request in flight each. Prints a table, and as its last
line one JSON object, which `--output` also writes to a file. Exit status 1 if a request was lost.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable
from functools import partial
from pathlib import Path
from random import Random
from typing import Any

import orjson
from rich.console import Console
from rich.table import Table

from loadtest.bench_command import BenchParser, head_of_result, publish_result, report_on
from loadtest.latencies import percentiles
from loadtest.machine import machine_in_words
from loadtest.open_loop import Event, OpenLoopSender, Phase
from loadtest.orders import Slice, expected_totals, key_of, order_of, orders, slices, table_sql, value_of
from loadtest.preload import preload
from streams.client import AsyncClient
from streams.config import load_settings
from streams.errors import PintailError
from streams.localstack.stack import LocalStack, StackOptions

DATA_DIR_DEFAULT = Path(".pintail/bench-query")
TABLE = "orders"
LOOKUP = f"SELECT amount, country FROM {TABLE} WHERE id = $1"
AGGREGATE = f"SELECT country, count(*), sum(amount), max(amount) FROM {TABLE} GROUP BY country ORDER BY country"
_WARM_UP = 30
_CATCH_UP_MS = 120_000
#: Partitions that nothing comes to fold their write-ahead logs: what is idle has that behind it.
_SETTLE_SECONDS = 9.0
_FAUST_SECONDS_MAX = 120
_WORDS = {
    "lookup_ms": "key lookup, idle",
    "aggregate_ms": "aggregate over all rows, idle",
    "lookup_under_writes_ms": "key lookup while events are written",
    "many": "key lookups, one in flight per client",
    "aggregates": "aggregates, 8 in flight",
    "faust_ask": "plain Faust, ask()",
}


def main(arguments: list[str] | None = None) -> int:
    """Runs the benchmark; returns the exit status."""
    parser = BenchParser("bench-query", "Measure answers over the query topic.", data_dir=DATA_DIR_DEFAULT)
    parser.add_argument("--rows", type=int, default=1_000_000, help="events in the table's topic [%(default)s]")
    parser.add_argument("--samples", type=int, default=500, help="of each latency [%(default)s]")
    parser.add_argument("--clients", type=int, default=1_000, help="with a request in flight [%(default)s]")
    parser.add_argument("--rate", type=int, default=100_000, help="events per second while asking [%(default)s]")
    parser.add_argument("--seconds", type=float, default=10.0, help="of writing [%(default)s]")
    options = parser.parse_bench(arguments)
    result: dict[str, Any] = {
        **head_of_result(options.note),
        "rows": options.rows,
    }
    try:
        result |= _measure(options, Console(stderr=True, highlight=False))
    finally:
        shutil.rmtree(options.data_dir, ignore_errors=True)
    _print(result)
    publish_result(result, options.output)
    return 1 if result["many"]["lost"] else 0


def _measure(options: argparse.Namespace, console: Console) -> dict[str, Any]:
    tables = options.data_dir.resolve() / "tables"
    (tables / TABLE).mkdir(parents=True)
    (tables / TABLE / "001_create.sql").write_text(table_sql(keyed=True, name=TABLE))
    stack = LocalStack(
        options.data_dir / "stack",
        StackOptions(
            services=("kafka", "redis"), store_workers=1, worker_environment={"PINTAIL_TABLES_DIR": str(tables)}
        ),
        report=report_on(console),
    )
    with stack:
        kafka = stack.addresses["kafka"]
        parts = slices(options.rows, 2)
        console.print(f"publishing {options.rows:,} events")
        preload(kafka, TABLE, [(_events_of, (part,)) for part in parts], options.rows)
        settings = load_settings(data_dir=stack.data_dir, kafka=kafka, tables_dir=tables)
        console.print("asking")
        result = asyncio.run(_ask(QueryBench(settings, options, expected_rows=expected_totals(parts)[1].rows)))
        stack.stop_process("store-0")
        console.print("asking plain Faust")
        return result | {"faust_ask": _faust(kafka, options)}


async def _ask(bench: QueryBench) -> dict[str, Any]:
    async with await AsyncClient.connect(bench.settings) as client:
        await bench.wait_for_rows(client)
        await asyncio.sleep(_SETTLE_SECONDS)
        return {
            "lookup_ms": await bench.latency(partial(bench.lookup, client)),
            "aggregate_ms": await bench.latency(partial(bench.aggregate, client), share=0.2),
            "many": await bench.many(client),
            "aggregates": await bench.aggregates(client),
            "lookup_under_writes_ms": await bench.under_writes(client),
        }


class QueryBench:
    """The measurements, through one client."""

    def __init__(self, settings: Any, options: argparse.Namespace, *, expected_rows: int) -> None:
        self.settings = settings
        self._options = options
        self._expected_rows = expected_rows
        self._rng = Random(1)

    async def wait_for_rows(self, client: AsyncClient) -> None:
        """Until the worker holds what was published."""
        async with asyncio.timeout(_CATCH_UP_MS / 1000):
            rows = -1
            while rows < self._expected_rows:
                await asyncio.sleep(0.2)
                rows = (await client.query(f"SELECT count(*) FROM {TABLE}", deadline_ms=60_000)).rows[0][0]

    async def lookup(self, client: AsyncClient) -> None:
        """One key that is there."""
        number = order_of(self._rng.randrange(self._options.rows // 2 - 10), 0)
        key = key_of(number).decode()
        answer = await client.query(LOOKUP, [number], key=key, deadline_ms=60_000)
        assert len(answer) == 1, f"order {key} is there {len(answer)} times"

    async def aggregate(self, client: AsyncClient) -> None:
        """Over all rows of all partitions."""
        answer = await client.query(AGGREGATE, deadline_ms=60_000)
        assert sum(row[1] for row in answer.rows) >= self._expected_rows

    async def latency(self, ask: Callable[[], Awaitable[None]], *, share: float = 1.0) -> dict[str, float]:
        """Of requests one after the other."""
        taken = []
        for _ in range(_WARM_UP + int(self._options.samples * share)):
            started = time.perf_counter()
            await ask()
            taken.append((time.perf_counter() - started) * 1000)
        return percentiles(taken[_WARM_UP:])

    async def many(self, client: AsyncClient) -> dict[str, Any]:
        """Each of many askers has a request in flight all the time, three in a row."""
        lost = 0
        taken: list[float] = []

        async def asker() -> None:
            nonlocal lost
            for _ in range(3):
                started = time.perf_counter()
                try:
                    await self.lookup(client)
                except PintailError:
                    lost += 1
                taken.append((time.perf_counter() - started) * 1000)

        started = time.perf_counter()
        await asyncio.gather(*(asker() for _ in range(self._options.clients)))
        seconds = time.perf_counter() - started
        return {
            "clients": self._options.clients,
            "lost": lost,
            "lookups_per_second": round(len(taken) / seconds),
            **percentiles(taken),
        }

    async def aggregates(self, client: AsyncClient) -> dict[str, Any]:
        """Throughput of aggregates, eight askers."""
        rounds = max(2, self._options.samples // 50)

        async def asker() -> None:
            for _ in range(rounds):
                await self.aggregate(client)

        started = time.perf_counter()
        await asyncio.gather(*(asker() for _ in range(8)))
        return {"aggregates_per_second": round(8 * rounds / (time.perf_counter() - started), 1)}

    async def under_writes(self, client: AsyncClient) -> dict[str, Any]:
        """Lookups one after the other while another process writes at a fixed rate."""
        options = self._options
        phases = [Phase(options.seconds, options.rate)]
        sender = await asyncio.to_thread(OpenLoopSender, self.settings.kafka, _written, phases)
        taken = []
        try:
            sender.start(time.monotonic() + 0.1)
            while not sender.is_over:
                started = time.perf_counter()
                await self.lookup(client)
                taken.append((time.perf_counter() - started) * 1000)
            sent = await asyncio.to_thread(sender.result)
        finally:
            sender.stop()
        return {
            **percentiles(taken),
            "samples": len(taken),
            "rate": options.rate,
            "late_ms_max": round(sent.late_ms_max),
        }


def _events_of(part: Slice) -> Any:
    return orders(part)


def _written(number: int) -> Event:
    """Changes of orders that are there."""
    order = order_of(number * 7 % 400_000, 0)
    return Event(TABLE, key_of(order), value_of(number, order))


def _faust(kafka: str, options: argparse.Namespace) -> dict[str, Any]:
    command = [sys.executable, "-m", "loadtest.peers.faust_ask", "--kafka", kafka]
    command += ["--folder", str(options.data_dir.resolve() / "faust"), "--samples", str(options.samples)]
    command += ["--in-flight", str(options.clients)]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    ) as asking:
        try:
            said, complaint = asking.communicate(timeout=_FAUST_SECONDS_MAX)
        except subprocess.TimeoutExpired:
            os.killpg(asking.pid, signal.SIGKILL)  # and with it the process that it asks
            return {"failed": f"it did not end within {_FAUST_SECONDS_MAX} s"}
    if asking.returncode:
        return {"failed": complaint[-500:]}
    measured: dict[str, Any] = orjson.loads(said.splitlines()[-1])
    return measured


def _print(result: dict[str, Any]) -> None:
    grid = Table("what", "p50", "p99", "per second", box=None, header_style="bold", padding=(0, 3, 0, 0))
    for name, words in _WORDS.items():
        each = result[name]
        latency = each.get("lookup_ms", each)
        cells = [f"{latency[cut]:.1f} ms" if cut in latency else "" for cut in ("p50", "p99")]
        rates = [value for key, value in each.items() if key.endswith("_per_second")]
        grid.add_row(words, *cells, f"{rates[0]:,}" if rates else "")
    console = Console(highlight=False, width=None if sys.stdout.isatty() else 120)
    console.print(grid)
    console.print(f"\n{result['many']['lost']} requests lost; {machine_in_words(result['machine'])}")


if __name__ == "__main__":
    sys.exit(main())
