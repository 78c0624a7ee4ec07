"""The steps of the demo on a running stack: publish, ask, change, snapshot, kill, restore, compare.

Everything is seen from outside: through Kafka, the query topic, ClickHouse's HTTP interface and the workers' status
pages. Each step keeps or breaks promises in the report; the order matters. Called by loadtest/demo.py.
"""

from __future__ import annotations

import itertools
import shutil
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import orjson

from loadtest.demo_questions import QUESTIONS
from loadtest.demo_report import DemoReport, Promise
from loadtest.fingerprints import Fingerprint, clickhouse_fingerprint_sql, duckdb_fingerprint_sql
from loadtest.flights import ROWS, WriteEvent, write_events
from loadtest.observers import ClickHouse, WorkerPages, dead_letters, wait_until
from loadtest.publisher import Publisher
from schemas.catalog import Catalog
from schemas.dead_letters import DETAIL, OFFSET, REASON
from streams.client import Answer, Client
from streams.localstack.stack import LocalStack

STORE, SINK = "store-0", "sink-0"
#: No wait of the demo is longer.
DEADLINE_SECONDS = 120.0
_DEADLINE_MS = int(DEADLINE_SECONDS * 1000)
#: How many events are published between two looks at the sink.
_SLICE_EVENTS = 5_000

#: A flight that never was; the data set has no UA 9999.
NEW_FLIGHT = {
    "id": "2013-12-31-UA-9999-EWR",
    "year": 2013,
    "month": 12,
    "day": 31,
    "dep_time": None,
    "sched_dep_time": 1800,
    "dep_delay": None,
    "arr_time": None,
    "sched_arr_time": 1900,
    "arr_delay": None,
    "carrier": "UA",
    "flight": 9999,
    "tailnum": None,
    "origin": "EWR",
    "dest": "BOS",
    "air_time": None,
    "distance": 200,
    "hour": 18,
    "minute": 0,
    "time_hour": "2013-12-31T23:00:00Z",
}


class DemoSteps:
    """One run over an empty stack with `flights` of the 336,776 flights."""

    def __init__(
        self, stack: LocalStack, catalog: Catalog, client: Client, report: DemoReport, *, flights: int
    ) -> None:
        assert 2 <= flights <= ROWS["flights"]
        self._stack = stack
        self._catalog = catalog
        self._client = client
        self._report = report
        self._rows = {**ROWS, "flights": flights}
        self._kafka = stack.addresses["kafka"]
        self._publisher = Publisher(self._kafka)
        self._clickhouse = ClickHouse(stack.addresses["clickhouse"])
        self._store = WorkerPages(stack.process(STORE).specification.port)

    def run(self) -> None:
        """All steps. Raises PintailError when one cannot go on."""
        with self._publisher:
            self.publish()
            self.ask()
            self.read_own_writes()
            self.park_poison()
        self.wait_for_snapshots()
        before = self.lose_the_disk()
        self.compare_with_clickhouse(before)

    def publish(self) -> None:
        """Write events; the sink worker dies on the way."""
        report, total = self._report, sum(self._rows.values())
        report.heading(f"Publish {total:,} write events to Kafka: {', '.join(self._rows)}")
        with report.promise("every event is acknowledged by Kafka") as promise:
            started = time.perf_counter()
            with report.progress("publishing", total) as progress:
                self._publish_events(total, progress)
            acknowledged = self._publisher.acknowledged
            promise.check(acknowledged == total, f"{acknowledged:,} of {total:,} acknowledged")
            promise.detail = f"{acknowledged / (time.perf_counter() - started):,.0f} events/s, interruptions included"

    def ask(self) -> None:
        """The five questions, on everything that was published."""
        report = self._report
        report.heading("Ask over the query topic")
        with report.promise("every event can be queried") as promise:
            counts = self._counts()
            for table, rows in self._rows.items():
                promise.check(counts[table] == rows, f"{table} has {counts[table]:,} rows instead of {rows:,}")
            promise.detail = ", ".join(f"{table} {counts[table]:,}" for table in self._rows)
        milliseconds = []
        with report.promise(f"{len(QUESTIONS)} questions in SQL are answered over Kafka") as promise:
            for number, question in enumerate(QUESTIONS, 1):
                answer, taken = self._timed_query(question.sql)
                milliseconds.append(taken)
                report.console.print()
                report.say(f"  {number}. {question.words}")
                report.table(answer.column_names, answer.rows)
                report.say(f"     {taken:.0f} ms round trip; reflects {_offsets_in_words(answer)}")
                promise.check(len(answer) > 0, f"question {number} has no rows")
            report.console.print()
            promise.detail = f"round trips {min(milliseconds):.0f} to {max(milliseconds):.0f} ms"

    def read_own_writes(self) -> None:
        """A flight appears, changes and goes; each question asks for the write before it."""
        report = self._report
        report.heading("Read your writes: a flight appears, changes and goes")
        key = str(NEW_FLIGHT["id"])
        writes: tuple[tuple[str, bytes | None, list[tuple[int | None]]], ...] = (
            ("insert", orjson.dumps(NEW_FLIGHT), [(None,)]),
            ("update", orjson.dumps({**NEW_FLIGHT, "dep_time": 1812, "dep_delay": 12}), [(12,)]),
            ("tombstone", None, []),
        )
        with report.promise("the next question sees each write") as promise:
            milliseconds = []
            for name, value, expected in writes:
                started = time.perf_counter()
                topic, partition, offset = self._publisher.publish_one("flights", key.encode(), value)
                answer = self._client.query(
                    "SELECT dep_delay FROM flights WHERE id = $1",
                    [key],
                    key=key,
                    at_least={topic: {partition: offset}},
                    deadline_ms=_DEADLINE_MS,
                )
                milliseconds.append((time.perf_counter() - started) * 1000)
                found = f"{len(answer)} rows{f', dep_delay {answer.rows[0][0]}' if len(answer) else ''}"
                report.say(f"    {name:<10} {topic}[{partition}] offset {offset:,}: {found}, {milliseconds[-1]:.0f} ms")
                promise.check(list(answer.rows) == expected, f"after the {name}: {list(answer.rows)}")
            promise.detail = f"written, acknowledged, asked and answered in {statistics.median(milliseconds):.0f} ms"

    def park_poison(self) -> None:
        """A record that no table can hold."""
        report = self._report
        report.heading("Publish a record that is no flight")
        flights = self._catalog.by_name("flights")
        poison = orjson.dumps({**NEW_FLIGHT, "distance": "far"})
        with report.promise("a poison record is parked with its reason, and stops nothing") as promise:
            key = str(NEW_FLIGHT["id"]).encode()
            parked = self._publisher.publish_one(flights.topic, key, poison)
            # The tombstone again: what comes after the poison is applied as ever.
            self._publisher.publish_one(flights.topic, key, None)
            letters = dead_letters(self._kafka, flights.dead_letter_topic, seconds=DEADLINE_SECONDS)
            headers = {name: value.decode() for name, value in letters[0].headers() or ()}
            promise.check(len(letters) == 1, f"{len(letters)} dead letters")
            promise.check(letters[0].value() == poison, "the dead letter is not the record")
            promise.check(headers[OFFSET] == str(parked.offset), f"its offset is {headers[OFFSET]}")
            counts = self._counts()
            promise.check(counts["flights"] == self._rows["flights"], f"flights has {counts['flights']:,} rows")
            promise.detail = f"{flights.dead_letter_topic}: {headers[REASON]}, {headers[DETAIL]}"

    def wait_for_snapshots(self) -> None:
        """Until Redis has everything."""
        self._report.heading("Snapshots in Redis: compressed, encrypted, incremental")
        with self._report.promise("every partition has a snapshot that holds every record") as promise:
            wait_until(
                lambda: self._store.snapshots_reflect(self._publisher.last_offsets),
                "snapshots that reflect every record",
                seconds=DEADLINE_SECONDS,
            )
            versions = {number: each["snapshot"]["version"] for number, each in self._store.partitions().items()}
            promise.detail = ", ".join(f"partition {number} version {version}" for number, version in versions.items())

    def lose_the_disk(self) -> dict[str, Fingerprint]:
        """Kills the store worker and deletes its files; returns the fingerprints of before."""
        report = self._report
        report.heading("Kill the store worker (kill -9) and delete its disk")
        before = self._store_fingerprints()
        folder = self._stack.data_dir / "stores" / STORE
        with report.promise("the store worker comes back from Redis with the same content") as promise:
            started = time.perf_counter()
            self._stack.kill(STORE)
            self._stack.stop_process(STORE)
            report.say(f"    killed; deleted {folder} ({_megabytes(folder):.0f} MB)")
            shutil.rmtree(folder)
            self._stack.start_process(STORE)
            serving = time.perf_counter() - started
            recoveries = self._store.recoveries()
            rungs = {rung for rung, _ in recoveries.values()}
            promise.check(rungs == {"snapshot"}, f"recovered from {', '.join(sorted(rungs)) or 'nowhere'}")
            after = self._store_fingerprints()
            _compare(promise, before, after, "before")
            slowest = max((seconds for _, seconds in recoveries.values()), default=0.0)
            promise.detail = (
                f"{len(recoveries)} partitions restored from Redis, the slowest in {slowest:.2f} s; "
                f"serving {serving:.1f} s after the kill, start of the process included"
            )
        self._show_fingerprints("before", before, "after", after)
        return before

    def compare_with_clickhouse(self, store: dict[str, Fingerprint]) -> None:
        """Row for row, through one number per table that both engines compute from their own rows."""
        report = self._report
        report.heading("ClickHouse holds exactly the same rows")
        with report.promise("after its kill -9 the sink delivered every record exactly once") as promise:
            self._stack.wait_until_ready(SINK)
            wait_until(self._all_is_delivered, "every record in ClickHouse", seconds=DEADLINE_SECONDS)
            there = {
                table.name: Fingerprint.of(self._clickhouse.rows(clickhouse_fingerprint_sql(table))[0])
                for table in self._catalog.tables
            }
            _compare(promise, store, there, "the store")
            for table in self._catalog.tables:
                twice = self._clickhouse.records_delivered_twice(table)
                promise.check(twice == 0, f"{twice:,} records of {table.name} are there twice")
            promise.detail = f"{sum(print_.rows for print_ in there.values()):,} rows, equal table by table"
        self._show_fingerprints("DuckDB", store, "ClickHouse", there)

    def _events(self) -> Iterator[WriteEvent]:
        """All small tables, then flights: every n-th of them, so that a selection spans the year."""
        yield from write_events(self._catalog, [table for table in self._rows if table != "flights"])
        every = ROWS["flights"] // self._rows["flights"]
        flights = itertools.islice(write_events(self._catalog, ["flights"]), 0, None, every)
        yield from itertools.islice(flights, self._rows["flights"])

    def _publish_events(self, total: int, progress: Callable[[int], None]) -> None:
        """In slices. The sink worker dies once it has begun, at the latest before the last slice is there."""
        events, sent, sink_has_died, has_asked = self._events(), 0, False, False
        while batch := list(itertools.islice(events, _SLICE_EVENTS)):
            sent += len(batch)
            if not sink_has_died and (self._delivered() or sent == total):
                self._kill_sink_at_work(total)
                sink_has_died = True
            if not has_asked and sent > total * 0.6:
                self._ask_in_between()
                has_asked = True
            self._publisher.publish(batch, progress)
        self._publisher.flush(progress)

    def _ask_in_between(self) -> None:
        with self._report.promise("queries are answered while events pour in") as promise:
            counts = " + ".join(f"(SELECT count(*) FROM {table})" for table in self._rows)
            answer, milliseconds = self._timed_query(f"SELECT {counts}")
            acknowledged = self._publisher.acknowledged
            promise.detail = f"{answer.rows[0][0]:,} of {acknowledged:,} rows visible so far; {milliseconds:.0f} ms"

    def _kill_sink_at_work(self, total: int) -> None:
        with self._report.promise("the sink worker dies (kill -9) in the middle of its work") as promise:
            wait_until(self._delivered, "the first records in ClickHouse", seconds=DEADLINE_SECONDS)
            self._stack.kill(SINK)
            delivered = self._delivered()
            promise.check(delivered < total, "it was done before")
            promise.detail = f"{delivered:,} of {total:,} records were in ClickHouse"

    def _delivered(self) -> int:
        return self._clickhouse.count(self._catalog.tables)

    def _all_is_delivered(self) -> bool:
        last = self._publisher.last_offsets
        return all(self._clickhouse.reflects(table, last[table.topic]) for table in self._catalog.tables)

    def _timed_query(self, sql: str) -> tuple[Answer, float]:
        """An answer, and how many milliseconds it took from here to here."""
        started = time.perf_counter()
        answer = self._client.query(sql, deadline_ms=_DEADLINE_MS)
        return answer, (time.perf_counter() - started) * 1000

    def _counts(self) -> dict[str, int]:
        """Rows per table, once everything that was acknowledged is visible."""
        columns = ", ".join(f"(SELECT count(*) FROM {table}) AS {table}" for table in self._rows)
        answer = self._client.query(
            f"SELECT {columns}", at_least=self._publisher.last_offsets, deadline_ms=_DEADLINE_MS
        )
        return dict(zip(self._rows, answer.rows[0], strict=True))

    def _store_fingerprints(self) -> dict[str, Fingerprint]:
        """By table, computed over the query topic."""
        return {
            table.name: Fingerprint.of(
                self._client.query(
                    duckdb_fingerprint_sql(table), at_least=self._publisher.last_offsets, deadline_ms=_DEADLINE_MS
                ).rows[0]
            )
            for table in self._catalog.tables
        }

    def _show_fingerprints(
        self, left_name: str, left: dict[str, Fingerprint], right_name: str, right: dict[str, Fingerprint]
    ) -> None:
        self._report.table(
            ("table", left_name, right_name),
            [(name, str(print_), str(right[name])) for name, print_ in left.items()],
        )


def _compare(promise: Promise, expected: dict[str, Fingerprint], there: dict[str, Fingerprint], name: str) -> None:
    for table, print_ in expected.items():
        promise.check(there[table] == print_, f"{table}: {there[table]} instead of {print_} of {name}")


def _offsets_in_words(answer: Answer) -> str:
    """Positions per topic, such as flights [83,912 84,311 84,203 84,350]."""
    return ", ".join(
        f"{topic} [{' '.join(f'{offset:,}' for _, offset in sorted(positions.items()))}]"
        for topic, positions in sorted(answer.offsets.items())
    )


def _megabytes(folder: Path) -> float:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) / 1e6
