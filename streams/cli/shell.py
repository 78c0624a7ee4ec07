r"""`pintail shell`: asks one statement after the other. Statements end with `;`, commands begin with `\`.

On a terminal it has a history and completes tables, columns and keywords; from a pipe it runs what it reads.
"""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Generator, Iterable, Iterator
from pathlib import Path
from typing import Any, Protocol

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from schemas.catalog import Catalog, load_catalog
from schemas.duckdb_ddl import duckdb_type
from streams.cli.output import table_console
from streams.cli.query import footer, rich_table
from streams.client.answer import Answer
from streams.client.blocking import Client
from streams.client.subscription import Change
from streams.config import load_settings
from streams.errors import PintailError, QueryRefusedError

PROMPT, PROMPT_WITHIN = "pintail> ", "      -> "
WATCH_SECONDS_DEFAULT = 2.0
_WATCH_SECONDS_MIN = 0.1
#: How long \watch tries to subscribe.
_SUBSCRIBING_MS_MAX = 1_000
_HISTORY_LINES_MAX = 1_000
_KEYWORDS = """
    SELECT FROM WHERE GROUP BY ORDER LIMIT HAVING DISTINCT JOIN LEFT ON USING AS AND OR NOT NULL IS IN LIKE BETWEEN CASE
    WHEN THEN ELSE END WITH UNION ALL COUNT SUM AVG MIN MAX DESC ASC
"""
_HELP = r"""
  SELECT ...;       asks; a statement may have several lines
  \d                the tables
  \d TABLE          its columns
  \timing           whether to say how long answers took, and what they reflect
  \watch [SECONDS]  the answer of the last statement, and again when it has changed, at most once in so many seconds,
                    until Ctrl-C; where no subscription is to be had, it is asked again and again
  \q                ends (Ctrl-D too)
""".strip("\n")


class Asking(Protocol):
    """What the shell needs of a client."""

    def query(self, sql: str, params: Any = None) -> Answer:
        """Raises PintailError."""
        ...

    def subscribe(self, sql: str, *, every_ms: int, deadline_ms: int) -> Generator[Change, None, None]:
        """Raises PintailError."""
        ...


def register(app: typer.Typer) -> None:
    """Adds the command to `app`."""
    app.command()(shell)


def shell() -> None:
    """Ask one statement after the other: history, completion, \\d, \\watch, \\timing."""
    settings = load_settings()
    catalog = load_catalog(settings.tables_dir)
    with Client.connect(settings) as client:
        running = Shell(client, catalog, table_console())
        if not sys.stdin.isatty():
            running.run(sys.stdin)
            raise typer.Exit(int(running.failed))
        with line_editing(catalog, settings.data_dir / "shell_history"):
            print(r"\? lists the commands, \q ends")
            running.run(lines_of_terminal(running))


class Shell:
    """Takes lines, prints answers."""

    def __init__(self, client: Asking, catalog: Catalog, console: Console) -> None:
        self._client = client
        self._catalog = catalog
        self._console = console
        self._statement: list[str] = []
        self._last = ""
        self._is_timing = True
        self.failed = False

    @property
    def is_within_statement(self) -> bool:
        """Whether the next line continues a statement."""
        return bool(self._statement)

    def run(self, lines: Iterable[str]) -> None:
        """Until the lines end, or \\q."""
        for line in lines:
            if line.strip() == r"\q":
                return
            self.take(line)
        if self._statement:
            self.take(";")

    def take(self, line: str) -> None:
        """One line: a command, or a part of a statement."""
        stripped = line.strip()
        if not self._statement and stripped.startswith("\\"):
            self._command(*stripped.split(maxsplit=1))
        elif stripped or self._statement:
            self._statement.append(line.rstrip("\n"))
            if stripped.endswith(";"):
                self._last, self._statement = "\n".join(self._statement).strip().rstrip(";").strip(), []
                self.ask()

    def drop(self) -> None:
        """Forgets the statement that was begun."""
        self._statement = []

    def ask(self) -> None:
        """The last statement, again."""
        if not self._last.strip():
            return
        started = time.perf_counter()
        try:
            answer = self._client.query(self._last)
        except PintailError as error:
            self._complain(str(error))
            return
        took_ms = (time.perf_counter() - started) * 1000
        self._show(answer, f" · round trip {took_ms:.1f} ms")

    def _show(self, answer: Answer, more: str = "") -> None:
        self._console.print(rich_table(answer))
        if self._is_timing:
            self._console.print(Text(f"{footer(answer)}{more}", style="dim"))

    def _complain(self, fault: str) -> None:
        self.failed = True
        self._console.print(Text(fault, style="red"))

    def _command(self, name: str, argument: str = "") -> None:
        match name:
            case r"\d":
                self._describe(argument.strip().rstrip(";"))
            case r"\timing":
                self._is_timing = not self._is_timing
                self._console.print(f"timing is {'on' if self._is_timing else 'off'}")
            case r"\watch":
                self._watch(argument)
            case r"\?":
                self._console.print(Text(_HELP))
            case _:
                self._complain(rf"there is no {name}; \? lists the commands")

    def _describe(self, name: str) -> None:
        grid = Table(show_edge=False)
        if not name:
            for title in ("table", "topic", "key", "partitions"):
                grid.add_column(title)
            for table in self._catalog.tables:
                grid.add_row(table.name, table.topic, ", ".join(table.primary_key), str(table.partitions))
        else:
            known = {table.name.lower(): table for table in self._catalog.tables}
            if name.lower() not in known:
                self._complain(f"there is no table {name}; tables: {', '.join(known)}")
                return
            for title in ("column", "type", "null"):
                grid.add_column(title)
            for column in known[name.lower()].columns:
                grid.add_row(column.name, duckdb_type(column.type), "" if column.nullable else "not null")
        self._console.print(grid)

    def _watch(self, seconds: str) -> None:
        try:
            every_ms = int(max(float(seconds or WATCH_SECONDS_DEFAULT), _WATCH_SECONDS_MIN) * 1000)
        except (ValueError, OverflowError):
            self._complain(rf"\watch takes seconds, not {seconds}")
            return
        if not self._last:
            return
        with contextlib.suppress(KeyboardInterrupt):
            try:
                self._follow(every_ms)
            except PintailError as error:
                if isinstance(error, QueryRefusedError) and not error.retriable:
                    self._complain(str(error))
                    return
            while True:  # a question may be answered where a subscription is not: by several workers, or later
                self.ask()
                time.sleep(every_ms / 1000)

    def _follow(self, every_ms: int) -> None:
        """Shows the changes of a subscription to the last statement. Raises PintailError when it ends."""
        changes = self._client.subscribe(self._last, every_ms=every_ms, deadline_ms=_SUBSCRIBING_MS_MAX)
        with contextlib.closing(changes):
            for change in changes:
                self._show(change.answer)


def lines_of_terminal(running: Shell) -> Iterator[str]:
    """What somebody types; Ctrl-C drops what was begun, Ctrl-D ends."""
    while True:
        try:
            yield input(PROMPT_WITHIN if running.is_within_statement else PROMPT)
        except KeyboardInterrupt:
            running.drop()
            print()
        except EOFError:
            print()
            return


def completions(catalog: Catalog, prefix: str) -> list[str]:
    """Tables, columns and keywords that begin so."""
    names = [table.name for table in catalog.tables]
    names += sorted({column for table in catalog.tables for column in table.column_names})
    wanted = prefix.lower()
    return [name for name in (*names, *_KEYWORDS.split()) if name.lower().startswith(wanted)]


@contextlib.contextmanager
def line_editing(catalog: Catalog, history: Path) -> Iterator[None]:
    """History and completion while it lasts, where Python has readline."""
    try:
        import readline
    except ImportError:
        yield
        return

    def complete(prefix: str, number: int) -> str | None:
        found = completions(catalog, prefix)
        return found[number] if number < len(found) else None

    readline.set_completer(complete)
    readline.parse_and_bind("tab: complete")
    with contextlib.suppress(OSError):
        readline.read_history_file(history)
    try:
        yield
    finally:
        readline.set_history_length(_HISTORY_LINES_MAX)
        with contextlib.suppress(OSError):
            history.parent.mkdir(parents=True, exist_ok=True)
            readline.write_history_file(history)
