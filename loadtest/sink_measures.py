"""The measurements of `make bench-sink`, from outside: the log, the worker's status page, ClickHouse over HTTP.

Event n of the live table goes to partition n % 8, which it alone fills, in order: so the record at an offset tells when
it was due, and ClickHouse itself can say whether every record is there once and where it belongs.
"""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import orjson

from loadtest.latencies import percentiles
from loadtest.observers import ClickHouse, ObservationError, WorkerPages, get, wait_until
from loadtest.open_loop import Event, OpenLoopSender, Phase, Schedule
from loadtest.orders import orders, slices, table_sql, tail_of
from loadtest.preload import preload
from loadtest.usage import UsageSampler
from loadtest.visibility import Seen, visible_at
from schemas.errors import PintailError
from streams.localstack.processes import Report
from streams.localstack.stack import LocalStack, StackOptions

SINK = "sink-0"
BACKLOG, LIVE = "backlog", "live"
PARTITIONS = 8
DRAIN_SECONDS_MAX = 600.0
#: Events due before this are sent and checked, but their latencies are not counted.
WARM_UP_SECONDS_MAX = 3.0
CATCH_UP_SECONDS_MAX = 60.0
_PUBLISHERS = 2
_LOOK_SECONDS = 0.03
#: Counting rows costs the embedded engine milliseconds, which the drain lacks then. The last look counts as the end.
_COUNT_SECONDS = 0.1
#: A question costs the embedded engine 10 ms of CPU, which the machine lacks elsewhere; what was delivered just after
#: one counts as visible with the next.
_PROBE_SECONDS = 0.05
_PARTS_EVERY_SECONDS = 1.0
_START_IN_SECONDS = 0.5


class SinkBenchError(PintailError):
    """Rows are missing, doubled or where they do not belong, or a part of the benchmark ended with an error."""


def live_event(number: int) -> Event:
    """Event `number` of the live table."""
    return Event(LIVE, b"%d" % number, b'{"id":%d%b' % (number, tail_of(number)), number % PARTITIONS)


class SinkBench:
    """A broker, a ClickHouse and one sink worker, which runs from `drain` on. A context manager."""

    def __init__(self, folder: Path, *, say: Callable[[str], None], report: Report = lambda *_: None) -> None:
        self._say = say
        self.tables = folder.resolve() / "tables"
        for name in (BACKLOG, LIVE):
            (self.tables / name).mkdir(parents=True)
            definition = table_sql(keyed=False, partitions=PARTITIONS, name=name)
            (self.tables / name / "001_create.sql").write_text(definition)
        options = StackOptions(
            services=("kafka", "clickhouse"),
            sink_workers=1,
            worker_environment={"PINTAIL_TABLES_DIR": str(self.tables)},
        )
        self._stack = LocalStack(folder / "stack", options, report=report)

    def __enter__(self) -> SinkBench:
        self._stack.start()
        self._clickhouse = ClickHouse(self._stack.addresses["clickhouse"])
        self._stack.stop_process(SINK)
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.stop()

    def drain(self, events: int) -> dict[str, Any]:
        """Publishes while the worker is stopped, then times it from its first running partition to the last row."""
        self._say(f"publishing {events:,} events")
        parts = [(orders, (part,)) for part in slices(events, _PUBLISHERS)]
        preload(self._stack.addresses["kafka"], BACKLOG, parts, events)
        self._say("draining")
        process, pages = self._stack.process(SINK), WorkerPages(self._stack.process(SINK).specification.port)
        process.start()

        def begun() -> float:
            try:
                states = {each["state"] for each in pages.partitions().values()}
            except ObservationError:
                return 0.0
            return time.monotonic() if "running" in states else 0.0

        def delivered() -> float:
            return time.monotonic() if self._count(BACKLOG) >= events else 0.0

        with self._usage() as usage:
            started = wait_until(begun, "a delivery that runs", seconds=DRAIN_SECONDS_MAX, every=_LOOK_SECONDS)
            finished = wait_until(delivered, f"{events:,} rows", seconds=DRAIN_SECONDS_MAX, every=_COUNT_SECONDS)
        _, metrics = get(f"http://127.0.0.1:{process.specification.port}", "/metrics")
        seconds = finished - started
        self._check(BACKLOG, events)
        return {
            "events": events,
            "seconds": round(seconds, 2),
            "rows_per_second": round(events / seconds),
            "inserts": _inserts(metrics.decode()),
            **_used(usage, started, finished, events),
        }

    def cpu_per_row(self, events: int) -> dict[str, float]:
        """See loadtest.peers.sink_insert. Raises SinkBenchError."""
        self._say(f"inserting {events:,} rows twice")
        command = [sys.executable, "-m", "loadtest.peers.sink_insert", "--kafka", self._stack.addresses["kafka"]]
        command += ["--clickhouse", self._stack.addresses["clickhouse"], "--tables", str(self.tables)]
        command += ["--table", BACKLOG, "--events", str(events)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise SinkBenchError(f"the inserts failed:\n{done.stderr[-2000:]}", hint="see what it says")
        microseconds: dict[str, float] = orjson.loads(done.stdout.splitlines()[-1])
        return microseconds

    def freshness(self, *, rate: float, seconds: float) -> dict[str, Any]:
        """Sends by the clock and asks ClickHouse all the time what it holds. After `drain`: the worker runs."""
        phases = (Phase(seconds, rate),)
        schedule = Schedule(phases)
        self._say(f"sending {schedule.events:,} events in {seconds:.0f} s")
        sender = OpenLoopSender(self._stack.addresses["kafka"], live_event, phases)
        try:
            with self._usage(sender=sender.pid) as usage:
                started = time.monotonic() + _START_IN_SECONDS
                sender.start(started)
                seen, probe_ms, parts = self._watch(sender, schedule, started)
                finished = time.monotonic()
            sent = sender.result()
        finally:
            sender.stop()
        self._check(LIVE, schedule.events)
        misplaced = self._clickhouse.rows(f"SELECT countIf(id != _offset * {PARTITIONS} + _partition) FROM {LIVE}")
        assert not int(misplaced[0][0]), f"{misplaced} events are not where they were sent"
        warm_up = min(WARM_UP_SECONDS_MAX, seconds / 5)
        latencies = []
        for partition in range(PARTITIONS):
            numbers = range(partition, schedule.events, PARTITIONS)
            for number, at in visible_at(seen, LIVE, partition, enumerate(numbers)):
                due = schedule.due_at(number)
                if due >= warm_up:
                    latencies.append((at - started - due) * 1000)
        return {
            "events_per_second": rate,
            "seconds": seconds,
            "events": schedule.events,
            "visible_ms": percentiles(latencies),
            "probe_ms": percentiles(probe_ms),
            "sender_late_ms_max": round(sent.late_ms_max, 1),
            "active_parts": {"max": max(parts), "last": parts[-1], "every_second": parts},
            **_used(usage, started, finished, schedule.events),
        }

    # -- helpers ---------------------------------------------------------------------------------------------------

    def _watch(
        self, sender: OpenLoopSender, schedule: Schedule, started: float
    ) -> tuple[list[Seen], list[float], list[int]]:
        """What ClickHouse held at which moment, how long the questions took, and the active parts every second."""
        pause_until, parts_at = time.monotonic(), started
        seen: list[Seen] = []
        probe_ms: list[float] = []
        parts: list[int] = [0]
        newest = dict.fromkeys(range(PARTITIONS), 0)
        deadline = started + schedule.seconds + CATCH_UP_SECONDS_MAX
        while time.monotonic() < deadline and not (sender.is_over and sum(newest.values()) >= schedule.events):
            asked = time.monotonic()
            # Only what lies beyond the newest known offset of each partition is read.
            beyond = " OR ".join(f"(_partition = {each} AND _offset >= {low})" for each, low in newest.items())
            rows = self._clickhouse.rows(
                f"SELECT _partition, max(_offset) FROM {LIVE} WHERE {beyond} GROUP BY _partition"
            )
            answered = time.monotonic()
            newest.update({int(partition): int(offset) + 1 for partition, offset in rows})
            seen.append(Seen(answered, {LIVE: dict(newest)}))
            probe_ms.append((answered - asked) * 1000)
            if answered >= parts_at:
                ((active,),) = self._clickhouse.rows(
                    f"SELECT count() FROM system.parts WHERE active AND table = '{LIVE}' AND database = 'default'"
                )
                parts.append(int(active))
                parts_at += _PARTS_EVERY_SECONDS
            pause_until = max(pause_until + _PROBE_SECONDS, time.monotonic())
            time.sleep(max(0.0, pause_until - time.monotonic()))
        return seen, probe_ms, parts

    def _usage(self, **others: int) -> UsageSampler:
        pids = {name: self._stack.process(name).pid for name in (SINK, "clickhouse", "kafka")}
        return UsageSampler({name: pid for name, pid in pids.items() if pid is not None} | others)

    def _count(self, table: str) -> int:
        return int(self._clickhouse.rows(f"SELECT count() FROM {table}")[0][0])

    def _check(self, table: str, events: int) -> None:
        """Every record once. Raises SinkBenchError."""
        ((count, distinct),) = self._clickhouse.rows(f"SELECT count(), uniqExact(_partition, _offset) FROM {table}")
        if not int(count) == int(distinct) == events:
            raise SinkBenchError(
                f"{table} holds {count} rows of {distinct} records instead of {events}", hint="this is a bug: report it"
            )


def _used(usage: UsageSampler, started: float, finished: float, events: int) -> dict[str, Any]:
    cpu = {name: usage.cpu_seconds(name, started, finished) for name in usage.samples}
    return {
        "cpu_seconds": cpu,
        "worker_cpu_us_per_row": round(cpu[SINK] / events * 1e6, 2),
        "worker_peak_rss_mib": usage.peak_rss_mib(SINK),
    }


def _inserts(metrics: str) -> int:
    (count,) = [line.split()[-1] for line in metrics.splitlines() if line.startswith("pintail_delivery_seconds_count")]
    return int(float(count))
