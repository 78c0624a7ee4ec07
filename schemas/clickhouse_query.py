"""A query of the store's dialect -> the same question to ClickHouse, for history that the store no longer holds.

Only what means the same in both passes: ALLOWED lists the parts of a SELECT by the names of sqlglot. Everything else is
refused by name, because a function that merely exists in both (round, length, lower, epoch_ms) answers differently and
says nothing. A table is what the sink made of it: a keyed one is read with FINAL and without tombstones, and of each
the columns are those that the store shows. SETTINGS make nulls behave as they do in the store.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import sqlglot
from sqlglot import exp
from sqlglot.errors import SqlglotError

from schemas.catalog import Catalog
from schemas.clickhouse_ddl import quote
from schemas.errors import ConfigurationError, PintailError
from schemas.table import METADATA_COLUMNS, TableDefinition

_SAME_IN_BOTH = """
    Select From Where Group Having Order Ordered Limit Offset Join Table TableAlias Identifier Column Star Alias Aliases
    Subquery Union Intersect Except CTE With Distinct Literal Boolean Null Paren And Or Not EQ NEQ GT GTE LT LTE Is In
    Between Like ILike Add Sub Mul Div Mod Neg Case If Coalesce Nullif Cast DataType DataTypeParam Count Sum Avg Min Max
    Filter Window WindowSpec RowNumber TimestampTrunc DateTrunc Extract Year Month Day Interval Var DPipe Abs Floor Ceil
    Sqrt Exists Tuple Placeholder Parameter
"""
ALLOWED = frozenset(_SAME_IN_BOTH.split())
SETTINGS: Mapping[str, Any] = {
    "readonly": 2,
    "join_use_nulls": 1,
    "aggregate_functions_null_for_empty": 1,
    "group_by_use_nulls": 1,
    "union_default_mode": "DISTINCT",
    "intersect_default_mode": "DISTINCT",
    "except_default_mode": "DISTINCT",
    "prefer_column_name_to_alias": 1,
    # Days and months beyond 1970 to 2106.
    "enable_extended_results_for_datetime_functions": 1,
}
_HINT = (
    "--history takes plain SELECTs: joins, WHERE, GROUP BY, ORDER BY, CASE, arithmetic, count, sum, avg, min, max, "
    "date_trunc, extract; ask ClickHouse itself for more"
)


class HistoryRefusedError(PintailError):
    """A query that ClickHouse would not answer, or not as the store does."""


def clickhouse_query(
    sql: str, params: Sequence[Any] | Mapping[str, Any], catalog: Catalog, *, database: str
) -> tuple[str, list[TableDefinition]]:
    """The SELECT for ClickHouse with its values in place, and the tables that it asks. Raises HistoryRefusedError."""
    try:
        statements = sqlglot.parse(sql, dialect="duckdb")
    except SqlglotError as error:
        raise HistoryRefusedError(f"the query cannot be read: {error}", hint="correct it") from None
    if len(statements) != 1 or not isinstance(statements[0], exp.Query):
        raise HistoryRefusedError("this is not one SELECT statement", hint=_HINT)
    query = statements[0]
    for node in query.walk():
        if type(node).__name__ not in ALLOWED:
            raise HistoryRefusedError(
                f"{node.sql(dialect='duckdb')[:200]!r} may mean something else in ClickHouse", hint=_HINT
            )
    bound = query.transform(_converted).transform(lambda node: _bound(node, params))
    assert isinstance(bound, exp.Query), "only values have changed"
    tables: dict[str, TableDefinition] = {}
    names = {cte.alias for cte in bound.find_all(exp.CTE)}
    for each in list(bound.find_all(exp.Table)):
        if each.db or each.catalog:
            raise HistoryRefusedError(f"{each.sql()!r} names a database", hint="write the table's name alone")
        if each.name not in names:
            table = tables[each.name] = _table(catalog, each.name)
            each.replace(_as_the_store_shows_it(table, database, alias=each.alias or each.name))
    return bound.sql(dialect="clickhouse"), list(tables.values())


def _table(catalog: Catalog, name: str) -> TableDefinition:
    try:
        return catalog.by_name(name)
    except ConfigurationError as error:
        raise HistoryRefusedError(error.message, hint=error.hint) from None


def _as_the_store_shows_it(table: TableDefinition, database: str, *, alias: str) -> exp.Subquery:
    columns = ", ".join(map(quote, (*table.column_names, *METADATA_COLUMNS)))
    source = f"{quote(database)}.{quote(table.name)}{' FINAL' if table.is_keyed else ''}"
    where = " WHERE _deleted = 0" if table.is_keyed else ""
    select = sqlglot.parse_one(f"SELECT {columns} FROM {source}{where}", dialect="clickhouse")
    assert isinstance(select, exp.Select)
    return select.subquery(alias)


def _converted(node: exp.Expr) -> exp.Expr:
    """Casts of a text to a date or a time, and of anything to DOUBLE; the others round, or write, differently."""
    if not isinstance(node, exp.Cast):
        return node
    kind = node.to.this
    if kind is exp.DType.DOUBLE:
        return exp.func("toFloat64", node.this)
    if isinstance(node.this, exp.Literal) and node.this.is_string:
        if kind is exp.DType.DATE:
            return exp.func("toDate32", node.this)
        if kind in (exp.DType.TIMESTAMP, exp.DType.TIMESTAMPTZ):
            return exp.func("parseDateTime64BestEffort", node.this, exp.Literal.number(6), exp.Literal.string("UTC"))
    raise HistoryRefusedError(f"{node.sql(dialect='duckdb')[:200]!r} may mean something else in ClickHouse", hint=_HINT)


def _bound(node: exp.Expr, params: Sequence[Any] | Mapping[str, Any]) -> exp.Expr:
    """$1, ? and $name as literals."""
    if not isinstance(node, exp.Placeholder | exp.Parameter):
        return node
    name = node.name
    if name == "?" and len(params) != 1:
        raise HistoryRefusedError("several values for ?", hint="number them: $1, $2")
    key: Any = 0 if name == "?" else int(name) - 1 if name.isdigit() else name
    try:
        value = params[key]
    except (KeyError, IndexError, TypeError):
        raise HistoryRefusedError(f"there is no value for ${name}", hint="give one with --param") from None
    return exp.convert(value)
