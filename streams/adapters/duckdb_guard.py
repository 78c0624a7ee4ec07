"""Lets a query through only if it is one SELECT of the dialect over tables of the catalog (D12).

DuckDB parses the text (`json_serialize_sql`), `duckdb_inspection` walks the tree. The type of a statement proves
nothing: DuckDB reports SELECT for reads of files, settings and other schemas too. Called by `duckdb_queries` before
anything is executed; what passed once is remembered, so that a repeated statement with parameters of similar size costs
only their check.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache, lru_cache
from typing import NoReturn

import duckdb
import orjson
from pydantic import JsonValue

from schemas.catalog import Catalog
from schemas.messages import RefusalCode
from streams.adapters.duckdb_growth import ParameterSize, sizes_of
from streams.adapters.duckdb_inspection import Inspection, Node, only, refuse, too_complex
from streams.adapters.duckdb_patterns import Pattern
from streams.errors import QueryRefusedError
from streams.limits import QUERY_PARAM_CHARS_MAX, QUERY_SQL_CHARS_MAX

_GUARDED_QUERIES_CACHED = 512


@dataclass(frozen=True)
class GuardedQuery:
    """What the guard learnt about a query that may run."""

    #: What was inspected, to be executed: DuckDB takes a statement sooner than its text.
    statement: duckdb.Statement
    #: Names of the catalog's tables that it reads, in alphabetical order.
    tables: tuple[str, ...]
    #: Identifiers of its parameters: "1", "2" ... for positional ones.
    parameters: frozenset[str]
    #: Patterns with parameters in them.
    patterns: tuple[Pattern, ...]
    #: The columns of those tables, in words, for refusals.
    columns_hint: str


class QueryGuard:
    """Checks queries against one catalog. Thread-safe."""

    def __init__(self, catalog: Catalog) -> None:
        self._catalog = catalog
        parser()
        self._inspected = lru_cache(_GUARDED_QUERIES_CACHED)(self._inspect)

    def check(self, sql: str, params: list[JsonValue] | dict[str, JsonValue]) -> GuardedQuery:
        """Raises QueryRefusedError that names the construct and what to use instead."""
        given = params if isinstance(params, dict) else {str(n): value for n, value in enumerate(params, start=1)}
        query = self._inspected(sql, frozenset(sizes_of(given).items()))
        _check_params(query.parameters, given)
        for pattern in query.patterns:
            if fault := pattern.fault(given):
                _refuse_params(fault)
        return query

    def _inspect(self, sql: str, sizes: frozenset[tuple[str, ParameterSize]]) -> GuardedQuery:
        if len(sql) > QUERY_SQL_CHARS_MAX:
            refuse(
                f"the statement has {len(sql)} characters; {QUERY_SQL_CHARS_MAX} are allowed", "pass values as params"
            )
        inspection = Inspection(self._catalog, dict(sizes))
        inspection.query(self._parse(sql), {}, 1)
        tables = tuple(sorted(inspection.tables))
        columns = (f"{name}({', '.join(self._catalog.by_name(name).column_names)})" for name in tables)
        return GuardedQuery(
            statement=statement_of(sql),
            tables=tables,
            parameters=frozenset(inspection.parameters),
            patterns=tuple(pattern for pattern in inspection.patterns if pattern.has_parameters),
            columns_hint=f"columns: {'; '.join(columns)}" if tables else "",
        )

    def _parse(self, sql: str) -> Node:
        with parser().cursor() as cursor:
            row = cursor.execute(
                "SELECT json_serialize_sql(?::VARCHAR, skip_null := true, skip_empty := true, skip_default := true)",
                [sql],
            ).fetchone()
        assert row is not None
        try:
            parsed = orjson.loads(row[0])
        except orjson.JSONDecodeError:
            too_complex("it is nested too deeply")
        if parsed["error"]:
            _refuse_unparsed(parsed, sql)
        if len(parsed["statements"]) != 1:
            refuse("only one statement may be sent at a time", "send the statements as separate requests")
        only(parsed["statements"][0], ("node", "named_param_map"), "statement")
        node: Node = parsed["statements"][0]["node"]
        return node


@cache
def parser() -> duckdb.DuckDBPyConnection:
    """An empty instance that only parses. Its first call takes 0.4 s, for loading the JSON functions."""
    parser = duckdb.connect(":memory:", config={"threads": 1})
    parser.execute("SET enable_external_access = false")
    parser.execute("SET lock_configuration = true")
    parser.execute("SELECT json_serialize_sql('SELECT 1')")
    return parser


def statement_of(sql: str) -> duckdb.Statement:
    """One statement, parsed once for any number of executions, on any connection and thread."""
    with parser().cursor() as cursor:
        (statement,) = cursor.extract_statements(sql)
    return statement


def _refuse_unparsed(parsed: Node, sql: str) -> NoReturn:
    """DuckDB's message, and the place where it stopped understanding."""
    message = parsed["error_message"]
    if parsed["error_type"] == "not implemented" and "Only SELECT" in message:
        refuse("only SELECT statements are allowed", "write events to the tables' topics; query with SELECT")
    position = int(parsed.get("position", -1))
    near = sql.encode()[position:][:40].decode(errors="replace") if position >= 0 else ""
    where = f" (at character {len(sql.encode()[:position].decode(errors='replace')) + 1}: {near!r})" if near else ""
    raise QueryRefusedError(f"{message}{where}", code=RefusalCode.BAD_SQL, hint="correct the statement's syntax")


def _check_params(identifiers: frozenset[str], given: Mapping[str, JsonValue]) -> None:
    """Every parameter of the statement has a value, every value a parameter, and no text is a memory bomb."""
    missing, unused = sorted(identifiers - given.keys()), sorted(given.keys() - identifiers)
    if missing or unused:
        faults = [f"no value for {', '.join('$' + name for name in missing)}"] if missing else []
        faults += [f"no parameter in the statement for {', '.join('$' + name for name in unused)}"] if unused else []
        _refuse_params("; ".join(faults))
    pending: list[JsonValue] = list(given.values())
    while pending:
        match pending.pop():
            case str() as text if len(text) > QUERY_PARAM_CHARS_MAX:
                _refuse_params(f"a text has {len(text)} characters; {QUERY_PARAM_CHARS_MAX} are allowed")
            case list() as values:
                pending.extend(values)
            case dict() as members:
                pending.extend(members.values())


def _refuse_params(message: str) -> NoReturn:
    raise QueryRefusedError(
        message, code=RefusalCode.BAD_PARAMS, hint="params is a list for ? and $1, and an object for $name"
    )
