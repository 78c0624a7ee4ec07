"""Everybody who drains the topic of `make bench-ingest`, one after the other, and whether their rows are right.

Each drain reads the same topic from its start as a group of its own, while nobody else works. Rows are compared with
each other by fingerprint (values, partition, offset and timestamp of every row), and Pintail's with what was published.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Self

from loadtest.fingerprints import Fingerprint, duckdb_fingerprint_sql
from loadtest.orders import Slice, Totals, expected_totals, orders, slices, table_sql, totals_sql
from loadtest.peers.process import PeerDrain, quix_python, run_peer
from loadtest.peers.store import StoredRows
from loadtest.preload import preload
from loadtest.store_drain import STORE, StoreDrain, seconds_per_part
from schemas.catalog import load_catalog
from schemas.table import TableDefinition
from streams.client import Client
from streams.config import load_settings
from streams.limits import QUERY_DEADLINE_MS_MAX
from streams.localstack.processes import Report
from streams.localstack.stack import LocalStack, ServiceName, StackOptions

TOPIC = "orders"
_SERVERS: tuple[ServiceName, ...] = ("kafka", "redis")
_PUBLISHERS = 2


class Prefix(NamedTuple):
    """How much of the topic a peer drains at most."""

    events: int
    seconds: float | None = None


class IngestContest:
    """The servers, the topic and the drains. A context manager."""

    def __init__(
        self,
        folder: Path,
        *,
        events: int,
        partitions: int,
        text_ids: bool = False,
        say: Callable[[str], None],
        report: Report = lambda *_: None,
    ) -> None:
        self._folder = folder.resolve()
        self._events = events
        self._text_ids = text_ids
        self._say = say
        self._report = report
        self._exit = ExitStack()
        self._stacks: dict[bool, LocalStack] = {}
        self._tables: dict[bool, Path] = {}
        self._parts: list[Slice] = slices(events, _PUBLISHERS)
        #: By keyed: what a table must hold.
        self._expected: dict[bool, Totals] = {}
        #: Fingerprints and positions of peers, to compare with Pintail's rows: (name, keyed, fingerprint, positions).
        self._prints: list[tuple[str, bool, Fingerprint, dict[int, int]]] = []
        #: What is wrong with somebody's rows.
        self.faults: list[str] = []
        for keyed in (False, True):
            self._tables[keyed] = self._folder / ("upsert-tables" if keyed else "append-tables")
            definition = self._tables[keyed] / TOPIC / "001_create.sql"
            definition.parent.mkdir(parents=True)
            definition.write_text(table_sql(keyed=keyed, text_ids=text_ids, partitions=partitions, name=TOPIC))

    def __enter__(self) -> Self:
        try:
            options = StackOptions(services=_SERVERS)
            self._servers = self._exit.enter_context(LocalStack(self._folder / "servers", options, report=self._report))
            for keyed, tables in self._tables.items():
                self._stacks[keyed] = self._worker_stack(keyed, tables)
        except BaseException:
            self._exit.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._exit.close()

    def publish(self) -> float:
        """Fills the topic, works out what tables must hold then, and says how many seconds the former took.

        Raises PublishingError.
        """
        self._say(f"publishing {self._events:,} events")
        started = time.monotonic()
        preload(self._kafka, TOPIC, [(_events_of, (part, self._text_ids)) for part in self._parts], self._events)
        seconds = time.monotonic() - started
        self._expected[False], self._expected[True] = expected_totals(self._parts)
        return round(seconds, 1)

    def peer(self, name: str, *, keyed: bool, prefix: Prefix, home: Path | None = None) -> dict[str, Any]:
        """Drains with one of loadtest.peers; `home` is where virtual environments are kept. Raises PeerError."""
        kind = "upsert" if keyed else "append"
        self._say(f"draining with {name}, {kind}")
        table, path = self._table(keyed), self._folder / f"{name}-{kind}.duckdb"
        python = {} if home is None else {"python": quix_python(home, say=self._say)}
        drain = run_peer(
            name,
            kafka=self._kafka,
            tables=self._tables[keyed],
            table=table,
            path=path,
            events=min(prefix.events, self._events),
            seconds=prefix.seconds,
            broker_pid=self._broker_pid,
            **python,
        )
        fingerprint, positions = drain.drained.fingerprint, drain.drained.next_offsets
        if fingerprint is None or positions is None:
            with StoredRows(path, table) as stored:
                fingerprint, positions = stored.fingerprint(), stored.next_offsets()
                self._check_totals(f"{name}, {kind}", keyed, positions, Totals.of(stored.row(totals_sql(TOPIC))))
            path.unlink()
        if not keyed or sum(positions.values()) == self._events:
            self._prints.append((f"{name}, {kind}", keyed, fingerprint, positions))
        return _peer_result(drain, rows=fingerprint.rows, complete=drain.events == self._events)

    def pintail(self, *, keyed: bool, growth_part: int | None = None) -> dict[str, Any]:
        """Drains with a store worker, asks it for its rows over the query topic, and compares those of the peers."""
        kind = "upsert" if keyed else "append"
        self._say(f"draining with Pintail, {kind}")
        stack = self._stacks[keyed]
        drain = StoreDrain(stack, TOPIC)
        drain.run(self._events, others={"broker": self._broker_pid})
        stack.wait_until_ready(STORE)
        self._say(f"comparing rows, {kind}")
        os.environ.update(stack.settings_environment() | dict(stack.options.worker_environment))
        with Client.connect(load_settings()) as client:
            totals = Totals.of(client.query(totals_sql(TOPIC), deadline_ms=QUERY_DEADLINE_MS_MAX).rows[0])
            if totals != self._expected[keyed]:
                self.faults.append(f"Pintail, {kind}: {totals} instead of {self._expected[keyed]}")
            for name, peer_keyed, fingerprint, positions in self._prints:
                if peer_keyed == keyed:
                    self._compare(client, name, fingerprint, None if keyed else positions)
        stack.stop_process(STORE)
        usage = drain.usage
        assert usage is not None
        result = {
            "events": self._events,
            "complete": True,
            "seconds": round(drain.seconds, 2),
            "events_per_second": round(self._events / drain.seconds),
            "cpu_seconds": usage.cpu_seconds(STORE, drain.started, drain.finished),
            "broker_cpu_seconds": usage.cpu_seconds("broker", drain.started, drain.finished),
            "peak_rss_mib": usage.peak_rss_mib(STORE),
            "rows": totals.rows,
            "distinct_ids": totals.distinct_ids,
            "amount": str(totals.amount),
        }
        if growth_part:
            result["growth"] = growth(drain.curve, growth_part)
        return result

    # -- helpers ---------------------------------------------------------------------------------------------------

    @property
    def _kafka(self) -> str:
        return self._servers.addresses["kafka"]

    @property
    def _broker_pid(self) -> int:
        pid = self._servers.process("kafka").pid
        assert pid is not None, "the broker runs"
        return pid

    def _table(self, keyed: bool) -> TableDefinition:
        return load_catalog(self._tables[keyed]).by_name(TOPIC)

    def _worker_stack(self, keyed: bool, tables: Path) -> LocalStack:
        """A store worker with a group, tables and a folder of its own, stopped until it is its turn."""
        name = "upsert" if keyed else "append"
        options = StackOptions(
            services=_SERVERS,
            given=self._servers.addresses,
            store_workers=1,
            worker_environment={
                "PINTAIL_APPLICATION": f"bench-{name}",
                "PINTAIL_TABLES_DIR": str(tables),
                # A snapshot of a finished drain would compete with the comparison of its rows.
                "PINTAIL_SNAPSHOT_INTERVAL_SECONDS": "86400",
            },
        )
        stack = self._exit.enter_context(LocalStack(self._folder / name, options, report=self._report))
        stack.stop_process(STORE)
        return stack

    def _check_totals(self, name: str, keyed: bool, positions: dict[int, int], totals: Totals) -> None:
        """A complete drain against what was published; of a prefix only that no record is missing or doubled."""
        applied = sum(positions.values())
        if applied == self._events and totals != self._expected[keyed]:
            self.faults.append(f"{name}: {totals} instead of {self._expected[keyed]}")
        if totals.rows != (totals.distinct_ids if keyed else applied):
            self.faults.append(f"{name}: {totals.rows:,} rows of {applied:,} records, {totals.distinct_ids:,} ids")

    def _compare(self, client: Client, name: str, theirs: Fingerprint, below: dict[int, int] | None) -> None:
        sql = duckdb_fingerprint_sql(self._table(below is None), below=below)
        ours = Fingerprint.of(client.query(sql, deadline_ms=QUERY_DEADLINE_MS_MAX).rows[0])
        if ours != theirs:
            self.faults.append(f"{name} holds {theirs}, Pintail {ours} of the same records")


def growth(curve: list[tuple[float, int]], part: int) -> dict[str, Any]:
    """Events per second of each part of a drain, and how the last part compares with the first."""
    rates = [round(part / seconds) for seconds in seconds_per_part(curve, part)]
    return {
        "events_per_part": part,
        "events_per_second": rates,
        "last_vs_first": round(rates[-1] / rates[0], 2) if rates else None,
    }


def _events_of(part: Slice, text_ids: bool) -> Any:
    """The records of a slice; a function with a name, which another process can import."""
    return orders(part, text_ids=text_ids)


def _peer_result(drain: PeerDrain, *, rows: int, complete: bool) -> dict[str, Any]:
    return {
        "events": drain.events,
        "complete": complete,
        "seconds": round(drain.seconds, 2),
        "events_per_second": round(drain.rate),
        "cpu_seconds": drain.cpu_seconds,
        "broker_cpu_seconds": drain.broker_cpu_seconds,
        "peak_rss_mib": drain.peak_rss_mib,
        "rows": rows,
    }
