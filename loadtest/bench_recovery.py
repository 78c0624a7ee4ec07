"""`make bench-recovery`: how fast a store worker with a lot of state comes back, and what its snapshots cost.

On a fresh local stack with one store worker, rows that hardly compress go into an upsert table of 4 partitions,
as many as make about 1 GB of files (a row takes 450 to 650 bytes there). Then, in this order:

    idle       writes one after the other, each timed until a query reflects it, while no snapshot is taken
    local      kill -9 -> SERVING again from the local files
    full       the first snapshot of all partitions: bytes sent to Redis
    busy       the same writes as in `idle` while snapshots are taken without a pause
    changed    1% of the rows, chosen at random, are written again, then one more snapshot: bytes sent
    redis      the worker's disk is emptied -> SERVING again from Redis
    standby    a second worker keeps warm copies and owns half of the partitions; kill -9 of the first, for good -> the
               second one answers over all partitions, from when it lets its own go for the rebalance

After each recovery the table is counted. Prints a table, and as its last line one JSON object, which `--output` also
writes to a file. Exit status 1 if rows are missing or a rung was another one than expected; with `--strict` also if a
target is missed. Times include starting Python and joining the group.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import time
from base64 import b64encode
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any

from rich.console import Console
from rich.table import Table

from loadtest.bench_command import BenchParser, head_of_result, publish_result, say_on
from loadtest.latencies import percentiles
from loadtest.machine import machine_in_words
from loadtest.observers import ObservationError, WorkerPages, wait_until
from loadtest.preload import Records, high_watermarks, preload
from loadtest.publisher import Publisher
from loadtest.store_drain import STORE, StoreDrain
from streams.client import Client
from streams.localstack.stack import LocalStack, StackOptions

DATA_DIR_DEFAULT = Path(".pintail/bench-recovery")
TABLE = "states"
PARTITIONS = 4
TABLE_SQL = f"""CREATE TABLE {TABLE} (
    id      BIGINT PRIMARY KEY,
    version INTEGER NOT NULL,
    payload VARCHAR NOT NULL
) WITH (topic='{TABLE}', partitions={PARTITIONS});
"""
#: Random bytes of a payload; as base64 they take a third more, of which DuckDB takes little away.
_PAYLOAD_BYTES = 330
#: What one row takes in a file, about; the result has the true sizes.
_ROW_BYTES = 530
_GROUP_SECONDS_MAX = 300.0
_LOOK_SECONDS = 0.02
#: As often as a worker looks for what is due.
WITHOUT_SNAPSHOTS = {"PINTAIL_SNAPSHOT_INTERVAL_SECONDS": "1000000", "PINTAIL_SNAPSHOT_AFTER_BYTES": str(2**50)}
WITH_SNAPSHOTS = {"PINTAIL_SNAPSHOT_INTERVAL_SECONDS": "0.2"}
#: Measurement -> its largest good value.
TARGETS = {
    "local_seconds": 3.0,
    "redis_seconds": 10.0,
    "standby_seconds": 2.0,
    "changed_bytes_ratio": 0.1,
    "busy_p99_ratio": 2.0,
}
_WORDS = {
    "local_seconds": "kill -9 -> SERVING from the local file, s",
    "redis_seconds": "empty disk -> SERVING from Redis, s",
    "standby_seconds": "the group notices kill -9 -> the standby answers, s",
    "changed_bytes_ratio": "bytes of a snapshot of 1% changed rows, of a full one",
    "busy_p99_ratio": "p99 write -> visible while snapshots are taken, times idle",
}


def main(arguments: list[str] | None = None) -> int:
    """Runs the benchmark; returns the exit status."""
    options = _parse(arguments)
    console = Console(stderr=True, highlight=False)
    result: dict[str, Any] = {
        **head_of_result(options.note),
        "rows": options.rows,
    }
    try:
        result |= _measure(options, say_on(console))
    finally:
        shutil.rmtree(options.data_dir, ignore_errors=True)
    result["targets_met"] = {name: result[name] <= target for name, target in TARGETS.items()}
    _print(result)
    publish_result(result, options.output)
    is_missed = options.strict and False in result["targets_met"].values()
    return 1 if result["faults"] or is_missed else 0


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = BenchParser("bench-recovery", "Measure recovery and snapshots.", data_dir=DATA_DIR_DEFAULT)
    add = parser.add_argument
    add("--gigabytes", type=float, default=1.0, help="of state, all partitions together [%(default)s]")
    add("--rows", type=int, help="so many rows instead")
    add("--samples", type=int, default=500, help="of each latency [%(default)s]")
    add("--strict", action="store_true", help="exit status 1 if a target is missed")
    options = parser.parse_bench(arguments)
    options.rows = options.rows or int(options.gigabytes * 10**9 / _ROW_BYTES)
    return options


def _measure(options: argparse.Namespace, say: Callable[[str], None]) -> dict[str, Any]:
    tables = options.data_dir.resolve() / "tables"
    (tables / TABLE).mkdir(parents=True)
    (tables / TABLE / "001_create.sql").write_text(TABLE_SQL)
    stack_options = StackOptions(
        services=("kafka", "redis"),
        store_workers=1,
        worker_environment={"PINTAIL_TABLES_DIR": str(tables), "PINTAIL_STANDBY": "1"},
    )
    with LocalStack(options.data_dir / "stack", stack_options) as stack:
        os.environ.update(stack.settings_environment() | {"PINTAIL_TABLES_DIR": str(tables)})
        bench = RecoveryBench(stack, rows=options.rows, say=say)
        bench.fill()
        idle = bench.write_latency(options.samples)
        local = bench.killed()
        full_bytes = bench.full_snapshot()
        busy = bench.write_latency(options.samples)
        changed_bytes = bench.snapshot_of_changes(max(1, options.rows // 100))
        redis = bench.disk_lost()
        standby = bench.owner_lost()
        return {
            "state_bytes": bench.state_bytes,
            "faults": bench.faults,
            "local_seconds": local["seconds"],
            "redis_seconds": redis["seconds"],
            "standby_seconds": standby["answered_seconds"],
            "changed_bytes_ratio": round(changed_bytes / full_bytes, 4),
            "busy_p99_ratio": round(busy["p99"] / idle["p99"], 2),
            "local": local,
            "redis": redis,
            "standby": standby,
            "full_snapshot_bytes": full_bytes,
            "changed_snapshot_bytes": changed_bytes,
            "write_to_visible_ms": {"idle": idle, "busy": busy},
        }


class RecoveryBench:
    """The steps, each from outside: the log, the worker's process and its status pages, the query topic."""

    def __init__(self, stack: LocalStack, *, rows: int, say: Callable[[str], None]) -> None:
        #: What was wrong: rows that are missing, rungs that were not expected.
        self.faults: list[str] = []
        #: Of the files of all stores, once the first snapshot has checkpointed them.
        self.state_bytes = 0
        self._stack = stack
        self._rows = rows
        self._say = say
        self._process = stack.process(STORE)
        self._pages = WorkerPages(self._process.specification.port)
        self._stores = stack.data_dir / "stores" / STORE
        self._random = Random(1)

    def fill(self) -> None:
        """Every row once, by a worker that takes no snapshots."""
        self._stack.stop_process(STORE)
        self._say(f"publishing {self._rows:,} rows")
        half = -(-self._rows // 2)
        parts = [(low, min(low + half, self._rows), 0) for low in range(0, self._rows, half)]
        preload(self._stack.addresses["kafka"], TABLE, [(_states, part) for part in parts], self._rows)
        self._say("applying them")
        self._set(WITHOUT_SNAPSHOTS)
        StoreDrain(self._stack, TABLE).run(self._rows)
        self._stack.wait_until_ready(STORE)

    def write_latency(self, samples: int) -> dict[str, float]:
        """Milliseconds from before a row is written to the answer that reflects it, of rows all over the table."""
        taken = []
        with Client.connect() as client, Publisher(self._stack.addresses["kafka"], linger_ms=0) as publisher:
            for number in range(samples):
                row = self._random.randrange(self._rows)
                key, value = _state(row, number, self._random)
                started = time.perf_counter()
                written = publisher.publish_one(TABLE, key, value)
                client.query(
                    f"SELECT version FROM {TABLE} WHERE id = $1",
                    [row],
                    key=key.decode(),
                    at_least={TABLE: {written.partition: written.offset}},
                    deadline_ms=60_000,
                )
                taken.append((time.perf_counter() - started) * 1000)
        return percentiles(taken)

    def killed(self) -> dict[str, Any]:
        """From kill -9 of the worker until it serves every partition again."""
        self._say("kill -9")
        self._set(WITH_SNAPSHOTS)
        on_disk = {"file_bytes": self._bytes_of("*.duckdb"), "wal_bytes": self._bytes_of("*.duckdb.wal")}
        started = time.monotonic()
        self._stack.kill(STORE)
        return {**self._served_again(started, "local_file"), **on_disk}

    def full_snapshot(self) -> float:
        """Bytes sent to Redis until a first snapshot holds everything."""
        self._say("a snapshot of everything")
        self._wait_for_snapshots()
        self.state_bytes = self._bytes_of("*.duckdb")
        return self._pages.total("pintail_snapshot_bytes_sent_total")

    def snapshot_of_changes(self, rows: int) -> float:
        """Bytes sent by the snapshot that follows changes of so many rows, all of them applied before it is taken."""
        self._say(f"a snapshot after {rows:,} changed rows")
        self._wait_for_snapshots()
        self._stack.stop_process(STORE)
        preload(self._stack.addresses["kafka"], TABLE, [(_changes, (self._rows, rows))], rows)
        self._stack.start_process(STORE)
        self._wait_for_snapshots()
        return self._pages.total("pintail_snapshot_bytes_sent_total")

    def disk_lost(self) -> dict[str, Any]:
        """From the start of a worker with an empty disk until it serves every partition."""
        self._say("the disk is lost")
        self._stack.stop_process(STORE)
        shutil.rmtree(self._stores)
        started = time.monotonic()
        self._process.start()
        return self._served_again(started, "snapshot")

    def owner_lost(self) -> dict[str, Any]:
        """From when the standby's worker lets its own partitions go until it has answered over all of them."""
        self._say("a second worker makes warm copies")
        standby = WorkerPages(self._stack.add_worker("store", 1).specification.port)
        wait_until(lambda: _is_settled(self._pages) and _is_settled(standby), "warm copies", seconds=_GROUP_SECONDS_MAX)
        self._say("kill -9, for good")
        killed = time.monotonic()
        self._stack.kill(STORE)
        self._process.stop()
        wait_until(lambda: _serving(standby) == 0, "the group notices", seconds=_GROUP_SECONDS_MAX, every=_LOOK_SECONDS)
        noticed = time.monotonic()
        self._pages = standby
        return {**self._served_again(noticed, "warm"), "noticed_seconds": round(noticed - killed, 2)}

    def _served_again(self, started: float, rung: str) -> dict[str, Any]:
        wait_until(
            lambda: _serving(self._pages) == PARTITIONS,
            "the worker serves",
            seconds=_GROUP_SECONDS_MAX,
            every=_LOOK_SECONDS,
        )
        seconds = time.monotonic() - started
        with Client.connect() as client:
            (count,) = client.query(f"SELECT count(*) FROM {TABLE}", deadline_ms=60_000).rows[0]
        answered_seconds = time.monotonic() - started
        if count != self._rows:
            self.faults.append(f"{count:,} rows instead of {self._rows:,} after recovery from {rung}")
        recoveries = [each["recovered"] for each in self._pages.partitions().values()]
        if others := {each["rung"] for each in recoveries} - {rung}:
            self.faults.append(f"recovered from {', '.join(sorted(others))} instead of {rung}")
        return {
            "seconds": round(seconds, 2),
            "answered_seconds": round(answered_seconds, 2),
            "slowest_partition_seconds": max((each["seconds"] for each in recoveries), default=0.0),
            "rung": rung,
        }

    def _wait_for_snapshots(self) -> None:
        last = {p: mark - 1 for p, mark in high_watermarks(self._stack.addresses["kafka"], TABLE).items() if mark}
        wait_until(
            lambda: self._pages.snapshots_reflect({TABLE: last}), "snapshots of everything", seconds=_GROUP_SECONDS_MAX
        )

    def _bytes_of(self, files: str) -> int:
        return sum(file.stat().st_size for file in self._stores.glob(files))

    def _set(self, environment: Mapping[str, str]) -> None:
        """For the next incarnation of the worker."""
        before = self._process.specification
        self._process.specification = replace(before, environment={**before.environment, **environment})


def _serving(pages: WorkerPages) -> int:
    """How many partitions the worker serves; 0 if it does not say."""
    try:
        return sum(each["state"] == "serving" for each in pages.partitions().values())
    except ObservationError:
        return 0


def _is_settled(pages: WorkerPages) -> bool:
    """True once the worker serves half of the partitions and its copies of the others are level with the log."""
    try:
        lags = [each["lag"] for each in pages.standbys().values()]
    except ObservationError:
        return False
    return _serving(pages) == PARTITIONS // 2 and lags == [0] * (PARTITIONS // 2)


def _state(row: int, version: int, random: Random) -> tuple[bytes, bytes]:
    payload = b64encode(random.randbytes(_PAYLOAD_BYTES))
    return b"%d" % row, b'{"id":%d,"version":%d,"payload":"%b"}' % (row, version, payload)


def _states(low: int, high: int, version: int) -> Records:
    random = Random(low)
    return (_state(row, version, random) for row in range(low, high))


def _changes(rows: int, count: int) -> Iterator[tuple[bytes, bytes]]:
    random = Random(rows)
    return (_state(row, 1_000_000, random) for row in random.sample(range(rows), count))


def _print(result: dict[str, Any]) -> None:
    console = Console(highlight=False, width=None if sys.stdout.isatty() else 140)
    grid = Table("what", "measured", "target", "met", box=None, header_style="bold", padding=(0, 3, 0, 0))
    for column in grid.columns[1:]:
        column.justify = "right"
    for name, target in TARGETS.items():
        measured, is_met = result[name], result["targets_met"][name]
        grid.add_row(_WORDS[name], f"{measured:.2f}", f"{target:g}", "yes" if is_met else "NO")
    console.print(grid)
    console.print(f"\n{result['rows']:,} rows, {result['state_bytes'] / 1e9:.2f} GB of store files")
    for fault in result["faults"]:
        console.print(f"WRONG: {fault}", markup=False, style="red")
    console.print(machine_in_words(result["machine"]))


if __name__ == "__main__":
    sys.exit(main())
