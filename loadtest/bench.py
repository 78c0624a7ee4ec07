"""`make bench`: what one store worker does on this machine, next to a loop written by hand, in one run.

On a fresh local stack: a backlog of flights is published while no worker runs, then drained into an append and an
upsert table; queries and writes are timed while nothing else happens. Prints a table, and as its last line one JSON
object, which `--output` also writes to a file. Numbers from different machines, or from a busy one, do not compare:
the load before the run is part of the result.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from loadtest.bench_command import BenchParser, head_of_result, publish_result, report_on, say_on
from loadtest.bench_measures import TABLES, StoreBench
from loadtest.machine import machine_in_words
from loadtest.peers.process import run_peer
from loadtest.peers.store import StoredRows
from schemas.catalog import load_catalog
from schemas.table import TableDefinition
from streams.client import Client
from streams.config import load_settings
from streams.localstack.stack import LocalStack, StackOptions

DATA_DIR_DEFAULT = Path(".pintail/bench")
EVENTS_DEFAULT = 1_000_000


def main(arguments: list[str] | None = None) -> int:
    """Runs the benchmark; returns the exit status."""
    parser = BenchParser("bench", "Measure one store worker on this machine.", data_dir=DATA_DIR_DEFAULT)
    parser.add_argument("--events", type=int, default=EVENTS_DEFAULT, help="size of each backlog [%(default)s]")
    parser.add_argument("--samples", type=int, default=300, help="of each latency [%(default)s]")
    options = parser.parse_bench(arguments)
    console = Console(stderr=True, highlight=False)
    result = head_of_result(options.note)
    try:
        result |= _measure(options, console)
    finally:
        shutil.rmtree(options.data_dir, ignore_errors=True)
    _print(result)
    publish_result(result, options.output)
    return 0


def _measure(options: argparse.Namespace, console: Console) -> dict[str, Any]:
    catalog = load_catalog(TABLES)
    stack = LocalStack(
        options.data_dir,
        StackOptions(
            services=("kafka", "redis"), store_workers=1, worker_environment={"PINTAIL_TABLES_DIR": str(TABLES)}
        ),
        report=report_on(console),
    )
    result: dict[str, Any] = {"events": options.events, "samples": options.samples, "drain": {}}
    with stack:
        os.environ.update(stack.settings_environment())
        bench = StoreBench(stack, catalog, say=say_on(console))
        for table in catalog.tables:
            drained = bench.drain(table, options.events)
            peer = _peer(stack, table, options.events)
            assert peer["rows"] == drained["rows"], f"the peer has {peer['rows']} rows, the worker {drained['rows']}"
            result["drain"][table.name] = {
                "pintail": drained,
                "by_hand": peer,
                "ratio": round(drained["events_per_second"] / peer["events_per_second"], 2),
            }
        bench.start_worker()
        with Client.connect(load_settings()) as client:
            result["query_ms"] = bench.query_latency(client, options.events, options.samples)
            result["write_to_visible_ms"] = bench.write_latency(client, options.samples)
    return result


def _peer(stack: LocalStack, table: TableDefinition, events: int) -> dict[str, float]:
    """Drains the same topic with the hand-written loop, in a process of its own."""
    path = stack.data_dir / f"{table.name}.duckdb"
    drained = run_peer("raw", kafka=stack.addresses["kafka"], tables=TABLES, table=table, path=path, events=events)
    with StoredRows(path, table) as stored:
        rows = stored.row(f"SELECT count(*) FROM {table.name}")[0]
    return {"seconds": round(drained.seconds, 2), "events_per_second": round(drained.rate, 2), "rows": rows}


def _print(result: dict[str, Any]) -> None:
    grid = Table("what", "Pintail", "by hand", "ratio", box=None, header_style="bold", padding=(0, 3, 0, 0))
    for column in grid.columns[1:]:
        column.justify = "right"
    for name, each in result["drain"].items():
        rates = [f"{each[side]['events_per_second']:,.0f} events/s" for side in ("pintail", "by_hand")]
        grid.add_row(f"drain {result['events']:,} events into {name}", *rates, f"{each['ratio']:.1f}")
    for name, words in (
        ("query_ms", "query of one key, round trip over Kafka, idle"),
        ("write_to_visible_ms", "write, acknowledge, ask for it, answered, idle"),
    ):
        each = result[name]
        grid.add_row(words, f"p50 {each['p50']:.1f} ms, p99 {each['p99']:.1f} ms")
    console = Console(highlight=False, width=None if sys.stdout.isatty() else 140)
    console.print(grid)
    console.print(f"\n{machine_in_words(result['machine'])}")


if __name__ == "__main__":
    sys.exit(main())
