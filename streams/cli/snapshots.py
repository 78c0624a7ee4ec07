"""`pintail snapshots`: lists the versions kept in Redis, verifies them down to the last block, restores any of them to
a file, and proves by a drill that they come back as they were."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated

import typer
from rich.filesize import decimal
from rich.table import Table

from schemas.catalog import load_catalog
from schemas.manifest import Manifest
from streams.adapters.redis_snapshots import open_snapshot_repository
from streams.adapters.snapshot_codec import SnapshotCodec
from streams.cli.output import table_console
from streams.config import Settings, load_settings
from streams.errors import (
    ConfigurationError,
    SnapshotCorruptError,
    SnapshotKeyError,
    SnapshotNotFoundError,
    StoreCorruptError,
)
from streams.ports_snapshots import SnapshotRepository
from streams.processes.drill import drill_newest
from streams.processes.recovery import SnapshotRestore

_NOT_COMPARED = "restores and opens; it has no hash of these tables to compare with, which only drills of a worker take"
_KEY_ID_SHOWN = 8

commands = typer.Typer(invoke_without_command=True, help="List the snapshots in Redis, verify, restore and drill.")


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
    listing = Table(
        *("partition", "version", "created", "key", "epoch", "blocks", "size", "in Redis", "next offsets"), box=None
    )
    for number in (0, 1, 4, 5, 6, 7):
        listing.columns[number].justify = "right"
    shown: set[int] = set()
    for each in versions:
        occupied = "" if each.partition in shown else decimal(memory[each.partition])
        shown.add(each.partition)
        listing.add_row(str(each.partition), str(each.version), *_cells(each, occupied))
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


@commands.command()
def restore(
    partition: Annotated[int, typer.Option(help="The partition.")],
    to: Annotated[Path, typer.Option(help="The DuckDB file to write; it must not exist.")],
    version: Annotated[int | None, typer.Option(help="Any version kept; the newest one if left out.")] = None,
) -> None:
    """Write one version as a DuckDB file, to be looked at with any DuckDB. No worker is affected."""
    if to.exists():
        raise ConfigurationError(f"{to} exists", hint="name a file that does not: nothing is overwritten")
    asyncio.run(_restore(load_settings(), partition, version, to))


@commands.command("drill")
def drill_snapshots(
    partition: Annotated[int | None, typer.Option(help="Only this partition.")] = None,
) -> None:
    """Restore each partition's newest version into a temporary file and compare its rows with those that were captured.

    Exit status 1 if one does not come back as it was. Needs disk space for one partition in the data folder."""
    raise typer.Exit(0 if asyncio.run(_drill(load_settings(), partition)) else 1)


@dataclass(frozen=True)
class _Version:
    partition: int
    version: int
    #: The beginning of the id of the key that sealed it.
    key_id: str
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
            outcome: Manifest | SnapshotCorruptError
            try:
                sealed = await repository.load_manifest(partition, version)
                outcome = codec.open_manifest(partition, version, sealed)
            except SnapshotCorruptError as error:
                outcome = error
            except SnapshotNotFoundError:  # retired since it was listed
                continue
            versions.append(_Version(partition, version, codec.key_id_of(sealed)[:_KEY_ID_SHOWN], outcome))
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


async def _restore(settings: Settings, partition: int, version: int | None, to: Path) -> None:
    async with _repository_of(settings) as (repository, codec):
        chosen = version if version is not None else await repository.newest_version(partition)
        if chosen is None:
            raise SnapshotNotFoundError(
                f"partition {partition} has no snapshot", hint="`pintail snapshots list` shows those that are kept"
            )
        manifest = await SnapshotRestore(repository, codec, partition, chosen).to(to)
    print(f"partition {partition} version {chosen}: {decimal(manifest.file_bytes)} in {to}, at {_offsets(manifest)}")


async def _drill(settings: Settings, partition: int | None) -> bool:
    catalog, has_passed = load_catalog(settings.tables_dir), True
    async with _repository_of(settings) as (repository, codec):
        chosen = [p for p in await repository.partitions() if partition in (None, p)]
        for each in chosen:
            started = time.perf_counter()
            try:
                report = await drill_newest(repository, codec, catalog, settings.data_dir / "drills", each)
            except (SnapshotCorruptError, StoreCorruptError) as error:
                has_passed = False
                print(f"partition {each}: FAILED: {error}")
                continue
            if report is None:
                print(f"partition {each}: no snapshot yet")
                continue
            outcome = "holds the rows that were captured" if report.is_compared else _NOT_COMPARED
            seconds = time.perf_counter() - started
            print(f"partition {each} version {report.manifest.version}: {outcome}; restored in {seconds:.2f} s")
    if not chosen:
        _say_there_are_none(settings)
    return has_passed


async def _kept(repository: SnapshotRepository) -> list[tuple[int, int]]:
    return [(p, v) for p in await repository.partitions() for v in await repository.versions(p)]


def _unreadable(errors: list[SnapshotCorruptError], *, of: int) -> SnapshotCorruptError:
    """One error about all of them, each reason and each way out named once."""
    reasons, hints = (dict.fromkeys(texts) for texts in zip(*((e.message, e.hint) for e in errors), strict=True))
    return SnapshotCorruptError(
        f"{len(errors)} of {of} versions cannot be read: {'; '.join(reasons)}", hint="; ".join(hints)
    )


def _cells(version: _Version, occupied: str) -> tuple[str, ...]:
    outcome = version.outcome
    if isinstance(outcome, SnapshotCorruptError):
        is_whole = isinstance(outcome, SnapshotKeyError)
        reason = "another key" if is_whole else "damaged"
        return (f"unreadable: {reason}", version.key_id if is_whole else "", "", "", "", occupied, "")
    created = datetime.fromtimestamp(outcome.created_at_ms / 1000, UTC)
    return (
        f"{created:%Y-%m-%d %H:%M:%S}Z",
        version.key_id,
        str(outcome.epoch),
        str(len(outcome.blocks)),
        decimal(outcome.file_bytes),
        occupied,
        _offsets(outcome),
    )


def _offsets(manifest: Manifest) -> str:
    return ", ".join(f"{topic} {offset}" for topic, offset in sorted(manifest.next_offsets.items()))


def _say_there_are_none(settings: Settings) -> None:
    print(
        f"no snapshots yet of application {settings.application!r}: a store worker takes one of each partition that "
        f"changed every {settings.snapshot_interval_seconds:g} s"
    )
