"""What DuckDB raises, as refusals that tell the asker what to change.

DuckDB's own message is passed on where it is about the query. Where it could be about the store (files, transactions)
the asker learns only that the worker failed, and the worker's log has the rest.
"""

from __future__ import annotations

import logging
import re

import duckdb

from schemas.messages import RefusalCode
from streams.adapters.duckdb_guard import GuardedQuery
from streams.errors import QueryRefusedError

log = logging.getLogger(__name__)

_UNKNOWN_COLUMN = re.compile(r'Referenced (?:column|table) "|does not have a column named')
_HINT = "correct the statement or its parameters"
#: Faults of the query or of the values it meets; everything else is the worker's.
_ABOUT_THE_QUERY = (
    duckdb.BinderException,
    duckdb.CatalogException,
    duckdb.ConversionException,
    duckdb.InvalidInputException,
    duckdb.InvalidTypeException,
    duckdb.NotImplementedException,
    duckdb.OutOfRangeException,
    duckdb.ParserException,
    duckdb.SyntaxException,
    duckdb.TypeMismatchException,
)


def refusal_of(error: duckdb.Error, query: GuardedQuery, *, interrupted: bool) -> QueryRefusedError:
    """The refusal for an error that a guarded query raised while it was prepared or ran."""
    message = str(error)
    match error:
        case duckdb.InterruptException() if interrupted:
            return QueryRefusedError(
                "the query was interrupted at its deadline",
                code=RefusalCode.DEADLINE_EXCEEDED,
                hint="give a longer deadline_ms, or ask for less",
            )
        case duckdb.OutOfMemoryException():
            return QueryRefusedError(
                "the query needs more memory than the store allows",
                code=RefusalCode.OVERLOADED,
                hint="filter or aggregate earlier, or ask for less at once",
            )
        case duckdb.BinderException() if _UNKNOWN_COLUMN.search(message):
            return QueryRefusedError(message, code=RefusalCode.UNKNOWN_COLUMN, hint=query.columns_hint or _HINT)
        case duckdb.InvalidInputException() if "parameter" in message.partition("\n")[0].lower():
            return QueryRefusedError(
                message,
                code=RefusalCode.BAD_PARAMS,
                hint="params is a list for ? and $1, and an object for $name",
            )
        case _ if isinstance(error, _ABOUT_THE_QUERY):
            return QueryRefusedError(message, code=RefusalCode.BAD_SQL, hint=query.columns_hint or _HINT)
    log.error("a query failed in the store: %s", message)
    return QueryRefusedError(
        "the store failed on this query", code=RefusalCode.INTERNAL, hint="the worker's log has the details"
    )


def too_many_rows(rows_max: int) -> QueryRefusedError:
    """The answer has more rows than allowed."""
    return QueryRefusedError(
        f"the answer has more than {rows_max} rows",
        code=RefusalCode.TOO_MANY_ROWS,
        hint="add LIMIT, filter, or aggregate; limits.rows of the request and query_rows_max of the worker cap it",
    )


def too_many_bytes(bytes_max: int) -> QueryRefusedError:
    """The answer is larger than allowed."""
    return QueryRefusedError(
        f"the answer is larger than {bytes_max} bytes",
        code=RefusalCode.TOO_MANY_BYTES,
        hint="select less; limits.bytes of the request and query_answer_bytes_max of the worker cap it",
    )


def not_serving(message: str) -> QueryRefusedError:
    """What was asked for is not SERVING here, and will be here or elsewhere."""
    return QueryRefusedError(
        message, code=RefusalCode.NOT_SERVING, hint="ask again: the partition is on its way to SERVING", retriable=True
    )
