"""DB-API 2.0 (PEP 249) over the query topic, for tools that speak it. Read-only: there is nothing to commit.

    from pintail import dbapi

    with dbapi.connect() as connection, connection.cursor() as cursor:
        cursor.execute("SELECT name FROM airlines WHERE carrier = ?", ["UA"])
        print(cursor.fetchall())

Answers come as Arrow, so values are Python's own types: Decimal, datetime, UUID, lists, dicts.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from types import TracebackType
from typing import Any, Self

from schemas.errors import PintailError
from schemas.messages import RefusalCode
from streams.client.answer import Answer
from streams.client.blocking import Client
from streams.config import Settings
from streams.errors import QueryRefusedError
from streams.limits import QUERY_DEADLINE_MS_DEFAULT

apilevel = "2.0"
#: Threads may share the module and connections.
threadsafety = 2
#: ? and $1; an object for $name.
paramstyle = "qmark"


class Warning(Exception):  # noqa: A001, N818  # PEP 249's name
    """Never raised."""


class Error(Exception):
    """Every error of this module; `__cause__` is Pintail's own, with its hint."""


class InterfaceError(Error):
    """The module was used wrongly: a closed cursor, rows before a statement."""


class DatabaseError(Error):
    """A query has no answer."""


class DataError(DatabaseError):
    """The answer is over a limit."""


class OperationalError(DatabaseError):
    """Kafka or the workers: away, moving, overloaded, too slow. Asking again may help."""


class IntegrityError(DatabaseError):
    """Never raised: nothing is written."""


class InternalError(DatabaseError):
    """A worker failed; its log says more."""


class ProgrammingError(DatabaseError):
    """The statement or its parameters are at fault."""


class NotSupportedError(DatabaseError):
    """What the dialect does not allow, and everything that writes."""


_ERRORS: dict[str, type[DatabaseError]] = {
    RefusalCode.NOT_ALLOWED: NotSupportedError,
    RefusalCode.TOO_MANY_ROWS: DataError,
    RefusalCode.TOO_MANY_BYTES: DataError,
    RefusalCode.INTERNAL: InternalError,
    RefusalCode.BAD_SQL: ProgrammingError,
    RefusalCode.BAD_PARAMS: ProgrammingError,
    RefusalCode.NOT_A_REQUEST: ProgrammingError,
    RefusalCode.UNKNOWN_TABLE: ProgrammingError,
    RefusalCode.UNKNOWN_COLUMN: ProgrammingError,
}
Row = tuple[Any, ...]
#: name, type, and five that are unknown.
ColumnDescription = tuple[str, str, None, None, None, None, None]


def connect(settings: Settings | None = None, *, deadline_ms: int = QUERY_DEADLINE_MS_DEFAULT) -> Connection:
    """Connects to the Kafka of `settings`; without them, to that of the environment or the local stack.

    `deadline_ms` is that of each statement. Raises OperationalError."""
    try:
        return Connection(Client.connect(settings), deadline_ms)
    except PintailError as error:
        raise OperationalError(str(error)) from error


class Connection:
    """Share it; close it, or use it as a context."""

    Warning = Warning
    Error = Error
    InterfaceError = InterfaceError
    DatabaseError = DatabaseError
    DataError = DataError
    OperationalError = OperationalError
    IntegrityError = IntegrityError
    InternalError = InternalError
    ProgrammingError = ProgrammingError
    NotSupportedError = NotSupportedError

    def __init__(self, client: Client, deadline_ms: int) -> None:
        self._client: Client | None = client
        self._deadline_ms = deadline_ms

    def cursor(self) -> Cursor:
        """For one statement after the other."""
        self._open()
        return Cursor(self)

    def close(self) -> None:
        """Disconnects. Idempotent."""
        if self._client is not None:
            self._client.close()
            self._client = None

    def commit(self) -> None:
        """Does nothing: there is nothing to commit."""
        self._open()

    def rollback(self) -> None:
        """Raises NotSupportedError: nothing is written, so nothing can be taken back."""
        raise NotSupportedError("queries only read")

    def ask(self, sql: str, params: Sequence[Any] | Mapping[str, Any]) -> Answer:
        """One answer. Raises DatabaseError."""
        try:
            return self._open().query(sql, params, deadline_ms=self._deadline_ms, format="arrow")
        except QueryRefusedError as error:
            kind = OperationalError if error.retriable else _ERRORS.get(error.code, OperationalError)
            raise kind(str(error)) from error
        except PintailError as error:
            raise OperationalError(str(error)) from error

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _open(self) -> Client:
        if self._client is None:
            raise InterfaceError("the connection is closed")
        return self._client


class Cursor:
    """Runs a statement and hands out its rows."""

    def __init__(self, connection: Connection) -> None:
        self.connection = connection
        self.arraysize = 1
        self._answer: Answer | None = None
        self._next = 0
        self._is_closed = False

    @property
    def description(self) -> list[ColumnDescription] | None:
        """One a column: name and DuckDB type; None before a statement."""
        if self._answer is None:
            return None
        return [(column.name, column.type, None, None, None, None, None) for column in self._answer.columns]

    @property
    def rowcount(self) -> int:
        """Rows of the answer; -1 before a statement."""
        return -1 if self._answer is None else len(self._answer)

    @property
    def answer(self) -> Answer:
        """The answer with its offsets and epoch, as Arrow, pandas or polars. Not of PEP 249."""
        if self._is_closed or self._answer is None:
            raise InterfaceError("the cursor is closed" if self._is_closed else "execute a statement first")
        return self._answer

    def execute(self, operation: str, parameters: Sequence[Any] | Mapping[str, Any] = ()) -> Self:
        """Asks; the cursor then has the rows of the answer. Raises DatabaseError."""
        if self._is_closed:
            raise InterfaceError("the cursor is closed")
        self._answer, self._next = None, 0
        self._answer = self.connection.ask(operation, parameters)
        return self

    def executemany(self, operation: str, seq_of_parameters: Sequence[Any]) -> None:
        """Raises NotSupportedError: it is for statements that write."""
        del operation, seq_of_parameters
        raise NotSupportedError("queries only read; execute one statement for each set of parameters")

    def fetchone(self) -> Row | None:
        """The next row; None after the last one."""
        return next(iter(self.fetchmany(1)), None)

    def fetchmany(self, size: int | None = None) -> list[Row]:
        """The next rows, `arraysize` without a size."""
        first, self._next = self._next, self._next + (self.arraysize if size is None else size)
        return list(self.answer.rows[first : self._next])

    def fetchall(self) -> list[Row]:
        """The rows that are left."""
        return self.fetchmany(len(self.answer))

    def close(self) -> None:
        """Idempotent."""
        self._is_closed = True

    def setinputsizes(self, sizes: Sequence[Any]) -> None:
        """Does nothing, as PEP 249 allows."""

    def setoutputsize(self, size: int, column: int | None = None) -> None:
        """Does nothing, as PEP 249 allows."""

    def __iter__(self) -> Iterator[Row]:
        while (row := self.fetchone()) is not None:
            yield row

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
