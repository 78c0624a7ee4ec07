"""`make bench-ingest`: one topic, drained in turn by Pintail and by everything it is measured against, in one run.

On a fresh local stack narrow JSON events are published to one topic (LZ4), which then is drained by: the in-process
ceiling, a hand-written loop, plain Faust, Quix Streams and Pintail, into append tables, and the same without Quix into
upsert tables. Every table is checked: row counts, distinct ids, a sum, and a fingerprint of all rows against Pintail's.
Slow peers drain a prefix of the topic, and their rate is that of the prefix; the result says so.

Prints a table, and as its last line one JSON object, which `--output` also writes to a file. `--growth` drains with
Pintail alone and shows the rate of every million events. Exit status 1 if anybody's rows are wrong.
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
from loadtest.ingest_contest import IngestContest, Prefix
from loadtest.machine import machine_in_words

DATA_DIR_DEFAULT = Path(".pintail/bench-ingest")
ENVIRONMENTS_DIR = Path(".pintail/peers")
EVENTS_DEFAULT = 2_000_000
GROWTH_EVENTS_DEFAULT = 20_000_000
GROWTH_PART = 1_000_000
#: More would not fit into memory as Python objects; the ceiling's rate does not depend on it.
CEILING_EVENTS_MAX = 4_000_000
PEERS = ("ceiling", "raw", "plain_faust", "quix")
_WORDS = {
    "ceiling": "in-process ceiling: decoder and store only",
    "raw": "aiokafka loop, DuckDB, by hand",
    "plain_faust": "plain Faust, take, DuckDB",
    "quix": "Quix Streams, BatchingSink, DuckDB",
    "pintail": "Pintail",
}


def main(arguments: list[str] | None = None) -> int:
    """Runs the benchmark; returns the exit status."""
    options = _parse(arguments)
    console = Console(stderr=True, highlight=False)
    result: dict[str, Any] = {
        **head_of_result(options.note),
        "events": options.events,
        "partitions": options.partitions,
        "keys": "text" if options.text_keys else "integer",
        "compression": "lz4",
    }
    try:
        with IngestContest(
            options.data_dir,
            events=options.events,
            partitions=options.partitions,
            text_ids=options.text_keys,
            say=say_on(console),
            report=report_on(console),
        ) as contest:
            result["publishing_seconds"] = contest.publish()
            result["drains"] = _growth(contest, options) if options.growth else _contest(contest, options)
            result["faults"] = contest.faults
    finally:
        shutil.rmtree(options.data_dir, ignore_errors=True)
    result |= ratios(result["drains"])
    _print(result)
    publish_result(result, options.output)
    return 1 if result["faults"] else 0


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = BenchParser("bench-ingest", "Drain one topic with Pintail and its peers.", data_dir=DATA_DIR_DEFAULT)
    add = parser.add_argument
    add("--events", type=int, help=f"in the topic [{EVENTS_DEFAULT:,}; with --growth {GROWTH_EVENTS_DEFAULT:,}]")
    add("--partitions", type=int, default=8, help="of the topic [%(default)s]")
    add("--text-keys", action="store_true", help="ids are texts, not integers")
    add("--growth", action="store_true", help="Pintail alone, with the rate of every million events")
    add("--without", choices=PEERS, nargs="*", default=[], help="leave these out")
    add("--peer-events", type=int, default=200_000, help="Faust and Quix drain so many at most [%(default)s]")
    add("--peer-seconds", type=float, default=60.0, help="peers drain for so long at most [%(default)s]")
    options = parser.parse_bench(arguments)
    options.events = options.events or (GROWTH_EVENTS_DEFAULT if options.growth else EVENTS_DEFAULT)
    return options


def _contest(contest: IngestContest, options: argparse.Namespace) -> dict[str, Any]:
    """Everybody; the ceiling comes first, because reading its events also warms the broker up for the others."""
    prefixes = {
        "ceiling": Prefix(CEILING_EVENTS_MAX),
        "raw": Prefix(options.events, options.peer_seconds),
        "plain_faust": Prefix(options.peer_events, options.peer_seconds),
        "quix": Prefix(options.peer_events, options.peer_seconds),
    }
    drains = {}
    for kind, keyed in (("append", False), ("upsert", True)):
        for name, prefix in prefixes.items():
            if name not in options.without and not (keyed and name == "quix"):
                home = ENVIRONMENTS_DIR if name == "quix" else None
                drains[f"{name}_{kind}"] = contest.peer(name, keyed=keyed, prefix=prefix, home=home)
        drains[f"pintail_{kind}"] = contest.pintail(keyed=keyed)
    return drains


def _growth(contest: IngestContest, options: argparse.Namespace) -> dict[str, Any]:
    part = GROWTH_PART if options.events >= 2 * GROWTH_PART else max(1, options.events // 4)
    return {
        "pintail_append": contest.pintail(keyed=False, growth_part=part),
        "pintail_upsert": contest.pintail(keyed=True, growth_part=part),
    }


def ratios(drains: dict[str, Any]) -> dict[str, float]:
    """How many times as fast as each peer Pintail is, for peers that took part."""
    found = {}
    for kind, prefix in (("append", "vs_"), ("upsert", "upsert_vs_")):
        for name in PEERS:
            if f"{name}_{kind}" in drains:
                rates = [drains[f"{who}_{kind}"]["events_per_second"] for who in ("pintail", name)]
                found[prefix + name] = round(rates[0] / rates[1], 2)
    return found


def _print(result: dict[str, Any]) -> None:
    console = Console(highlight=False, width=None if sys.stdout.isatty() else 160)
    columns = ("drain", "events", "events/s", "seconds", "CPU s", "us CPU/event", "broker CPU s", "peak RSS MiB")
    grid = Table(*columns, "Pintail is", box=None, header_style="bold", padding=(0, 2, 0, 0))
    for column in grid.columns[1:]:
        column.justify = "right"
    for key, each in result["drains"].items():
        name, _, kind = key.rpartition("_")
        ratio = result.get(f"{'upsert_' if kind == 'upsert' else ''}vs_{name}")
        grid.add_row(
            f"{kind}: {_WORDS[name]}",
            f"{each['events']:,}{'' if each['complete'] else ' (prefix)'}",
            f"{each['events_per_second']:,}",
            f"{each['seconds']:.2f}",
            f"{each['cpu_seconds']:.2f}",
            f"{each['cpu_seconds'] / each['events'] * 1e6:.2f}",
            f"{each['broker_cpu_seconds']:.2f}",
            f"{each['peak_rss_mib']:,.0f}",
            "" if ratio is None else f"{ratio:.2f} x",
        )
    console.print(grid)
    for key, each in result["drains"].items():
        if "growth" in each:
            rates = " ".join(f"{rate:,}" for rate in each["growth"]["events_per_second"])
            part = each["growth"]["events_per_part"]
            console.print(
                f"\n{key}: events/s of every {part:,} events, in order (last/first "
                f"{each['growth']['last_vs_first']}):\n{rates}",
                soft_wrap=True,
            )
    for fault in result["faults"]:
        console.print(f"WRONG: {fault}", markup=False, style="red")
    if not result["faults"]:
        console.print("\nEvery table holds exactly the rows it must.")
    console.print(machine_in_words(result["machine"]))


if __name__ == "__main__":
    sys.exit(main())
