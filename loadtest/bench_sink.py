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
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from loadtest.bench_command import BenchParser, head_of_result, publish_result, report_on, say_on
from loadtest.machine import machine_in_words
from loadtest.profiles import Bound
from loadtest.sink_measures import SinkBench

DATA_DIR_DEFAULT = Path(".pintail/bench-sink")


TARGETS = (
    Bound("rows_per_second", 300_000, at_least=True),
    Bound("visible_ms_p99", 500),
    Bound("insert_cpu_ratio", 1 / 3),
    Bound("active_parts_max", 100),
)
_WORDS = {
    "rows_per_second": "drained into ClickHouse, rows/s",
    "visible_ms_p99": "write to visible in ClickHouse, p99 ms",
    "insert_cpu_ratio": "CPU of an insert per row, of that of insert() of rows",
    "active_parts_max": "active parts, at most",
}


def main(arguments: list[str] | None = None) -> int:
    """Runs the benchmark; returns the exit status."""
    options = _parse(arguments)
    console = Console(stderr=True, highlight=False)
    result = head_of_result(options.note)
    try:
        with SinkBench(
            options.data_dir,
            say=say_on(console),
            report=report_on(console),
        ) as bench:
            result["drain"] = bench.drain(options.events)
            result["cpu_us_per_row"] = bench.cpu_per_row(options.insert_events)
            result["freshness"] = bench.freshness(rate=options.rate, seconds=options.seconds)
    finally:
        shutil.rmtree(options.data_dir, ignore_errors=True)
    result["targets"] = judged(result)
    _print(result)
    publish_result(result, options.output)
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
        target.metric: {
            "limit": round(target.limit, 3),
            "measured": measured[target.metric],
            "met": target.is_met(measured[target.metric]),
        }
        for target in TARGETS
    }


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = BenchParser("bench-sink", "Measure one sink worker on this machine.", data_dir=DATA_DIR_DEFAULT)
    add = parser.add_argument
    add("--events", type=int, default=3_000_000, help="of the backlog [%(default)s]")
    add("--insert-events", type=int, default=500_000, help="inserted twice to compare CPU [%(default)s]")
    add("--rate", type=float, default=20_000, help="events per second for freshness [%(default)s]")
    duration = parser.add_mutually_exclusive_group()
    duration.add_argument("--seconds", type=float, default=60, help="how long they are sent [%(default)s]")
    duration.add_argument(
        "--minutes",
        dest="seconds",
        type=_minutes,
        metavar="MINUTES",
        help="the same, to see that active parts are bounded",
    )
    return parser.parse_bench(arguments)


def _minutes(text: str) -> float:
    return 60 * float(text)


def _print(result: dict[str, Any]) -> None:
    console = Console(highlight=False, width=None if sys.stdout.isatty() else 160)
    grid = Table("what", "target", "measured", "", box=None, header_style="bold", padding=(0, 3, 0, 0))
    for column in grid.columns[1:3]:
        column.justify = "right"
    for target, each in zip(TARGETS, result["targets"].values(), strict=True):
        sign = ">=" if target.at_least else "<="
        verdict = "met" if each["met"] else "NOT met"
        grid.add_row(_WORDS[target.metric], f"{sign} {each['limit']:,}", f"{each['measured']:,}", verdict)
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
