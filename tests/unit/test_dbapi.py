"""DB-API 2.0 over a client that answers from a script."""

from __future__ import annotations

from typing import Any, cast

import pytest

from schemas.messages import RefusalCode
from streams.client import Answer, Client, dbapi
from streams.errors import QueryRefusedError, RequestTimeoutError
from tests.unit.test_cli_query import ANSWER


class Scripted:
    """A client whose every answer is the same, or a fault."""

    def __init__(self, outcome: Answer | Exception = ANSWER) -> None:
        self.outcome = outcome
        self.asked: list[tuple[str, Any, Any]] = []
        self.is_closed = False

    def query(self, sql: str, params: Any, **options: Any) -> Answer:
        self.asked.append((sql, params, options))
        if isinstance(self.outcome, Exception):
            raise self.outcome
        return self.outcome

    def close(self) -> None:
        self.is_closed = True


def connected(client: Scripted) -> dbapi.Connection:
    return dbapi.Connection(cast(Client, client), 700)


def test_the_module_says_what_pep_249_asks_for() -> None:
    assert (dbapi.apilevel, dbapi.threadsafety, dbapi.paramstyle) == ("2.0", 2, "qmark")
    assert issubclass(dbapi.ProgrammingError, dbapi.DatabaseError)
    assert issubclass(dbapi.DatabaseError, dbapi.Error)
    assert issubclass(dbapi.InterfaceError, dbapi.Error)
    assert dbapi.Connection.DataError is dbapi.DataError


def test_rows_are_fetched_one_some_and_all() -> None:
    client = Scripted()
    with connected(client) as connection, connection.cursor() as cursor:
        assert (cursor.description, cursor.rowcount) == (None, -1)
        assert cursor.execute("SELECT ?", [1]) is cursor
        assert client.asked == [("SELECT ?", [1], {"deadline_ms": 700, "format": "arrow"})]
        assert cursor.description is not None
        assert [each[:2] for each in cursor.description] == [
            ("carrier", "VARCHAR"),
            ("n", "BIGINT"),
            ("stops", "VARCHAR[]"),
        ]
        assert cursor.rowcount == 3
        assert cursor.fetchone() == ("AA", 14, ["JFK"])
        assert cursor.fetchmany(1) == [(None, 2, None)]
        assert cursor.fetchall() == [("[bold]x", 0, [])]
        assert cursor.fetchone() is None
        assert cursor.fetchall() == []
        assert len(list(cursor.execute("SELECT 1"))) == 3
        assert cursor.answer.offsets == {"flights": {0: 10, 1: 7}}
    assert client.is_closed


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (QueryRefusedError("x", code=RefusalCode.BAD_SQL), dbapi.ProgrammingError),
        (QueryRefusedError("x", code=RefusalCode.NOT_ALLOWED), dbapi.NotSupportedError),
        (QueryRefusedError("x", code=RefusalCode.TOO_MANY_ROWS), dbapi.DataError),
        (QueryRefusedError("x", code=RefusalCode.INTERNAL), dbapi.InternalError),
        (QueryRefusedError("x", code=RefusalCode.NOT_SERVING, retriable=True), dbapi.OperationalError),
        (RequestTimeoutError("x"), dbapi.OperationalError),
    ],
)
def test_refusals_have_the_classes_of_pep_249(error: Exception, kind: type[dbapi.Error]) -> None:
    with pytest.raises(kind) as caught:
        connected(Scripted(error)).cursor().execute("SELECT 1")
    assert type(caught.value) is kind
    assert caught.value.__cause__ is error


def test_wrong_use_is_an_interface_error_and_writes_are_not_supported() -> None:
    connection = connected(Scripted())
    cursor = connection.cursor()
    with pytest.raises(dbapi.InterfaceError, match="execute a statement first"):
        cursor.fetchone()
    with pytest.raises(dbapi.NotSupportedError):
        cursor.executemany("INSERT", [])
    with pytest.raises(dbapi.NotSupportedError):
        connection.rollback()
    connection.commit()
    cursor.close()
    with pytest.raises(dbapi.InterfaceError, match="cursor is closed"):
        cursor.execute("SELECT 1")
    connection.close()
    with pytest.raises(dbapi.InterfaceError, match="connection is closed"):
        connection.cursor()
