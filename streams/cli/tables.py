"""`pintail tables`: lists the tables, shows what is generated from one, checks a folder of table files."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from schemas import arrow_schema, clickhouse_ddl, duckdb_ddl, json_schema
from schemas.catalog import check_together, load_catalog, table_folders
from schemas.parser import parse_table
from schemas.table import TableDefinition
from schemas.table_options import format_retention
from schemas.table_sql import table_sql
from streams.cli.output import table_console
from streams.config import load_settings
from streams.errors import TableFileError


class Form(StrEnum):
    """What `show` prints a table as."""

    SQL = "sql"
    DUCKDB = "duckdb"
    CLICKHOUSE = "clickhouse"
    ARROW = "arrow"
    JSONSCHEMA = "jsonschema"


_RENDER: dict[Form, Callable[[TableDefinition], str]] = {
    Form.SQL: table_sql,
    Form.DUCKDB: lambda table: duckdb_ddl.create_table_sql(table, qualified_name=table.name) + ";",
    Form.CLICKHOUSE: lambda table: clickhouse_ddl.create_table_sql(table) + ";",
    Form.ARROW: lambda table: arrow_schema.rows_schema(table).to_string(),
    Form.JSONSCHEMA: lambda table: json.dumps(json_schema.json_schema(table), indent=2, ensure_ascii=False),
}

commands = typer.Typer(invoke_without_command=True, help="List the tables, show what is generated, check table files.")


def register(app: typer.Typer) -> None:
    """Adds the command to `app`."""
    app.add_typer(commands, name="tables")


@commands.callback()
def list_tables(context: typer.Context) -> None:
    """List the tables; with a subcommand, show one or check their files."""
    if context.invoked_subcommand is not None:
        return
    listing = Table("table", "topic", "key", "partitions", "columns", "retention", "version", box=None)
    for table in load_catalog(load_settings().tables_dir).tables:
        retention = "for ever" if table.retention_seconds is None else format_retention(table.retention_seconds)
        listing.add_row(
            table.name,
            table.topic,
            ", ".join(table.primary_key) or "none, appends",
            str(table.partitions),
            str(len(table.columns)),
            retention,
            str(table.schema_version),
        )
    table_console().print(listing)


@commands.command()
def show(
    name: Annotated[str, typer.Argument(metavar="TABLE", help="Name of the table")],
    form: Annotated[Form, typer.Option("--as", help="What to print it as")] = Form.SQL,
) -> None:
    """Print one table, or what is generated from it."""
    print(_RENDER[form](load_catalog(load_settings().tables_dir).by_name(name)))


@commands.command()
def check(
    directory: Annotated[
        Path | None, typer.Argument(metavar="[DIR]", help="Folder with a folder per table; default: the configured one")
    ] = None,
) -> None:
    """Check all table files; each faulty table is reported with its first fault."""
    parsed, faults = [], []
    for folder in table_folders(directory or load_settings().tables_dir):
        try:
            parsed.append(parse_table(folder))
        except TableFileError as fault:
            faults.append(fault)
    try:
        check_together(parsed)
    except TableFileError as disagreement:
        faults.append(disagreement)
    for each in faults:
        print(f"{each.message}\n  what to do: {each.hint}", file=sys.stderr)
    if faults:
        raise typer.Exit(1)
    for table in (entry.table for entry in parsed):
        print(f"{table.name}: {len(table.columns)} columns, version {table.schema_version}")
