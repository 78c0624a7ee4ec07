"""The embedded ClickHouse engine (chDB) behind a thread-safe door: `Engine.execute(Statement) -> Outcome`.

Owns the engine's directory; one process may hold it at a time, and one engine may run per process. Settings, `USE` and
temporary tables of one caller never reach another: a session keeps its connection between statements, and outside of
sessions only statements that leave nothing behind on their connection pass it on, which saves most of what a small one
costs. Called by clickhouse_front, from one thread per request. Never fork a process that has opened the engine: the
child hangs.
"""

from __future__ import annotations

import fcntl
import os
import re
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from threading import Condition
from typing import Any

from streams.errors import ConfigurationError, MissingProgramError

SESSION_SECONDS_DEFAULT = 60.0
#: How long `close` waits for statements that are still running.
DRAIN_SECONDS_MAX = 10.0

_ERROR_CODE = re.compile(r"Code: (\d+)\.")
_SETTING_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_.]*\Z")
_COMMENTS = rb"(?:\s|--[^\n]*\n|/\*.*?\*/)*"
_QUOTED = rb"`(?:[^`\\]|\\.)+`|\"(?:[^\"\\]|\\.)+\""
_IDENTIFIER = rb"(?:\w+|" + _QUOTED + rb")"
#: An insert whose data follows inline. The engine cannot parse binary data there, so it gets it as a file.
_INSERT_HEAD = re.compile(
    rb"(?P<insert>" + _COMMENTS + rb"INSERT\s+INTO\s+(?:TABLE\s+)?"
    rb"" + _IDENTIFIER + rb"(?:\." + _IDENTIFIER + rb")?\s*"
    rb"(?:\((?:[^()`\"]|" + _QUOTED + rb")*+\)\s*)?)"
    rb"(?P<settings>SETTINGS\s+[^;]*?)?\s*\bFORMAT\s+(?P<format>\w+)(?:[ \t]*;?[ \t]*\r?\n|\s|\Z)",
    re.IGNORECASE | re.DOTALL,
)
_READ = re.compile(_COMMENTS + rb"(?:SELECT|WITH)\b", re.IGNORECASE | re.DOTALL)
#: Connections that wait for their next statement, per database.
_IDLE_MAX = 16


class EngineError(Exception):
    """The engine refused a statement. `code` is ClickHouse's error code; the message starts with `Code: <code>.`"""

    def __init__(self, message: str, *, code: int | None = None) -> None:
        if code is not None:
            message = f"Code: {code}. DB::Exception: {message}"
        found = _ERROR_CODE.search(message)
        #: 1002 is ClickHouse's UNKNOWN_EXCEPTION.
        self.code = int(found[1]) if found else 1002
        super().__init__(message[found.start() :] if found else f"Code: 1002. DB::Exception: {message}")


@dataclass(frozen=True)
class Statement:
    """One statement as a client sent it. `sql` may carry the data of an insert behind its FORMAT clause."""

    sql: bytes
    #: The output format of a statement that names none.
    default_format: str = "TabSeparated"
    database: str | None = None
    settings: Mapping[str, str] = field(default_factory=dict)
    parameters: Mapping[str, str] = field(default_factory=dict)
    session: str | None = None
    session_seconds: float = SESSION_SECONDS_DEFAULT
    #: Refuse the statement when the session does not exist yet.
    session_must_exist: bool = False


@dataclass(frozen=True)
class Outcome:
    """What a statement returned: the encoded result, empty for commands, and the engine's counts."""

    body: bytes
    rows_read: int
    bytes_read: int
    rows_written: int
    bytes_written: int


class Engine:
    """One open engine directory."""

    def __init__(self, directory: Path) -> None:
        """Raises ConfigurationError when another process has the directory open, MissingProgramError without chDB."""
        try:
            import chdb
        except ImportError:
            raise MissingProgramError(
                "the embedded ClickHouse engine (chdb) is not installed", hint="pip install 'pintail[local]'"
            ) from None
        self._chdb = chdb
        self._path = str(directory)
        directory.mkdir(parents=True, exist_ok=True)
        _refuse_if_locked(directory)
        try:
            #: Keeps the engine running between statements.
            self._root = chdb.connect(self._path)
        except RuntimeError as error:
            raise ConfigurationError(
                f"the ClickHouse engine cannot open {directory}: {error}",
                hint="only one process may have the directory open, and one process can open only one directory",
            ) from None
        self._scratch = tempfile.TemporaryDirectory(prefix="pintail-clickhouse-")
        self._changed = Condition()
        self._running = 0
        self._closed = False
        self._sessions: dict[str, _Session] = {}
        self._idle: defaultdict[str | None, list[Any]] = defaultdict(list)
        self.version, self.timezone = self._query_text("SELECT version(), timezone()").split("\t")

    def execute(self, statement: Statement) -> Outcome:
        """Run one statement. Raises EngineError. Safe from any thread; statements run side by side."""
        settings = ", ".join(_assignment(name, value) for name, value in statement.settings.items())
        head = _INSERT_HEAD.match(statement.sql)
        if head is not None and head.end() == len(statement.sql):
            head = None
        # The settings of an insert with data are a clause of it.
        to_set = "" if head else settings
        leaves_nothing = head is not None or (not to_set and _READ.match(statement.sql) is not None)
        with self._connection(statement, passed_on=leaves_nothing) as connection:
            try:
                if to_set:
                    connection.query(f"SET {to_set}")
                with self._with_data(head, settings) if head else nullcontext(_text(statement.sql)) as sql:
                    result = connection.query(sql, statement.default_format, params=dict(statement.parameters))
                    return Outcome(
                        body=result.bytes() or b"",
                        rows_read=result.storage_rows_read(),
                        bytes_read=result.storage_bytes_read(),
                        rows_written=result.rows_written(),
                        bytes_written=result.bytes_written(),
                    )
            except (RuntimeError, self._chdb.ChdbError) as error:
                raise EngineError(str(error)) from None
            finally:
                if to_set and statement.session:
                    self._forget(connection, statement.settings)

    def close(self) -> None:
        """Wait for running statements, then release the directory. Idempotent."""
        with self._changed:
            if self._closed:
                return
            self._closed = True
            self._changed.wait_for(lambda: not self._running, timeout=DRAIN_SECONDS_MAX)
            for connection in (*(s.connection for s in self._sessions.values()), *chain(*self._idle.values())):
                connection.close()
            self._sessions.clear()
            self._idle.clear()
        self._root.close()
        self._scratch.cleanup()

    def _forget(self, connection: Any, settings: Iterable[str]) -> None:
        """Settings of one request do not outlive it, even in a session."""
        for name in settings:
            # A setting the engine has just refused cannot be reset, and needs not be.
            with suppress(RuntimeError, self._chdb.ChdbError):
                connection.query(f"SET {name} = DEFAULT")

    def _query_text(self, sql: str) -> str:
        return str(self._root.query(sql, "TabSeparated").bytes().decode().strip())

    @contextmanager
    def _connection(self, statement: Statement, *, passed_on: bool) -> Iterator[Any]:
        """The session's connection, or one that is `passed_on` to the next statement unless this one fails."""
        with self._changed:
            if self._closed:
                raise EngineError("the server is shutting down", code=236)
            session = self._session(statement) if statement.session else None
            idle = self._idle[statement.database]
            found = session.connection if session else idle.pop() if idle and passed_on else None
            self._running += 1
        connection = found
        try:
            if connection is None:
                connection = self._chdb.connect(self._path)
            if statement.database is not None and (found is None or session):
                self._use(connection, statement.database)
            yield connection
        except BaseException:
            passed_on = False
            raise
        finally:
            with self._changed:
                self._running -= 1
                if session is not None:
                    session.busy = False
                    session.expires_at = time.monotonic() + statement.session_seconds
                elif passed_on and len(idle) < _IDLE_MAX:
                    idle.append(connection)
                elif connection is not None:
                    connection.close()
                self._changed.notify_all()

    def _use(self, connection: Any, database: str) -> None:
        try:
            connection.query("USE `" + database.replace("\\", "\\\\").replace("`", "\\`") + "`")
        except (RuntimeError, self._chdb.ChdbError) as error:
            raise EngineError(str(error)) from None

    def _session(self, statement: Statement) -> _Session:
        """The statement's session, taken for it. Call with the lock held."""
        name = statement.session
        assert name is not None
        now = time.monotonic()
        for expired in [n for n, s in self._sessions.items() if not s.busy and s.expires_at < now]:
            self._sessions.pop(expired).connection.close()
        session = self._sessions.get(name)
        if session is None:
            if statement.session_must_exist:
                raise EngineError(f"Session {name} not found. (SESSION_NOT_FOUND)", code=372)
            session = self._sessions[name] = _Session(self._chdb.connect(self._path))
        if session.busy:
            raise EngineError(f"Session {name} is locked by a concurrent client. (SESSION_IS_LOCKED)", code=373)
        session.busy = True
        return session

    @contextmanager
    def _with_data(self, head: re.Match[bytes], settings: str) -> Iterator[str]:
        """An insert as text, its data in a file that exists for its duration. Its own settings come last: they win."""
        insert, own, data_format = (_text(head[name] or b"") for name in ("insert", "settings", "format"))
        clauses = ", ".join(filter(None, (settings, own.strip()[len("SETTINGS") :])))
        descriptor, path = tempfile.mkstemp(dir=self._scratch.name)
        try:
            with os.fdopen(descriptor, "wb") as file:
                file.write(memoryview(head.string)[head.end() :])
            yield f"{insert} FROM INFILE '{path}' {clauses and f'SETTINGS {clauses}'} FORMAT {data_format}"
        finally:
            Path(path).unlink()


@dataclass
class _Session:
    connection: Any
    busy: bool = False
    expires_at: float = 0.0


def _assignment(name: str, value: str) -> str:
    if not _SETTING_NAME.match(name):
        raise EngineError(f"Unknown setting '{name}'. (UNKNOWN_SETTING)", code=115)
    return f"{name} = '" + value.replace("\\", "\\\\").replace("'", "\\'") + "'"


def _text(sql: bytes) -> str:
    try:
        return sql.decode()
    except UnicodeDecodeError as error:
        raise EngineError(f"Syntax error: the statement is not UTF-8: {error}. (SYNTAX_ERROR)", code=62) from None


def _refuse_if_locked(directory: Path) -> None:
    """ConfigurationError if another process holds the lock that the engine takes on its status file."""
    try:
        with (directory / "status").open("rb") as status:
            fcntl.flock(status, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except FileNotFoundError:
        return
    except BlockingIOError:
        raise ConfigurationError(
            f"{directory} is open in another process",
            hint="use the ClickHouse that is running there, stop it, or choose another directory",
        ) from None
