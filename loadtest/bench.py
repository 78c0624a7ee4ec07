"""`make bench`: what one store worker does on this machine, next to a loop written by hand, in one run.

On a fresh local stack: a backlog of flights is published while no worker runs, then drained into an append and an
upsert table; queries and writes are timed while nothing else happens. Prints a table, and as its last line one JSON
object, which `--output` also writes to a file. Numbers from different machines, or from a busy one, do not compare:
the load before the run is part of the result.
"""

from __future__ import annotations

import argparse
import os
import platform
import shutil
import subprocess
import sys
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import orjson
from rich.console import Console
from rich.table import Table

from loadtest.bench_measures import TABLES, StoreBench
from schemas.catalog import load_catalog
from streams.client import Client
from streams.config import load_settings
from streams.localstack.stack import LocalStack, StackOptions

DATA_DIR_DEFAULT = Path(".pintail/bench")
EVENTS_DEFAULT = 1_000_000
_PACKAGES = ("pintail", "duckdb", "aiokafka", "faust-streaming", "confluent-kafka", "pyarrow")


def main(arguments: list[str] | None = None) -> int:
    """Runs the benchmark; returns the exit status."""
    parser = argparse.ArgumentParser(prog="make bench", description="Measure one store worker on this machine.")
    parser.add_argument("--events", type=int, default=EVENTS_DEFAULT, help="size of each backlog [%(default)s]")
    parser.add_argument("--samples", type=int, default=300, help="of each latency [%(default)s]")
    parser.add_argument("--data-dir", type=Path, default=DATA_DIR_DEFAULT, help="a new folder, removed afterwards")
    parser.add_argument("--output", type=Path, help="also write the result to this file")
    parser.add_argument("--note", default="", help="kept with the result, such as what else the machine was doing")
    options = parser.parse_args(arguments)
    if options.data_dir.exists():
        parser.error(f"{options.data_dir} exists; remove it or choose another folder with --data-dir")
    console = Console(stderr=True, highlight=False)
    result = {"machine": machine(), "note": options.note, "started": datetime.now(UTC).isoformat(timespec="seconds")}
    try:
        result |= _measure(options, console)
    finally:
        shutil.rmtree(options.data_dir, ignore_errors=True)
    _print(result)
    encoded = orjson.dumps(result)
    print(encoded.decode())
    if options.output is not None:
        options.output.parent.mkdir(parents=True, exist_ok=True)
        options.output.write_bytes(orjson.dumps(result, option=orjson.OPT_INDENT_2) + b"\n")
    return 0


def machine() -> dict[str, Any]:
    """What the numbers depend on."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory_gib": round(memory / 2**30, 1),
        "load_before": round(os.getloadavg()[0], 1),
        "system": platform.platform(),
        "python": platform.python_version(),
        **{package: version(package) for package in _PACKAGES},
    }


def _measure(options: argparse.Namespace, console: Console) -> dict[str, Any]:
    catalog = load_catalog(TABLES)
    stack = LocalStack(
        options.data_dir,
        StackOptions(
            services=("kafka", "redis"), store_workers=1, worker_environment={"PINTAIL_TABLES_DIR": str(TABLES)}
        ),
        report=lambda name, state, detail: console.print(f"{name} {state} {detail}", style="dim", markup=False),
    )
    result: dict[str, Any] = {"events": options.events, "samples": options.samples, "drain": {}}
    with stack:
        os.environ.update(stack.settings_environment())
        bench = StoreBench(stack, catalog, say=lambda text: console.print(text, markup=False))
        for table in catalog.tables:
            drained = bench.drain(table, options.events)
            peer = _peer(stack, table.name, options.events)
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


def _peer(stack: LocalStack, table: str, events: int) -> dict[str, float]:
    """Drains the same topic with the hand-written loop, in a process of its own."""
    command = [sys.executable, "-m", "loadtest.bench_peers", "--kafka", stack.addresses["kafka"], "--table", table]
    command += ["--tables", str(TABLES), "--path", str(stack.data_dir / f"{table}.duckdb"), "--events", str(events)]
    output = subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout
    result: dict[str, float] = orjson.loads(output.splitlines()[-1])
    return {name: round(value, 2) for name, value in result.items()}


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
    machine_ = result["machine"]
    console.print(
        f"\n{machine_['cores']} cores, {machine_['memory_gib']} GiB, load {machine_['load_before']} before the run; "
        f"Python {machine_['python']}, DuckDB {machine_['duckdb']}"
    )


if __name__ == "__main__":
    sys.exit(main())
