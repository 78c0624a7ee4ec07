"""`pintail query`: asks one query and prints the answer. Rows go to stdout, what is known about them to stderr."""

from __future__ import annotations

import contextlib
import csv
import os
import re
import sys
from collections.abc import Callable
from enum import StrEnum
from io import StringIO
from pathlib import Path
from typing import Annotated, Any

import orjson
import pyarrow as pa
import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from streams.cli.history import ask_history
from streams.cli.output import table_console
from streams.client.answer import Answer
from streams.client.blocking import Client
from streams.config import load_settings
from streams.errors import ConfigurationError
from streams.limits import QUERY_DEADLINE_MS_DEFAULT

_NAMED_PARAM = re.compile(r"([A-Za-z_]\w*)=(.*)", re.DOTALL)
_NUMBER_TYPES = re.compile(r"U?(TINY|SMALL|BIG|HUGE)?INT(EGER)?$|DECIMAL|DOUBLE|FLOAT")


class OutputFormat(StrEnum):
    """How rows are printed."""

    TABLE = "table"
    JSON = "json"
    CSV = "csv"
    ARROW = "arrow"


def register(app: typer.Typer) -> None:
    """Adds the command to `app`."""
    app.command()(query)


def query(
    sql: Annotated[str, typer.Argument(help="One SELECT statement.", show_default=False)],
    param: Annotated[
        list[str] | None,
        typer.Option(help="Value for ? or $1, or name=value for $name; JSON where it parses, else text. Repeatable."),
    ] = None,
    key: Annotated[str | None, typer.Option(help="Ask only the partition that owns this record key.")] = None,
    output_format: Annotated[OutputFormat, typer.Option("--format", "-f", help="Output.")] = OutputFormat.TABLE,
    deadline_ms: Annotated[int, typer.Option(help="Milliseconds, at most 120,000.")] = QUERY_DEADLINE_MS_DEFAULT,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Write rows to this file.")] = None,
    subscribe: Annotated[
        int | None,
        typer.Option(
            metavar="MS", min=1, help="Print again when rows have changed, at most once in so many ms, until Ctrl-C."
        ),
    ] = None,
    history: Annotated[
        bool, typer.Option("--history", help="Ask ClickHouse, which keeps what the store lets go.")
    ] = False,
) -> None:
    """Ask a query over the query topic, for example "SELECT carrier, count(*) FROM flights GROUP BY ALL"."""
    if output_format is OutputFormat.ARROW and output is None and sys.stdout.isatty():
        raise ConfigurationError("an Arrow stream is not for a terminal", hint="give --output FILE, or pipe it")
    if output is not None:
        _check_output(output)
    params = parse_params(param or [])
    if subscribe is not None:
        if history or output is not None or output_format is OutputFormat.ARROW:
            raise ConfigurationError("--subscribe prints tables, JSON or CSV", hint="leave out --history and --output")
        with Client.connect(load_settings()) as client, contextlib.suppress(KeyboardInterrupt):
            for change in client.subscribe(sql, params, key=key, every_ms=subscribe, deadline_ms=deadline_ms):
                _print(change.answer, output_format)
        return
    if history:
        answer = ask_history(sql, params, deadline_ms=deadline_ms, as_arrow=output_format is OutputFormat.ARROW)
    else:
        with Client.connect(load_settings()) as client:
            answer = client.query(
                sql,
                params,
                key=key,
                deadline_ms=deadline_ms,
                format="arrow" if output_format is OutputFormat.ARROW else "json",
            )
    if output is None:
        _print(answer, output_format)
    else:
        _write(output, _ENCODERS[output_format](answer))
        print(footer(answer), file=sys.stderr)


def _print(answer: Answer, output_format: OutputFormat) -> None:
    if output_format is OutputFormat.TABLE:
        table_console().print(rich_table(answer))
    else:
        sys.stdout.buffer.write(_ENCODERS[output_format](answer))
        sys.stdout.buffer.flush()
    print(footer(answer), file=sys.stderr)


def _check_output(path: Path) -> None:
    """Finds out before the query runs that its rows could not be written; touches nothing."""
    if path.is_dir():
        raise _not_writable(path, "it is a folder")
    if not path.parent.is_dir():
        raise _not_writable(path, f"there is no folder {path.parent}")
    if not os.access(path if path.exists() else path.parent, os.W_OK):
        raise _not_writable(path, "permission denied")


def _write(path: Path, encoded: bytes) -> None:
    try:
        path.write_bytes(encoded)
    except OSError as error:
        raise _not_writable(path, error.strerror or repr(error)) from None


def _not_writable(path: Path, fault: str) -> ConfigurationError:
    return ConfigurationError(
        f"the rows cannot be written to {path}: {fault}", hint="give --output a file in a folder that can be written to"
    )


def parse_params(texts: list[str]) -> list[Any] | dict[str, Any]:
    """Positional or named parameters. Raises ConfigurationError for a mixture."""
    matches = [_NAMED_PARAM.fullmatch(text) for text in texts]
    named = {match[1]: _value(match[2]) for match in matches if match}
    if not named:
        return [_value(text) for text in texts]
    if not all(matches):
        raise ConfigurationError(
            "--param mixes name=value and plain values", hint="name all of them, or quote text that has an =: '\"a=b\"'"
        )
    return named


def _value(text: str) -> Any:
    try:
        return orjson.loads(text)
    except orjson.JSONDecodeError:
        return text


def rich_table(answer: Answer) -> Table:
    """For people: numbers to the right, NULL visible and unlike the text 'NULL'."""
    table = Table(show_edge=False)
    for column in answer.columns:
        numeric = _NUMBER_TYPES.match(column.type) and not column.type.endswith("]")
        table.add_column(Text(column.name), justify="right" if numeric else "left", overflow="fold")
    for row in answer.rows:
        # Text, because values are data and not rich's markup.
        table.add_row(*(Text("NULL", style="dim") if value is None else Text(_cell(value)) for value in row))
    return table


def _cell(value: Any) -> str:
    return value if isinstance(value, str) else orjson.dumps(value).decode()


def _table_bytes(answer: Answer) -> bytes:
    console = Console(file=StringIO(), width=10_000)
    with console.capture() as captured:
        console.print(rich_table(answer))
    return captured.get().encode()


def _json_bytes(answer: Answer) -> bytes:
    rows = [orjson.dumps(row) for row in answer.to_dicts()]
    return b"[" + b",\n ".join(rows) + b"]\n"


def _csv_bytes(answer: Answer) -> bytes:
    text = StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(answer.column_names)
    writer.writerows(["" if value is None else _cell(value) for value in row] for row in answer.rows)
    return text.getvalue().encode()


def _arrow_bytes(answer: Answer) -> bytes:
    table, sink = answer.to_arrow(), pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    return bytes(sink.getvalue())


_ENCODERS: dict[OutputFormat, Callable[[Answer], bytes]] = {
    OutputFormat.TABLE: _table_bytes,
    OutputFormat.JSON: _json_bytes,
    OutputFormat.CSV: _csv_bytes,
    OutputFormat.ARROW: _arrow_bytes,
}


def footer(answer: Answer) -> str:
    """How many rows, how long, and the positions that they reflect."""
    timing = answer.timing
    spent_ms = timing.queued_ms + timing.waited_ms + timing.executed_ms
    positions = [
        f"{topic} [" + ", ".join(f"{partition}: {offset}" for partition, offset in sorted(partitions.items())) + "]"
        for topic, partitions in sorted(answer.offsets.items())
    ]
    rows = "1 row" if len(answer) == 1 else f"{len(answer)} rows"
    return " · ".join([rows, f"{spent_ms:.1f} ms", *(["as of " + ", ".join(positions)] if positions else [])])
