"""`pintail sink`: what an operator does to what was delivered to ClickHouse."""

from __future__ import annotations

import asyncio
from typing import Annotated

import typer

from schemas.catalog import load_catalog
from streams.adapters.clickhouse_rebuilding import ClickHouseReplacement
from streams.adapters.clickhouse_sink import ClickHouseSink
from streams.adapters.kafka_intents import GroupRecords
from streams.adapters.kafka_positions import GroupPositions
from streams.config import load_settings
from streams.errors import ConfigurationError, RebuildRefusedError
from streams.processes.sink_rebuilding import rebuild_table

commands = typer.Typer(no_args_is_help=True, help="Rebuild what was delivered to ClickHouse.")
#: Copying the rows that stay is one statement.
_COPY_SECONDS_MAX = 6 * 3_600


def register(app: typer.Typer) -> None:
    """Adds the command to `app`."""
    app.add_typer(commands, name="sink")


@commands.callback()
def sink() -> None:
    """Rebuild what was delivered to ClickHouse."""


@commands.command()
def rebuild(
    table: Annotated[str, typer.Option(help="The table.")],
    from_offset: Annotated[int, typer.Option(min=0, help="Records at and above this offset are delivered anew.")],
    partition: Annotated[list[int] | None, typer.Option(min=0, help="Only this partition. Repeatable.")] = None,
    yes: Annotated[bool, typer.Option("--yes", help="Do it.")] = False,
) -> None:
    """Deliver a table's records from an offset on to ClickHouse anew. Stop the sink workers first."""
    settings = load_settings()
    settings.require("kafka", "clickhouse")
    definition = load_catalog(settings.tables_dir).by_name(table)
    partitions = sorted(set(partition or range(definition.partitions)))
    if partitions[-1] >= definition.partitions:
        raise ConfigurationError(
            f"there is no partition {partitions[-1]}: {table} has {definition.partitions}",
            hint=f"give 0 to {definition.partitions - 1}",
        )
    if not yes:
        raise RebuildRefusedError(
            f"this replaces the rows of {table} at and above offset {from_offset} in partitions "
            f"{', '.join(map(str, partitions))} by what the log holds of them",
            hint="give --yes; the table as it is stays under another name, so have room for both",
        )
    clickhouse = ClickHouseSink(settings.clickhouse, reply_seconds_max=_COPY_SECONDS_MAX)
    try:
        rebuilt = asyncio.run(
            rebuild_table(
                definition,
                partitions,
                from_offset,
                replacement=ClickHouseReplacement(clickhouse, definition),
                positions=GroupPositions(settings),
                records=GroupRecords(settings),
            )
        )
    finally:
        clickhouse.close()
    print(f"{table}: {rebuilt.rows_kept:,} rows stay; the sink, once started, delivers up to {rebuilt.records:,} anew")
    print(f"the table as it was is {rebuilt.kept_as}; drop it when all is well")
