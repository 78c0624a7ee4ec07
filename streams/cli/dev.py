"""`pintail dev`: the whole system on this machine, until Ctrl-C.

Starts what the settings do not already name (Kafka, Redis, ClickHouse), then the workers, says where everything is and
what to try, and stops all of it in order at the end.
"""

from __future__ import annotations

import threading
from enum import StrEnum
from pathlib import Path
from shlex import quote
from typing import Annotated

import typer
from rich.console import Console

from schemas.catalog import Catalog, load_catalog
from streams.adapters.kafka_topics import topics_of
from streams.config import ENVIRONMENT_PREFIX, URL_SETTINGS, Settings, load_settings
from streams.errors import ConfigurationError, MissingProgramError
from streams.localstack.memory_broker import LIMITS
from streams.localstack.processes import ProcessState
from streams.localstack.signals import ending_signals_interrupt, signals_ignored
from streams.localstack.stack import SERVICES, LocalStack, StackOptions
from streams.urls import redacted

_WITHOUT_JAVA = (
    "or use a broker of yours: PINTAIL_KAFKA=host:port; or take a first look without either: --broker memory"
)


class Broker(StrEnum):
    """Which broker a stack runs."""

    KAFKA = "kafka"
    MEMORY = "memory"


def register(app: typer.Typer) -> None:
    """Adds the command to `app`."""
    app.command()(dev)


def dev(
    data_dir: Annotated[Path | None, typer.Option(help="Folder for all data [default: .pintail]")] = None,
    broker: Annotated[Broker, typer.Option(help="memory: a first look without Java; nothing survives")] = Broker.KAFKA,
    kafka_port: Annotated[int, typer.Option(min=0, max=65535, help="0 chooses a free one")] = 0,
    redis_port: Annotated[int, typer.Option(min=0, max=65535, help="0 chooses a free one")] = 0,
    clickhouse_port: Annotated[int, typer.Option(min=0, max=65535, help="0 chooses a free one")] = 0,
    services_only: Annotated[bool, typer.Option(help="Kafka, Redis and ClickHouse, without the workers")] = False,
    store_workers: Annotated[int, typer.Option(min=1, max=64, help="How many store workers share the partitions")] = 1,
) -> None:
    """Run everything on this machine, without Docker, until Ctrl-C.

    Services that the settings name (PINTAIL_KAFKA, PINTAIL_REDIS, PINTAIL_CLICKHOUSE) are used, the others are started.
    """
    if broker is Broker.MEMORY and kafka_port:
        raise ConfigurationError("the in-memory broker chooses its own port", hint="leave --kafka-port out")
    settings = load_settings(running_stack=False)
    catalog = load_catalog(settings.tables_dir)
    options = StackOptions(
        given={name: address for name in SERVICES if (address := getattr(settings, name))},
        broker="memory" if broker is Broker.MEMORY else "kafka",
        memory_topics=tuple(topic.name for topic in topics_of(catalog, settings)),
        ports={"kafka": kafka_port, "redis": redis_port, "clickhouse": clickhouse_port},
        store_workers=0 if services_only else store_workers,
        sink_workers=0 if services_only else 1,
        snapshot_key_generated=not settings.snapshot_key.get_secret_value(),
    )
    console = Console(highlight=False)
    if broker is Broker.MEMORY:
        console.print(f"Note: {LIMITS}.", soft_wrap=True)
    with ending_signals_interrupt(), _Progress(console) as progress:
        stack = LocalStack(data_dir or settings.data_dir, options, report=progress)
        try:
            stack.start()
            progress.pause()
            _say_what_is_there(console, stack, settings, catalog)
            stack.wait()
        except KeyboardInterrupt:
            progress.resume("stopping")
        except MissingProgramError as missing:
            raise MissingProgramError(missing.message, hint=f"{missing.hint}; {_WITHOUT_JAVA}") from None
        finally:
            with signals_ignored():
                stack.stop()


class _Progress:
    """Reports of the stack as lines; on a terminal what is still going on is a spinner instead."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._status = console.status("starting")
        self._under_way: dict[str, str] = {}
        self._lock = threading.Lock()

    def __enter__(self) -> _Progress:
        self._status.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._status.stop()

    def __call__(self, name: str, state: ProcessState, detail: str) -> None:
        with self._lock:
            if state in (ProcessState.PREPARING, ProcessState.STARTING):
                self._under_way[name] = f"{name} {detail or state}"
            else:
                self._under_way.pop(name, None)
            self._status.update(", ".join(self._under_way.values()))
            if name not in self._under_way or not self._console.is_terminal:
                self._console.print(f"{name:<11} {state:<10} {detail}".rstrip(), markup=False, soft_wrap=True)

    def pause(self) -> None:
        """No spinner while nothing is going on."""
        self._status.stop()

    def resume(self, text: str) -> None:
        """The spinner again, with `text`."""
        self._status.update(text)
        self._status.start()


def _say_what_is_there(console: Console, stack: LocalStack, settings: Settings, catalog: Catalog) -> None:
    lines = ["", "Pintail is ready." if stack.has_workers else "The servers are ready."]
    lines += [
        f"  {name:<12}{redacted(address) if name in URL_SETTINGS else address}"
        for name, address in stack.addresses.items()
    ]
    for name, process in stack.processes.items():
        if name not in SERVICES:
            lines.append(f"  {name:<12}http://127.0.0.1:{process.specification.port}/metrics")
    lines += [f"  {'data, logs':<12}{stack.data_dir}", "", "Try, in another terminal:"]
    prefix = (
        ""
        if stack.data_dir == settings.data_dir.resolve()
        else f"{ENVIRONMENT_PREFIX}DATA_DIR={quote(str(stack.data_dir))} "
    )
    lines.append(f"  {prefix}pintail tables")
    if stack.has_workers and catalog.tables:
        lines.append(f'  {prefix}pintail query "SELECT count(*) FROM {catalog.tables[0].name}"')
    lines += [f"  kcat -b {stack.addresses['kafka']} -L", "", "Ctrl-C stops everything; the data stays."]
    console.print("\n".join(lines), markup=False, soft_wrap=True)
