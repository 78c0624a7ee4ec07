"""What can be seen of a running system from outside: ClickHouse's tables, a worker's status pages, dead letters.

Every function asks once and every wait is for a condition with a deadline. Used by the demo and the load tests.
"""

from __future__ import annotations

import http.client
import json
import re
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeVar
from urllib.parse import urlsplit

from confluent_kafka import Consumer, Message, TopicPartition

from schemas.errors import PintailError
from schemas.table import TableDefinition
from streams.errors import RequestTimeoutError

Result = TypeVar("Result")

HTTP_SECONDS_MAX = 60
_POLL_SECONDS = 0.1
_PAUSE = threading.Event()
_RECOVERY = re.compile(r'^pintail_recovery_seconds\{partition="(\d+)",rung="(\w+)"\} (\S+)$', re.MULTILINE)


class ObservationError(PintailError):
    """What is observed answered with an error, or not at all."""


def wait_until(condition: Callable[[], Result], what: str, *, seconds: float, every: float = _POLL_SECONDS) -> Result:
    """The first truthy result of `condition`. Raises RequestTimeoutError that names `what`."""
    deadline = time.monotonic() + seconds
    while not (result := condition()):
        if time.monotonic() > deadline:
            raise RequestTimeoutError(f"not within {seconds:.0f} s: {what}", hint="the workers' logs say what they do")
        _PAUSE.wait(every)
    return result


def get(address: str, path: str, *, body: bytes | None = None) -> tuple[int, bytes]:
    """Status and body of one GET, or POST if there is a `body`. Raises ObservationError if nobody answers."""
    connection = http.client.HTTPConnection(urlsplit(address).netloc, timeout=HTTP_SECONDS_MAX)
    try:
        connection.request("GET" if body is None else "POST", path, body)
        response = connection.getresponse()
        return response.status, response.read()
    except (OSError, http.client.HTTPException) as error:
        raise ObservationError(f"{address} does not answer: {error}", hint="check that it runs") from None
    finally:
        connection.close()


class ClickHouse:
    """Reads ClickHouse over its HTTP interface, at a URL without user, password or database."""

    def __init__(self, address: str) -> None:
        self._address = address

    def rows(self, sql: str) -> list[list[Any]]:
        """The rows of a SELECT. Raises ObservationError."""
        status, reply = get(self._address, "/?default_format=JSONCompact", body=sql.encode())
        if status != http.client.OK:
            raise ObservationError(
                f"ClickHouse: {reply.decode(errors='replace').strip()}", hint="correct the statement"
            )
        rows: list[list[Any]] = json.loads(reply)["data"]
        return rows

    def count(self, tables: Iterable[TableDefinition]) -> int:
        """Records delivered to these tables; of keyed ones also those that newer records replace."""
        counts = " UNION ALL ".join(f"SELECT count() AS records FROM {table.name}" for table in tables)
        return int(self.rows(f"SELECT sum(records) FROM ({counts})")[0][0])

    def records_delivered_twice(self, table: TableDefinition) -> int:
        """How many rows too many stand for the same record of the log."""
        return int(self.rows(f"SELECT count() - uniqExact(_partition, _offset) FROM {table.name}")[0][0])

    def reflects(self, table: TableDefinition, last_offsets: Mapping[int, int]) -> bool:
        """True once the records at these offsets, by partition, are there; what is delivered is so in order."""
        rows = self.rows(f"SELECT _partition, max(_offset) FROM {table.name} GROUP BY _partition")
        there = {int(partition): int(offset) for partition, offset in rows}
        return all(there.get(partition, -1) >= offset for partition, offset in last_offsets.items())


class WorkerPages:
    """The status pages of one worker."""

    def __init__(self, port: int) -> None:
        self._address = f"http://127.0.0.1:{port}"

    def partitions(self) -> dict[str, dict[str, Any]]:
        """What /ready says about each partition."""
        partitions: dict[str, dict[str, Any]] = self._ready()["partitions"]
        return partitions

    def standbys(self) -> dict[str, dict[str, Any]]:
        """What /ready says about each copy of a partition that another worker owns."""
        standbys: dict[str, dict[str, Any]] = self._ready()["standbys"]
        return standbys

    def snapshots_reflect(self, last_offsets: Mapping[str, Mapping[int, int]]) -> bool:
        """True once published snapshots hold every record up to these offsets, by topic and partition."""
        partitions = self.partitions()
        return all(
            partitions.get(str(partition), {}).get("snapshot", {}).get("next_offsets", {}).get(topic, 0) > offset
            for topic, offsets in last_offsets.items()
            for partition, offset in offsets.items()
        )

    def _ready(self) -> dict[str, Any]:
        _, reply = get(self._address, "/ready")
        report: dict[str, Any] = json.loads(reply)
        return report

    def total(self, metric: str) -> float:
        """The sum of a counter or gauge over all its labels; 0 if there is no value yet. Raises ObservationError."""
        _, reply = get(self._address, "/metrics")
        values = re.findall(rf"^{metric}(?:\{{.*\}})? (\S+)$", reply.decode(), re.MULTILINE)
        return sum(map(float, values))

    def recoveries(self) -> dict[int, tuple[str, float]]:
        """Partition -> the rung of the ladder it was recovered from, and in how many seconds."""
        _, reply = get(self._address, "/metrics")
        return {int(number): (rung, float(seconds)) for number, rung, seconds in _RECOVERY.findall(reply.decode())}


def dead_letters(bootstrap_servers: str, topic: str, *, seconds: float) -> list[Message]:
    """All letters of a dead-letter topic with one partition; waits for the first. Raises RequestTimeoutError."""
    consumer = Consumer({"bootstrap.servers": bootstrap_servers, "group.id": "unused", "enable.auto.commit": False})
    try:
        consumer.assign([TopicPartition(topic, 0, 0)])
        letters = wait_until(
            lambda: [letter for letter in consumer.consume(100, timeout=1.0) if letter.error() is None],
            f"a letter in {topic}",
            seconds=seconds,
        )
    finally:
        consumer.close()
    return letters
