"""A whole running system for integration tests: the session's servers, workers of its own, tables of its own."""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

from confluent_kafka import KafkaError, Message, Producer

from streams.cli.main import main
from streams.client import Answer, Client
from streams.config import Settings, load_settings
from streams.localstack.stack import LocalStack, StackOptions
from tests.conftest import unique_name
from tests.oracle import records_of
from tests.waiting import worker_report


@dataclass(frozen=True)
class Position:
    """Where a published record is."""

    topic: str
    partition: int
    offset: int


@dataclass(frozen=True)
class Done:
    """What a command left behind."""

    returncode: int
    stdout: str
    stderr: str


def settings_of(stack: LocalStack) -> dict[str, str]:
    """The settings of the stack's workers, for the environment of a command."""
    return {**stack.settings_environment(), **stack.options.worker_environment}


def pintail(stack: LocalStack, *arguments: str) -> Done:
    """Runs a command of the command line in this process, with the settings of the stack's workers."""
    out, err = io.StringIO(), io.StringIO()
    with (
        mock.patch.dict(os.environ, settings_of(stack)),
        mock.patch.object(sys, "argv", ["pintail", *arguments]),
        redirect_stdout(out),
        redirect_stderr(err),
    ):
        try:
            main()
            status = 0
        except SystemExit as exit_:
            status = int(exit_.code or 0)
    return Done(status, out.getvalue(), err.getvalue())


class System:
    """One deployment: its workers, a producer and a client."""

    def __init__(self, stack: LocalStack, settings: Settings, client: Client) -> None:
        self.stack = stack
        self.settings = settings
        self.client = client
        self._producer = Producer(
            {"bootstrap.servers": settings.kafka, "partitioner": "murmur2_random", "message.max.bytes": 20_000_000}
        )

    def publish(
        self, topic: str, value: bytes | str | None, *, key: bytes | str | None = None, partition: int | None = None
    ) -> Position:
        """Writes one record; returns where it is once it is acknowledged."""
        written: list[Message] = []

        def on_delivery(error: KafkaError | None, message: Message) -> None:
            assert error is None, error
            written.append(message)

        where = {} if partition is None else {"partition": partition}
        self._producer.produce(topic, key=key, value=value, on_delivery=on_delivery, **where)
        assert self._producer.flush(30) == 0
        return Position(topic, int(written[0].partition()), int(written[0].offset()))

    def send(self, topic: str, value: bytes | str | None, *, key: bytes | str | None = None, partition: int) -> None:
        """Writes one record without waiting for it; `flush` waits for all."""
        self._producer.produce(topic, key=key, value=value, partition=partition)
        self._producer.poll(0)

    def flush(self) -> None:
        """Waits until what was sent is acknowledged."""
        assert self._producer.flush(30) == 0

    def query_after(self, position: Position, sql: str, params: Any = None, **options: Any) -> Answer:
        """Asks so that the answer reflects the record at `position`."""
        return self.query_after_all([position], sql, params, **options)

    def query_after_all(self, positions: Iterable[Position], sql: str, params: Any = None, **options: Any) -> Answer:
        """Asks so that the answer reflects the record at each of `positions`."""
        at_least: dict[str, dict[int, int]] = {}
        for position in positions:
            at_least.setdefault(position.topic, {})[position.partition] = position.offset
        return self.client.query(sql, params, at_least=at_least, deadline_ms=60_000, **options)

    def pintail(self, *arguments: str) -> Done:
        """Runs a command of the command line in this process, with this deployment's settings."""
        return pintail(self.stack, *arguments)

    def partitions_of(self, worker: str) -> dict[str, Any]:
        """What the worker reports of its partitions; empty while it does not answer."""
        partitions: dict[str, Any] = self.report_of(worker).get("partitions", {})
        return partitions

    def report_of(self, worker: str) -> dict[str, Any]:
        """What the worker's /ready says; empty while it does not answer."""
        port = self.stack.process(worker).specification.port
        assert port is not None
        return worker_report(port)

    def dead_letters(self, topic: str) -> list[tuple[dict[str, str], bytes | None, bytes | None]]:
        """(headers, key, value) of everything parked of a table topic so far."""
        return [
            ({name: text.decode() for name, text in message.headers() or []}, message.key(), message.value())
            for message in records_of(self.settings.kafka, [f"{topic}.dead-letters"])
        ]


@contextmanager
def running_system(
    folder: Path,
    tables: Mapping[str, str],
    *,
    kafka: str,
    redis_url: str,
    clickhouse_url: str,
    store_workers: int = 1,
    sink_workers: int = 0,
    environment: Mapping[str, str] | None = None,
) -> Iterator[System]:
    """Starts workers for these tables (name -> SQL, in which {prefix} keeps topics apart)."""
    application = unique_name("app")
    for name, sql in tables.items():
        (folder / "tables" / name).mkdir(parents=True)
        (folder / "tables" / name / "001_create.sql").write_text(sql.replace("{prefix}", application))
    options = StackOptions(
        given={"kafka": kafka, "redis": redis_url, "clickhouse": clickhouse_url},
        store_workers=store_workers,
        sink_workers=sink_workers,
        worker_environment={
            "PINTAIL_APPLICATION": application,
            "PINTAIL_TABLES_DIR": str(folder / "tables"),
            **(environment or {}),
        },
    )
    with LocalStack(folder / "stack", options) as stack:
        settings = load_settings(
            data_dir=stack.data_dir,
            application=application,
            tables_dir=folder / "tables",
            kafka=kafka,
            redis=redis_url,
            clickhouse=clickhouse_url,
        )
        with Client.connect(settings) as client:
            yield System(stack, settings, client)
