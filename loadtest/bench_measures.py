"""The measurements of `make bench`, each from outside: the log, the worker's status page, the query topic."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from loadtest.flights import ROWS, WriteEvent, write_events
from loadtest.latencies import percentiles
from loadtest.publisher import Publisher
from loadtest.store_drain import STORE, StoreDrain
from schemas.catalog import Catalog, load_catalog
from schemas.table import TableDefinition
from streams.client import Client
from streams.config import PACKAGED_TABLES
from streams.localstack.stack import LocalStack

#: Folder of the two tables: the flights appended, and the flights upserted.
TABLES = Path(__file__).resolve().parent / "tables"
_WARM_UP = 30


def flights_for(table: TableDefinition, events: int) -> Iterator[WriteEvent]:
    """So many flights for a benchmark table: the real ones again and again, under new ids from the second time on."""
    for copy in range(-(-events // ROWS["flights"])):
        prefix = b"%d-" % copy if copy else b""
        flights = write_events(load_catalog(PACKAGED_TABLES), ["flights"])
        for event in itertools.islice(flights, events - copy * ROWS["flights"]):
            yield WriteEvent(table.topic, prefix + event.key, event.value.replace(b'"id":"', b'"id":"' + prefix, 1))


class StoreBench:
    """Measures the one store worker of a stack."""

    def __init__(self, stack: LocalStack, catalog: Catalog, *, say: Callable[[str], None]) -> None:
        self._stack = stack
        self._catalog = catalog
        self._say = say

    def start_worker(self) -> None:
        """Returns when it serves."""
        self._stack.start_process(STORE)

    def drain(self, table: TableDefinition, events: int) -> dict[str, Any]:
        """Publishes while no worker runs, then times one from its first sight of the log to the last row visible.

        The worker is stopped again at the end, so that what follows has the machine for itself.
        """
        self._stack.stop_process(STORE)
        self._say(f"publishing {events:,} events to {table.topic}")
        with Publisher(self._stack.addresses["kafka"]) as publisher:
            started = time.perf_counter()
            publisher.publish(flights_for(table, events))
            publisher.flush()
            publishing_seconds = time.perf_counter() - started
        self._say(f"draining {table.topic}")
        drain = StoreDrain(self._stack, table.topic)
        drain.run(events)
        self._stack.wait_until_ready(STORE)
        with Client.connect() as client:
            rows = client.query(f"SELECT count(*) FROM {table.name}", deadline_ms=60_000).rows[0][0]
        self._stack.stop_process(STORE)
        return {
            "events_per_second": round(events / drain.seconds),
            "seconds": round(drain.seconds, 2),
            "seconds_since_process_start": round(drain.finished - drain.process_started, 2),
            "published_per_second": round(events / publishing_seconds),
            "rows": rows,
        }

    def query_latency(self, client: Client, events: int, samples: int) -> dict[str, float]:
        """Round trips of a key lookup, one after the other, for flights all over what was drained."""
        table = next(table for table in self._catalog.tables if table.is_keyed)
        sql = f"SELECT dep_delay, arr_delay FROM {table.name} WHERE id = $1"
        ids = [event.key.decode() for event in itertools.islice(flights_for(table, events), 0, None, 997)]
        taken = []
        for key in itertools.islice(itertools.cycle(ids), _WARM_UP + samples):
            started = time.perf_counter()
            answer = client.query(sql, [key], key=key)
            taken.append((time.perf_counter() - started) * 1000)
            assert len(answer) == 1, f"{key} is there {len(answer)} times"
        return percentiles(taken[_WARM_UP:])

    def write_latency(self, client: Client, samples: int) -> dict[str, float]:
        """From before a flight is written, through its acknowledgement, to the answer that reflects it."""
        table = next(table for table in self._catalog.tables if table.is_keyed)
        events = itertools.islice(itertools.cycle(flights_for(table, 1_000)), _WARM_UP + samples)
        taken = []
        with Publisher(self._stack.addresses["kafka"], linger_ms=0) as publisher:
            for topic, key, value in events:
                started = time.perf_counter()
                written = publisher.publish_one(topic, key, value)
                client.query(
                    f"SELECT _offset FROM {table.name} WHERE id = $1",
                    [key.decode()],
                    key=key.decode(),
                    at_least={topic: {written.partition: written.offset}},
                )
                taken.append((time.perf_counter() - started) * 1000)
        return percentiles(taken[_WARM_UP:])
