"""`pintail recover`: orders the worker that holds a partition to recover it from one source, and waits for the outcome.

Run it where the worker's data folder is. The worker carries the order out while it runs, also for a partition that is
FAILED; if it is down, it does so when it next opens the partition.
"""

from __future__ import annotations

import asyncio
import time
from pathlib import Path
from typing import Annotated

import typer

from schemas.catalog import load_catalog
from streams.adapters.duckdb_file import FileLock
from streams.adapters.kafka_log_reader import KafkaLogReader
from streams.adapters.redis_snapshots import open_snapshot_repository
from streams.adapters.snapshot_codec import SnapshotCodec
from streams.cli.status import addresses_of, reports_of
from streams.config import Settings, load_settings
from streams.errors import ConfigurationError, RecoveryRefusedError, StoreLockedError
from streams.positions import TopicPartition
from streams.processes.recovery import SnapshotRestore
from streams.processes.recovery_orders import OrderOutcome, RecoveryOrder, RecoveryOrders, RecoverySource

_PAUSE_SECONDS = 0.1


def register(app: typer.Typer) -> None:
    """Adds the command to `app`."""
    app.command()(recover)


def recover(
    partition: Annotated[int, typer.Option(min=0, help="The partition, of all tables.")],
    source: Annotated[str, typer.Option("--from", help="log, clickhouse or snapshot:VERSION.")],
    worker: Annotated[str, typer.Option(help="The worker that holds it; needed where several have its file.")] = "",
    yes: Annotated[bool, typer.Option("--yes", help="Also if it is open in a worker, or another order waits.")] = False,
    wait: Annotated[bool, typer.Option("--wait/--no-wait", help="Wait until it serves again.")] = True,
    deadline_seconds: Annotated[float, typer.Option(min=1, help="How long to wait.")] = 600,
) -> None:
    """Recover a partition from the log, a snapshot or ClickHouse, whatever it holds; what it held is kept beside it."""
    settings = load_settings()
    order = RecoveryOrder(partition, RecoverySource.parse(source))
    _check_partition(settings, partition)
    folder = _folder_of(settings, partition, worker)
    if order.source.version is not None:
        asyncio.run(_check_version(settings, partition, order.source.version))
    orders = RecoveryOrders(folder)
    if not yes:
        _check_idle(orders, folder, partition)
    orders.place(order)
    print(f"partition {partition} is to be recovered from {order.source} by worker {folder.name}")
    if wait:
        _report(order, _outcome_of(orders, order, folder, deadline_seconds))


def _check_partition(settings: Settings, partition: int) -> None:
    partitions = max((table.partitions for table in load_catalog(settings.tables_dir).tables), default=0)
    if partition >= partitions:
        raise ConfigurationError(
            f"there is no partition {partition}: the tables have {partitions}", hint=f"give 0 to {partitions - 1}"
        )


def _folder_of(settings: Settings, partition: int, worker: str) -> Path:
    """The folder of the worker that has the partition's file, or the one that is named."""
    stores = settings.store_dir.parent
    if worker:
        if not (stores / worker).is_dir():
            raise ConfigurationError(f"no worker {worker!r} has a folder in {stores}", hint=_where(stores))
        return stores / worker
    holders = sorted(lock.parent for lock in stores.glob(f"*/{partition}.lock"))
    if len(holders) == 1:
        return holders[0]
    if not holders:
        raise ConfigurationError(f"no worker has had partition {partition} in {stores}", hint=_where(stores))
    names = ", ".join(holder.name for holder in holders)
    if (name := _reported_holder(settings, partition)) in {holder.name for holder in holders}:
        return stores / str(name)
    raise ConfigurationError(
        f"several workers have had partition {partition} in {stores}: {names}",
        hint="say which one holds it now (`pintail status` shows it): --worker NAME",
    )


def _reported_holder(settings: Settings, partition: int) -> str | None:
    """The worker that says it holds the partition, if workers can be asked."""
    try:
        reports = reports_of(addresses_of(settings, []))
    except ConfigurationError:
        return None
    return next((each.name for each in reports if str(partition) in each.partitions), None)


def _where(stores: Path) -> str:
    names = ", ".join(sorted(folder.name for folder in stores.glob("*") if folder.is_dir()))
    return f"run it where the worker's data folder is, with its PINTAIL_DATA_DIR; here are: {names or 'none'}"


async def _check_version(settings: Settings, partition: int, version: int) -> None:
    """Raises SnapshotNotFoundError, what makes the version unreadable, and RecoveryRefusedError if the log does not
    continue where it ends."""
    settings.require("kafka", "redis", "snapshot_key")
    async with open_snapshot_repository(settings) as repository:
        restore = SnapshotRestore(repository, SnapshotCodec.from_settings(settings), partition, version)
        manifest = await restore.manifest()
    async with KafkaLogReader(settings) as log:
        for topic, next_offset in sorted(manifest.next_offsets.items()):
            source = TopicPartition(topic, partition)
            if source not in await log.partitions(topic):
                continue
            marks = (await log.watermarks([source]))[source]
            if not marks.low <= next_offset <= marks.high:
                raise RecoveryRefusedError(
                    f"snapshot version {version} continues at offset {next_offset} of {source}, "
                    f"but the log holds [{marks.low}, {marks.high})",
                    hint="choose a version that the log continues, or --from log or clickhouse",
                )


def _check_idle(orders: RecoveryOrders, folder: Path, partition: int) -> None:
    """Raises RecoveryRefusedError if the partition is open, or already to be recovered."""
    if pending := orders.pending(partition):
        state = "being" if pending.is_begun else "waiting to be"
        raise RecoveryRefusedError(
            f"partition {partition} is {state} recovered from {pending.source} already",
            hint="wait for it, or give --yes to order this instead",
        )
    try:
        FileLock(folder / f"{partition}.lock").release()
    except StoreLockedError:
        raise RecoveryRefusedError(
            f"partition {partition} is open in a worker: it serves, or is about to",
            hint="nothing needs to be done for it; to replace what it holds all the same, give --yes",
        ) from None


def _outcome_of(orders: RecoveryOrders, order: RecoveryOrder, folder: Path, deadline_seconds: float) -> OrderOutcome:
    """Waits. Raises RecoveryRefusedError after the deadline; the order stays."""
    deadline = time.monotonic() + deadline_seconds
    while True:
        if outcome := orders.outcome(order):
            return outcome
        if time.monotonic() >= deadline:
            pending = orders.pending(order.partition)
            state = "is under way" if pending is not None and pending.is_begun else "was not begun: is the worker up?"
            raise RecoveryRefusedError(
                f"recovery of partition {order.partition} {state} after {deadline_seconds:g} s",
                hint=f"the order stays in {folder}; `pintail status` shows how it goes on",
            )
        time.sleep(_PAUSE_SECONDS)


def _report(order: RecoveryOrder, outcome: OrderOutcome) -> None:
    if outcome.kept:
        print(f"kept, for you to examine and remove: {', '.join(outcome.kept)}")
    if outcome.failure is not None:
        raise RecoveryRefusedError(
            f"partition {order.partition} was not recovered from {order.source}: {outcome.failure}",
            hint="`pintail status` shows what it does now",
        )
    positions = ", ".join(f"{topic} {offset}" for topic, offset in sorted(outcome.next_offsets.items()))
    print(f"partition {order.partition} serves again, recovered from {order.source}, at {positions}")
