"""`pintail snapshots`: lists the versions kept in Redis, and verifies them down to the last block."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Annotated

import typer
from rich.filesize import decimal
from rich.table import Table

from schemas.manifest import Manifest
from streams.adapters.redis_snapshots import open_snapshot_repository
from streams.adapters.snapshot_codec import SnapshotCodec
from streams.cli.output import table_console
from streams.config import Settings, load_settings
from streams.errors import SnapshotCorruptError, SnapshotKeyError, SnapshotNotFoundError
from streams.ports_snapshots import SnapshotRepository
from streams.processes.recovery import SnapshotRestore

commands = typer.Typer(invoke_without_command=True, help="List the snapshots in Redis, verify them.")


def register(app: typer.Typer) -> None:
    """Adds the command to `app`."""
    app.add_typer(commands, name="snapshots")


@commands.callback()
def default(context: typer.Context) -> None:
    """List the snapshots; with a subcommand, do that."""
    if context.invoked_subcommand is None:
        list_snapshots()


@commands.command("list")
def list_snapshots() -> None:
    """List every version kept, per partition: what it holds, what it occupies. Exit status 1 if any is unreadable."""
    settings = load_settings()
    versions, memory = asyncio.run(_described(settings))
    if not versions:
        _say_there_are_none(settings)
        return
    listing = Table("partition", "version", "created", "epoch", "blocks", "size", "in Redis", "next offsets", box=None)
    for number in (0, 1, 3, 4, 5, 6):
        listing.columns[number].justify = "right"
    shown: set[int] = set()
    for each in versions:
        occupied = "" if each.partition in shown else decimal(memory[each.partition])
        shown.add(each.partition)
        listing.add_row(str(each.partition), str(each.version), *_cells(each.outcome, occupied))
    table_console().print(listing)
    if errors := [each.outcome for each in versions if isinstance(each.outcome, SnapshotCorruptError)]:
        raise _unreadable(errors, of=len(versions))


@commands.command()
def verify(
    partition: Annotated[int | None, typer.Option(help="Only this partition.")] = None,
    version: Annotated[int | None, typer.Option(help="Only this version.")] = None,
) -> None:
    """Load, decrypt and check every block of the versions kept. Exit status 1 if any cannot be restored."""
    settings = load_settings()
    raise typer.Exit(0 if asyncio.run(_verify(settings, partition, version)) else 1)


@dataclass(frozen=True)
class _Version:
    partition: int
    version: int
    outcome: Manifest | SnapshotCorruptError


@asynccontextmanager
async def _repository_of(settings: Settings) -> AsyncIterator[tuple[SnapshotRepository, SnapshotCodec]]:
    settings.require("redis", "snapshot_key")
    async with open_snapshot_repository(settings) as repository:
        yield repository, SnapshotCodec.from_settings(settings)


async def _described(settings: Settings) -> tuple[list[_Version], dict[int, int]]:
    """Every version, by partition and newest first, and the memory of each partition."""
    async with _repository_of(settings) as (repository, codec):
        versions, memory = [], {}
        for partition, version in await _kept(repository):
            try:
                outcome = await SnapshotRestore(repository, codec, partition, version).manifest()
            except SnapshotCorruptError as error:
                versions.append(_Version(partition, version, error))
            except SnapshotNotFoundError:  # retired since it was listed
                continue
            else:
                versions.append(_Version(partition, version, outcome))
            if partition not in memory:
                memory[partition] = await repository.memory_bytes(partition)
    return versions, memory


async def _verify(settings: Settings, partition: int | None, version: int | None) -> bool:
    sound = True
    async with _repository_of(settings) as (repository, codec):
        chosen = [(p, v) for p, v in await _kept(repository) if partition in (None, p) and version in (None, v)]
        if not chosen and (partition is not None or version is not None):
            raise SnapshotNotFoundError(
                "no snapshot is kept that matches", hint="`pintail snapshots list` shows the versions that are kept"
            )
        for p, v in chosen:
            restore, started = SnapshotRestore(repository, codec, p, v), time.perf_counter()
            try:
                manifest = await restore.check()
            except SnapshotCorruptError as error:
                sound = False
                print(f"partition {p} version {v}: NOT RESTORABLE: {error}")
            except SnapshotNotFoundError:
                print(f"partition {p} version {v}: retired meanwhile")
            else:
                print(
                    f"partition {p} version {v}: ok, {len(manifest.blocks)} blocks, {decimal(manifest.file_bytes)} "
                    f"from {decimal(restore.bytes_loaded)} in {time.perf_counter() - started:.2f} s"
                )
    if not chosen:
        _say_there_are_none(settings)
    return sound


async def _kept(repository: SnapshotRepository) -> list[tuple[int, int]]:
    return [(p, v) for p in await repository.partitions() for v in await repository.versions(p)]


def _unreadable(errors: list[SnapshotCorruptError], *, of: int) -> SnapshotCorruptError:
    """One error about all of them, each reason and each way out named once."""
    reasons, hints = (dict.fromkeys(texts) for texts in zip(*((e.message, e.hint) for e in errors), strict=True))
    return SnapshotCorruptError(
        f"{len(errors)} of {of} versions cannot be read: {'; '.join(reasons)}", hint="; ".join(hints)
    )


def _cells(outcome: Manifest | SnapshotCorruptError, occupied: str) -> tuple[str, ...]:
    if isinstance(outcome, SnapshotCorruptError):
        reason = "another key" if isinstance(outcome, SnapshotKeyError) else "damaged"
        return (f"unreadable: {reason}", "", "", "", occupied, "")
    created = datetime.fromtimestamp(outcome.created_at_ms / 1000, UTC)
    offsets = ", ".join(f"{topic} {offset}" for topic, offset in sorted(outcome.next_offsets.items()))
    return (
        f"{created:%Y-%m-%d %H:%M:%S}Z",
        str(outcome.epoch),
        str(len(outcome.blocks)),
        decimal(outcome.file_bytes),
        occupied,
        offsets,
    )


def _say_there_are_none(settings: Settings) -> None:
    print(
        f"no snapshots yet of application {settings.application!r}: a store worker takes one of each partition that "
        f"changed every {settings.snapshot_interval_seconds:g} s"
    )
