"""`pintail audit`: reads the log, asks the stores and ClickHouse, and says whether in = state = sink."""

from __future__ import annotations

import asyncio
import sys
import tempfile
from pathlib import Path
from typing import Annotated, Any

import orjson
import typer
from rich.table import Table

from schemas.catalog import Catalog, load_catalog
from schemas.table import TableDefinition
from streams.adapters.clickhouse_audit import ClickHouseAudit
from streams.adapters.clickhouse_sink import ClickHouseSink
from streams.adapters.duckdb_audit import AuditWorkspace
from streams.adapters.duckdb_decoder import DuckDBDecoder
from streams.adapters.format_decoder import FormatDecoder
from streams.adapters.http_registry import HttpSchemaRegistry
from streams.adapters.kafka_intents import GroupRecords
from streams.adapters.kafka_log_reader import KafkaLogReader
from streams.cli.output import table_console
from streams.client.async_client import AsyncClient
from streams.config import Settings, load_settings
from streams.errors import ConfigurationError
from streams.processes.audit import AuditParts, PartitionAudit, Verdict, audit

#: Digests of a whole table take ClickHouse longer than an insert.
_REPLY_SECONDS_MAX = 600
_DIFFERENCES_SHOWN = 20


def register(app: typer.Typer) -> None:
    """Adds the command to `app`."""
    app.command("audit")(run)


def run(
    table: Annotated[list[str] | None, typer.Option(help="Only this table. Repeatable.")] = None,
    sink: Annotated[
        bool | None,
        typer.Option(
            "--sink/--no-sink",
            help="Whether ClickHouse is compared; without either, it is if it is set.",
            show_default=False,
        ),
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="One JSON object.")] = False,
    deadline_seconds: Annotated[float, typer.Option(min=1, help="For store and sink to reach the log's end.")] = 120,
) -> None:
    """Prove that log, stores, dead letters and ClickHouse agree, or name what does not. Exit status 1 if not proven."""
    settings = load_settings()
    settings.require("kafka", *(("clickhouse",) if sink else ()))
    if sink is False:
        settings = settings.model_copy(update={"clickhouse": ""})
    catalog = load_catalog(settings.tables_dir)
    chosen = _chosen(catalog, table or [])
    audits = asyncio.run(_audits(settings, catalog, chosen, deadline_seconds, quiet=json))
    verdict = _verdict_of(audits)
    if json:
        print(orjson.dumps(as_json(audits, verdict), option=orjson.OPT_INDENT_2).decode())
    else:
        _show(audits, verdict, has_sink=bool(settings.clickhouse))
    raise typer.Exit(1 if verdict is Verdict.NOT_PROVEN else 0)


def _verdict_of(audits: list[PartitionAudit]) -> Verdict:
    """The weakest of them: `Verdict` lists them from strong to weak."""
    verdicts = {each.verdict for each in audits} or {Verdict.NOT_PROVEN}
    return max(verdicts, key=list(Verdict).index)


def _chosen(catalog: Catalog, names: list[str]) -> list[TableDefinition]:
    known = {table.name: table for table in catalog.tables}
    for name in names:
        if name not in known:
            raise ConfigurationError(f"there is no table {name!r}", hint=f"tables: {', '.join(known)}")
    return [table for table in catalog.tables if not names or table.name in names]


async def _audits(
    settings: Settings, catalog: Catalog, tables: list[TableDefinition], deadline_seconds: float, *, quiet: bool
) -> list[PartitionAudit]:
    clickhouse = (
        ClickHouseSink(settings.clickhouse, reply_seconds_max=_REPLY_SECONDS_MAX) if settings.clickhouse else None
    )
    needs_registry = any(table.format.is_avro for table in tables)
    registry = HttpSchemaRegistry.from_settings(settings) if needs_registry else None
    with tempfile.TemporaryDirectory(prefix="pintail-audit-") as folder, AuditWorkspace(Path(folder)) as workspace:
        async with KafkaLogReader(settings) as log, await AsyncClient.connect(settings) as client:
            parts = AuditParts(
                catalog=catalog,
                log=log,
                decoder=FormatDecoder(DuckDBDecoder(), registry),
                workspace=workspace,
                ask=client.query,
                query_partitions=len(await log.partitions(settings.query_topic)),
                sink=ClickHouseAudit(clickhouse) if clickhouse else None,
                intents=GroupRecords(settings) if clickhouse else None,
                deadline_seconds=deadline_seconds,
            )
            audits = []
            try:
                async for each in audit(parts, tables):
                    audits.append(each)
                    if not quiet:
                        print(f"{each.topic_partition} {each.offsets}: {_in_words(each)}", file=sys.stderr)
            finally:
                if clickhouse:
                    await asyncio.to_thread(clickhouse.close)
    return audits


def _in_words(audit: PartitionAudit) -> str:
    words = {Verdict.PROVEN: "proven", Verdict.PROVEN_FROM_START: f"proven from {audit.offsets.lo}"}
    return words.get(audit.verdict, "NOT proven")


def as_json(audits: list[PartitionAudit], verdict: Verdict) -> dict[str, Any]:
    """For programs."""
    return {
        "verdict": verdict,
        "partitions": [
            {
                "topic": each.topic_partition.topic,
                "partition": each.topic_partition.partition,
                "verdict": each.verdict,
                "first_offset": each.offsets.lo,
                "next_offset": each.offsets.hi,
                "rows": each.rows,
                "deletes": each.deletes,
                "parked": each.parked,
                "refused_by_sink": each.refused_by_sink,
                "rows_in_store": each.in_store,
                "rows_in_sink": each.in_sink,
                "differences": [
                    {
                        "where": difference.where,
                        "kind": difference.kind,
                        "first_offset": difference.offsets.lo,
                        "next_offset": difference.offsets.hi,
                        "records": difference.records,
                        "detail": difference.detail,
                    }
                    for difference in each.differences
                ],
                "open": each.open,
                "notes": each.notes,
            }
            for each in audits
        ],
    }


def _show(audits: list[PartitionAudit], verdict: Verdict, *, has_sink: bool) -> None:
    listing = Table("partition", "offsets", "rows", "deletes", "parked", "in store", "in sink", "", box=None)
    for number in range(1, 7):
        listing.columns[number].justify = "right"
    for each in audits:
        counts = (each.rows, each.deletes, each.parked, each.in_store, each.in_sink)
        listing.add_row(
            str(each.topic_partition),
            str(each.offsets),
            *("" if count is None else f"{count:,}" for count in counts),
            _in_words(each),
        )
    table_console().print(listing, markup=False)
    for each in audits:
        for difference in each.differences[:_DIFFERENCES_SHOWN]:
            print(f"{each.topic_partition} {difference}")
        if len(each.differences) > _DIFFERENCES_SHOWN:
            print(
                f"{each.topic_partition} and {len(each.differences) - _DIFFERENCES_SHOWN:,} more ranges: --json has all"
            )
        for text in (*each.open, *each.notes):
            print(f"{each.topic_partition} {text}")
    what = "in = state = sink" if has_sink else "in = state (ClickHouse was not compared)"
    words = {
        Verdict.PROVEN: f"proven: {what}",
        Verdict.PROVEN_FROM_START: f"proven from where the log begins: {what}; what it has lost cannot be proven",
    }
    print(words.get(verdict, f"NOT proven: {what}"))
