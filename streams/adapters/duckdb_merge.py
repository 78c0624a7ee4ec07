"""Puts an answer together from what partitions on several workers contributed.

An instance of its own, in memory, that can reach no file: it holds the catalog's tables without rows, which is enough
to learn what a query yields and whether a way of splitting it fits, and it runs the final statement over the
contributions. Its views restore the types that Arrow does not have (HUGEINT, UUID, JSON). Called by `answering`;
everything here blocks and belongs in a thread.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import duckdb
import pyarrow as pa

from schemas.catalog import Catalog
from schemas.duckdb_ddl import quote
from schemas.messages import AnswerColumn, AnswerFormat, QueryRequest, RefusalCode
from streams.adapters.duckdb_guard import GuardedQuery
from streams.adapters.duckdb_queries import AnswerBody, FetchLimits, Interruptible, columns_of
from streams.adapters.duckdb_refusals import refusal_of
from streams.adapters.duckdb_split import Part, Split, named_parameters, splits_of
from streams.adapters.duckdb_store import ledger_view_sql, view_sql
from streams.errors import QueryRefusedError
from streams.limits import MIB, QUERY_GATHERED_BYTES_MAX

_SPLITS_CACHED = 512
_UNKNOWN_TYPES = ("NULL", '"NULL"')


@dataclass(frozen=True)
class Plan:
    """How one query is answered by several partitions."""

    split: Split
    #: What the query yields.
    columns: list[AnswerColumn]
    #: Of each part: what it yields, under the names that the final statement has for its columns.
    yields: list[list[AnswerColumn]]
    #: The final statement, with the types of `columns`.
    final: str
    parameters: Mapping[str, Any]
    guarded: GuardedQuery

    def questions(self) -> list[tuple[str, dict[str, Any]]]:
        """SQL and parameters of each part."""
        return [(part.sql, _only(part.parameters, self.parameters)) for part in self.split.parts]


class DuckDBMerger:
    """Plans and merges for one catalog. Thread-safe."""

    def __init__(self, catalog: Catalog) -> None:
        self._instance = duckdb.connect(
            ":memory:",
            config={
                "memory_limit": f"{4 * QUERY_GATHERED_BYTES_MAX // MIB}MiB",
                "threads": 2,
                "temp_directory": "",
                "python_enable_replacements": False,
                "autoinstall_known_extensions": False,
                "autoload_known_extensions": False,
            },
        )
        self._instance.execute("SET GLOBAL TimeZone = 'UTC'")
        for table in catalog.tables:
            self._instance.execute(view_sql("main", table, ()))
        self._instance.execute(ledger_view_sql("main", ()))
        self._instance.execute("SET enable_external_access = false")
        self._instance.execute("SET lock_configuration = true")
        self._splits = lru_cache(_SPLITS_CACHED)(lambda sql: splits_of(sql, catalog))

    def close(self) -> None:
        """Nothing merges any more."""
        self._instance.close()

    def plan(self, request: QueryRequest, guarded: GuardedQuery) -> Plan:
        """The cheapest way that fits. Raises QueryRefusedError for what is wrong with the query."""
        parameters = named_parameters(request.params)
        with self._instance.cursor() as cursor:
            try:
                cursor.execute(request.sql, request.params or None)
            except duckdb.Error as error:
                raise refusal_of(error, guarded, interrupted=False) from error
            columns = columns_of(cursor)
            *splits, tables = self._splits(request.sql)
            for split in splits:
                try:
                    return self._plan(split, columns, parameters, guarded)
                except duckdb.Error:  # a column or type that the partial results do not have
                    continue
            return self._plan(tables, columns, parameters, guarded)

    def merge(self, plan: Plan, contributions: Sequence[Sequence[pa.Table]], **options: Any) -> RunningMerge:
        """Of each part, what every partition sent. Cheap: the work starts with `run`."""
        return RunningMerge(self._instance, plan, contributions, **options)

    def _plan(
        self, split: Split, columns: list[AnswerColumn], parameters: Mapping[str, Any], guarded: GuardedQuery
    ) -> Plan:
        yields = []
        with self._instance.cursor() as cursor:
            for part in split.parts:
                cursor.execute(part.sql, _only(part.parameters, parameters) or None)
                yields.append(_named(part, columns_of(cursor)))
            for part, part_columns in zip(split.parts, yields, strict=True):
                nothing = ", ".join(f"{_cast('NULL', column.type)} AS {quote(column.name)}" for column in part_columns)
                cursor.execute(f"CREATE TEMP VIEW {quote(part.table)} AS SELECT {nothing} WHERE false")
            cursor.execute(split.final, _only(split.final_parameters, parameters) or None)
            final, merged = split.final, columns_of(cursor)
        if [column.type for column in merged] != [column.type for column in columns]:
            names = [f"pintail_f{index}" for index in range(len(columns))]
            casts = ", ".join(_cast(name, column.type) for name, column in zip(names, columns, strict=True))
            final = f"SELECT {casts} FROM ({final}) AS final({', '.join(names)})"
        return Plan(split, columns, yields, final, parameters, guarded)


class RunningMerge(Interruptible):
    """One final statement over its contributions."""

    def __init__(
        self,
        instance: duckdb.DuckDBPyConnection,
        plan: Plan,
        contributions: Sequence[Sequence[pa.Table]],
        *,
        answer_format: AnswerFormat,
        limits: FetchLimits,
    ) -> None:
        super().__init__(scope=frozenset())
        self._instance = instance
        self._plan = plan
        self._contributions = contributions
        self._format = answer_format
        self._limits = limits

    def run(self) -> AnswerBody:
        """The answer, without positions. Raises QueryRefusedError."""
        started = time.perf_counter()
        plan, cursor = self._plan, self._instance.cursor()
        with self._using(cursor):
            try:
                for number, part in enumerate(plan.split.parts):
                    self._offer(cursor, f"pintail_{number}", part, plan.yields[number], self._contributions[number])
                cursor.execute(plan.final, _only(plan.split.final_parameters, plan.parameters) or None)
                rows_json, arrow = self._limits.fetch(cursor, self._format)
            except duckdb.Error as error:
                raise refusal_of(error, plan.guarded, interrupted=self.interrupted) from error
        if arrow is not None:
            names = [column.name for column in plan.columns]
            arrow = (_renamed(arrow[0], names), [batch.rename_columns(names) for batch in arrow[1]])
        return AnswerBody(plan.columns, {}, (time.perf_counter() - started) * 1000, rows_json, arrow)

    def _offer(
        self,
        cursor: duckdb.DuckDBPyConnection,
        raw: str,
        part: Part,
        columns: Sequence[AnswerColumn],
        tables: Iterable[pa.Table],
    ) -> None:
        """Makes the contributions of a part the table that the final statement reads."""
        names = [column.name for column in columns]
        table = pa.concat_tables(table.replace_schema_metadata(None).rename_columns(names) for table in tables)
        cursor.register(raw, table)
        casts = ", ".join(f"{_cast(quote(column.name), column.type)} AS {quote(column.name)}" for column in columns)
        cursor.execute(f"CREATE TEMP VIEW {quote(part.table)} AS SELECT {casts} FROM {raw}")


def too_much_to_gather(plan: Plan, bytes_max: int) -> QueryRefusedError:
    """The contributions are larger than what may travel."""
    reason = f"; because of {plan.split.why} whole rows must travel" if plan.split.why else ""
    return QueryRefusedError(
        f"the partitions of several workers contribute more than {bytes_max} bytes to this answer{reason}",
        code=RefusalCode.TOO_MANY_BYTES,
        hint="filter in WHERE, name fewer columns, aggregate with count, sum, min, max or avg, join on `_partition` "
        "too, or give `key`",
    )


def _named(part: Part, columns: Sequence[AnswerColumn]) -> list[AnswerColumn]:
    if not part.renamed:
        return list(columns)
    return [
        column if column.name.startswith("pintail_") else column.model_copy(update={"name": f"pintail_c{index}"})
        for index, column in enumerate(columns)
    ]


def _cast(expression: str, kind: str) -> str:
    return expression if kind in _UNKNOWN_TYPES else f"CAST({expression} AS {kind})"


def _only(names: frozenset[str], parameters: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in parameters.items() if name in names}


def _renamed(schema: pa.Schema, names: Sequence[str]) -> pa.Schema:
    return pa.schema([field.with_name(name) for field, name in zip(schema, names, strict=True)])
