"""Statements at random: useful ones, and the same with something hostile at a random place and depth.

A hostile piece must be refused wherever it stands; what has none must be refused for its size or run. Used by the test
of the guard.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

HOSTILE_TABLES = (
    "read_text('/etc/hostname')",
    "read_csv('secrets.csv')",
    "'secrets.csv'",
    '"secrets.parquet"',
    "glob('*')",
    "duckdb_settings()",
    "pragma_database_list",
    "information_schema.tables",
    "partition_0.main.flights",
    "memory.p0.flights",
    "_positions",
    "query('SELECT 1')",
    "range(1000000000)",
    "(SHOW TABLES)",
    "(DESCRIBE flights)",
)
HOSTILE_EXPRESSIONS = (
    "current_setting('threads')",
    "getenv('HOME')",
    "getvariable('x')",
    "version()",
    "current_user",
    "current_database()",
    "repeat('x', 1000000000)",
    "lpad('x', 1000000000, 'y')",
    "range(1000000000)",
    "levenshtein(carrier, carrier)",
    "list_transform([1], lambda x: x)",
    "[x FOR x IN [1, 2]]",
    "read_text('/etc/hostname')",
    "carrier.upper()",
    "partition_0.main.count(*)",
    "NULL::INTEGER[100000]",
    "nextval('s')",
    "random()",
    "error('x')",
    "(carrier ILIKE '%a%a%a%b')",
    "(carrier LIKE carrier)",
)
_TABLES = ("flights", "airlines", "(VALUES (1, 'AA')) v(id, carrier)", "(SELECT carrier, 1 AS id FROM airlines) s")
_EXPRESSIONS = ("carrier", "1", "'x'", "NULL", "upper(carrier)", "length(carrier)", "[carrier]", "carrier IS NULL")


@dataclass(frozen=True)
class FuzzedStatement:
    """A statement, and the hostile piece in it; empty if it has none."""

    sql: str
    hostile: str


class StatementFuzzer:
    """The same statements for the same seed."""

    def __init__(self, seed: int) -> None:
        self._rng = random.Random(seed)
        #: The hostile piece that is not placed yet; one of the first places takes it.
        self._table, self._expression_piece = "", ""

    def statement(self) -> FuzzedStatement:
        """The next one."""
        self._table = self._expression_piece = ""
        hostile = ""
        match self._rng.randrange(3):
            case 1:
                hostile = self._table = self._rng.choice(HOSTILE_TABLES)
            case 2:
                hostile = self._expression_piece = self._rng.choice(HOSTILE_EXPRESSIONS)
        sql = self._select(self._rng.randint(0, 3))
        # Of pieces that were made and not used, one may have been the hostile one.
        return FuzzedStatement(sql, hostile if hostile in sql else "")

    def _select(self, depth: int) -> str:
        expression = self._expression
        table = self._source(depth)
        where, group = f"{expression(depth)} IS NOT NULL", expression(depth)
        return self._rng.choice(
            (
                lambda: f"SELECT {expression(depth)} FROM {table}",
                lambda: f"SELECT {expression(depth)}, {expression(depth)} FROM {table} WHERE {where}",
                lambda: f"SELECT count(*) FILTER (WHERE {where}) FROM {table}",
                lambda: f"SELECT count(*) FROM {table} GROUP BY {group} HAVING count(DISTINCT {expression(depth)}) > 0",
                lambda: f"SELECT carrier FROM {table} ORDER BY {expression(depth)}, {group} LIMIT 5",
                lambda: f"SELECT DISTINCT ON ({group}) carrier FROM {table}",
                lambda: f"SELECT count(*) OVER (PARTITION BY {group}) FROM {table} QUALIFY {where}",
                lambda: f"WITH c AS ({self._select(max(0, depth - 1))}) SELECT * FROM c, {table}",
                lambda: f"SELECT carrier FROM {table} UNION ALL {self._select(max(0, depth - 1))}",
                lambda: f"SELECT * EXCLUDE (carrier) FROM {table} WHERE {where}",
            )
        )()

    def _source(self, depth: int) -> str:
        if depth == 0 or self._rng.random() < 0.3:
            if self._table and self._rng.random() < 0.7:
                table, self._table = self._table, ""
                return table
            return self._rng.choice(_TABLES)
        left, right = self._source(depth - 1), self._source(depth - 1)
        return self._rng.choice(
            (
                lambda: f"({self._select(depth - 1)}) t",
                lambda: f"{left} CROSS JOIN {right}",
                lambda: f"{left} LEFT JOIN {right} ON {self._expression(depth - 1)} IS NULL",
                lambda: f"{left}, LATERAL ({self._select(depth - 1)}) l",
                lambda: left,
            )
        )()

    def _expression(self, depth: int) -> str:
        if depth == 0 or self._rng.random() < 0.3:
            if self._expression_piece and self._rng.random() < 0.7:
                piece, self._expression_piece = self._expression_piece, ""
                return piece
            return self._rng.choice(_EXPRESSIONS)
        inner = self._expression(depth - 1)
        return self._rng.choice(
            (
                lambda: f"coalesce({inner}, {self._expression(depth - 1)})",
                lambda: f"CASE WHEN {inner} IS NULL THEN 1 ELSE {self._expression(depth - 1)} END",
                lambda: f"CAST({inner} AS VARCHAR)",
                lambda: f"[{inner}]",
                lambda: f"{{'a': {inner}}}",
                lambda: f"({inner} IN (SELECT 1 FROM {self._source(depth - 1)}))",
                lambda: f"EXISTS ({self._select(depth - 1)})",
                lambda: f"(SELECT count(*) FROM {self._source(depth - 1)})",
                lambda: f"TRY({inner})",
                lambda: f"({inner} = {self._expression(depth - 1)})",
            )
        )()
