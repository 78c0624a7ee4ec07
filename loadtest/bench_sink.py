"""`make bench-sink`: what one sink worker does on this machine, on a fresh local stack: Kafka, ClickHouse, the worker.

1. A backlog of JSON events of about 100 bytes is published while the worker is stopped, then drained into ClickHouse.
2. The CPU of one row on its way there, next to `insert()` of clickhouse-connect with rows of Python objects.
3. Events are sent by the clock. Each counts as visible when the first answer of ClickHouse that reflects it is there.

ClickHouse is the embedded engine behind its HTTP interface, as everywhere in the local stack; it shares the machine.
Prints a table, and as its last line one JSON object, which `--output` also writes to a file. A row that is missing or
there twice is an error. Numbers from a busy machine say nothing: the load before the run is part of the result.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

import orjson
from rich.console import Console
from rich.table import Table

from loadtest.machine import machine, machine_in_words
from loadtest.sink_measures import SinkBench

DATA_DIR_DEFAULT = Path(".pintail/bench-sink")


class Target(NamedTuple):
    """What is wanted of a number of the result."""

    words: str
    limit: float
    at_least: bool = False

    def is_met(self, measured: float) -> bool:
        """True within the limit."""
        return measured >= self.limit if self.at_least else measured <= self.limit


TARGETS = {
    "rows_per_second": Target("drained into ClickHouse, rows/s", 300_000, at_least=True),
    "visible_ms_p99": Target("write to visible in ClickHouse, p99 ms", 500),
    "insert_cpu_ratio": Target("CPU of an insert per row, of that of insert() of rows", 1 / 3),
    "active_parts_max": Target("active parts, at most", 100),
}


def main(arguments: list[str] | None = None) -> int:
    """Runs the benchmark; returns the exit status."""
    options = _parse(arguments)
    console = Console(stderr=True, highlight=False)
    result: dict[str, Any] = {
        "machine": machine(),
        "note": options.note,
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    try:
        with SinkBench(
            options.data_dir,
            say=lambda text: console.print(text, markup=False),
            report=lambda name, state, detail: console.print(f"{name} {state} {detail}", style="dim", markup=False),
        ) as bench:
            result["drain"] = bench.drain(options.events)
            result["cpu_us_per_row"] = bench.cpu_per_row(options.insert_events)
            result["freshness"] = bench.freshness(rate=options.rate, seconds=options.seconds)
    finally:
        shutil.rmtree(options.data_dir, ignore_errors=True)
    result["targets"] = judged(result)
    _print(result)
    print(orjson.dumps(result).decode())
    if options.output is not None:
        options.output.parent.mkdir(parents=True, exist_ok=True)
        options.output.write_bytes(orjson.dumps(result, option=orjson.OPT_INDENT_2) + b"\n")
    return 0


def judged(result: dict[str, Any]) -> dict[str, Any]:
    """Every target with what was measured."""
    cpu = result["cpu_us_per_row"]
    measured = {
        "rows_per_second": result["drain"]["rows_per_second"],
        "visible_ms_p99": result["freshness"]["visible_ms"]["p99"],
        "insert_cpu_ratio": round(cpu["pintail_insert"] / cpu["rows_insert"], 3),
        "active_parts_max": result["freshness"]["active_parts"]["max"],
    }
    return {
        name: {"limit": round(target.limit, 3), "measured": measured[name], "met": target.is_met(measured[name])}
        for name, target in TARGETS.items()
    }


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="make bench-sink", description="Measure one sink worker on this machine.")
    add = parser.add_argument
    add("--events", type=int, default=3_000_000, help="of the backlog [%(default)s]")
    add("--insert-events", type=int, default=500_000, help="inserted twice to compare CPU [%(default)s]")
    add("--rate", type=float, default=20_000, help="events per second for freshness [%(default)s]")
    add("--seconds", type=float, default=60, help="how long they are sent [%(default)s]")
    add("--data-dir", type=Path, default=DATA_DIR_DEFAULT, help="a new folder, removed afterwards [%(default)s]")
    add("--output", type=Path, help="also write the result to this file")
    add("--note", default="", help="kept with the result, such as what else the machine was doing")
    options = parser.parse_args(arguments)
    if options.data_dir.exists():
        parser.error(f"{options.data_dir} exists; remove it or choose another folder with --data-dir")
    return options


def _print(result: dict[str, Any]) -> None:
    console = Console(highlight=False, width=None if sys.stdout.isatty() else 160)
    grid = Table("what", "target", "measured", "", box=None, header_style="bold", padding=(0, 3, 0, 0))
    for column in grid.columns[1:3]:
        column.justify = "right"
    for name, each in result["targets"].items():
        sign = ">=" if TARGETS[name].at_least else "<="
        verdict = "met" if each["met"] else "NOT met"
        grid.add_row(TARGETS[name].words, f"{sign} {each['limit']:,}", f"{each['measured']:,}", verdict)
    console.print(grid)
    drain, freshness, cpu = result["drain"], result["freshness"], result["cpu_us_per_row"]
    visible, parts = freshness["visible_ms"], freshness["active_parts"]
    console.print(
        f"\ndrain: {drain['events']:,} rows in {drain['seconds']} s, {drain['inserts']:,} inserts; CPU seconds "
        f"{drain['cpu_seconds']}; worker's peak RSS {drain['worker_peak_rss_mib']:,.0f} MiB"
        f"\nfreshness at {freshness['events_per_second']:,.0f} events/s: p50 {visible['p50']} ms, p99 {visible['p99']} "
        f"ms, max {visible['max']} ms; active parts {parts['last']} at the end; CPU seconds {freshness['cpu_seconds']}"
        f"\nCPU of a row, us: Pintail {cpu['pintail_decode']} decoding + {cpu['pintail_insert']} inserting; "
        f"by hand {cpu['rows_decode']} + {cpu['rows_insert']}",
        soft_wrap=True,
        markup=False,
    )
    console.print(machine_in_words(result["machine"]))


if __name__ == "__main__":
    sys.exit(main())
