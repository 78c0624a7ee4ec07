"""Queries at random, of every kind that a split has to get right, over two tables: orders (keyed) and payments (not).

Their answers are determined: a LIMIT comes after an ORDER BY that leaves no ties, and doubles are quarters, whose sums
are exact in any order. Used by the differential test.
"""

from __future__ import annotations

import random
import re
from dataclasses import dataclass, field
from typing import Any

from schemas.catalog import Catalog
from schemas.table import ArrayType, Column, ScalarKind, StructField, StructType, TableDefinition
from tests.query_store import scalar

PARTITIONS = 6
_PARAMETER = re.compile(r"\$(\d+)")


ORDERS = TableDefinition(
    name="orders",
    topic="orders",
    partitions=PARTITIONS,
    primary_key=("id",),
    columns=(
        Column("id", scalar(ScalarKind.BIGINT), nullable=False),
        Column("country", scalar(ScalarKind.VARCHAR)),
        Column("amount", scalar(ScalarKind.BIGINT)),
        Column("weight", scalar(ScalarKind.DOUBLE)),
        Column("price", scalar(ScalarKind.DECIMAL)),
        Column("placed", scalar(ScalarKind.TIMESTAMPTZ)),
        Column("day", scalar(ScalarKind.DATE)),
        Column("paid", scalar(ScalarKind.BOOLEAN)),
        Column("tags", ArrayType(scalar(ScalarKind.VARCHAR))),
        Column("box", StructType((StructField("size", scalar(ScalarKind.INTEGER)),))),
        Column("extra", scalar(ScalarKind.JSON)),
        Column("token", scalar(ScalarKind.UUID)),
    ),
)
PAYMENTS = TableDefinition(
    name="payments",
    topic="payments",
    partitions=PARTITIONS,
    columns=(
        Column("order_id", scalar(ScalarKind.BIGINT)),
        Column("country", scalar(ScalarKind.VARCHAR)),
        Column("paid_amount", scalar(ScalarKind.INTEGER)),
    ),
)
CATALOG = Catalog((ORDERS, PAYMENTS))
COUNTRIES = (None, "DE", "FR", "de", "Ünited", "")


def order(number: int, rng: random.Random) -> dict[str, Any]:
    """An order with nulls, duplicates and oddities here and there."""

    def maybe(value: Any) -> Any:
        return None if rng.random() < 0.15 else value

    return {
        "id": number,
        "country": rng.choice(COUNTRIES),
        "amount": maybe(rng.choice((rng.randint(-5, 5), rng.randint(-(2**62), 2**62)))),
        "weight": maybe(rng.randint(-40, 40) / 4),
        "price": maybe(f"{rng.randint(-999, 999)}.{rng.randint(0, 99):02d}"),
        "placed": maybe(f"2026-03-{rng.randint(1, 28):02d}T{rng.randint(0, 23):02d}:00:00Z"),
        "day": maybe(f"2026-03-{rng.randint(1, 9):02d}"),
        "paid": maybe(rng.random() < 0.5),
        "tags": maybe([rng.choice("abc") for _ in range(rng.randint(0, 3))]),
        "box": maybe({"size": rng.choice((None, 1, 2, 3))}),
        "extra": maybe({"a": rng.randint(0, 3)}),
        "token": maybe(f"00000000-0000-4000-8000-{rng.randint(0, 20):012d}"),
    }


def payment(orders: int, rng: random.Random) -> dict[str, Any]:
    """A payment of some order, or of none."""
    return {
        "order_id": rng.choice((None, rng.randrange(orders))),
        "country": rng.choice(COUNTRIES),
        "paid_amount": rng.choice((None, rng.randint(-9, 9))),
    }


@dataclass
class GeneratedQuery:
    """A statement, its parameters, and whether the order of its rows is determined."""

    sql: str
    params: list[Any] = field(default_factory=list)
    is_ordered: bool = False


class QueryGenerator:
    """The same queries for the same seed."""

    def __init__(self, seed: int) -> None:
        self._rng = random.Random(seed)
        self._params: list[Any] = []
        self._alias = ""

    def query(self) -> GeneratedQuery:
        """The next one."""
        self._params, self._alias = [], self._rng.choice(("", "", "o"))
        kinds = (self._rows, self._aggregate, self._aggregate, self._partition_join, self._other)
        sql, is_ordered = self._rng.choice(kinds)()
        used = sorted({int(number) for number in _PARAMETER.findall(sql)})  # not all that was made is used
        sql = _PARAMETER.sub(lambda match: f"${used.index(int(match[1])) + 1}", sql)
        return GeneratedQuery(sql, [self._params[number - 1] for number in used], is_ordered)

    # -- expressions -------------------------------------------------------------------------------------------------

    def _pick(self, *choices: str) -> str:
        return self._rng.choice(choices)

    def _column(self, *names: str) -> str:
        name = self._pick(*names)
        return f"{self._alias}.{name}" if self._alias and self._rng.random() < 0.5 else name

    def _value(self, value: Any) -> str:
        """As a literal or as a parameter."""
        if self._rng.random() < 0.3:
            self._params.append(value)
            return f"${len(self._params)}"
        return f"'{value}'" if isinstance(value, str) else str(value)

    def _number(self) -> str:
        column = self._column
        return self._pick(
            column("id", "weight", "price"),
            column("id"),
            f"({column('id')} % {self._rng.randint(2, 7)})",
            f"({column('weight')} * 2)",
            f"coalesce({column('weight')}, {self._rng.randint(0, 3)})",
            f"length({column('country')})",
            f"CASE WHEN {column('paid')} THEN 1 WHEN {column('weight')} > 0 THEN 2 END",
            f"{column('box')}.size" if self._alias == "" else "o.box.size",
            f"len({column('tags')})",
            f"round({column('price')}, 1)",
        )

    def _text(self) -> str:
        column = self._column
        return self._pick(
            column("country"),
            f"upper({column('country')})",
            f"coalesce({column('country')}, 'none')",
            f"({column('country')} || '-' || {column('day')})",
            f"{column('extra')}->>'a'",
            f"CAST({column('token')} AS VARCHAR)",
        )

    def scalar(self) -> str:
        column = self._column
        other = column("day", "placed", "paid", "token", "extra", "amount", "tags", "box")
        return self._pick(
            self._number(), self._text(), other, f"date_trunc('week', {column('placed')})", f"year({column('day')})"
        )

    def _predicate(self, depth: int = 0) -> str:
        column = self._column
        if depth < 2 and self._rng.random() < 0.4:
            joined = self._pick(" AND ", " OR ").join(self._predicate(depth + 1) for _ in range(2))
            return self._pick(f"({joined})", f"NOT ({joined})")
        return self._pick(
            f"{self._number()} {self._pick('<', '>', '=', '<>', '<=')} {self._value(self._rng.randint(-3, 40))}",
            f"{column('country')} = {self._value(self._pick('DE', 'de', 'XX'))}",
            f"{column('country')} IN ('DE', 'FR')",
            f"{column('country')} LIKE '%e%'",
            f"{column('amount')} IS {self._pick('', 'NOT ')}NULL",
            f"{column('day')} BETWEEN DATE '2026-03-02' AND DATE '2026-03-05'",
            f"{column('paid')}",
            f"{column('id')} < {self._value(self._rng.randint(0, 80))}",
            f"list_contains({column('tags')}, 'a')",
        )

    def _call(self) -> str:
        """An aggregate."""
        number, scalar, column = self._number(), self.scalar(), self._column
        call = self._pick(
            "count(*)",
            f"count({scalar})",
            f"count(DISTINCT {scalar})",
            f"count(DISTINCT {self._text()})",
            f"sum({number})",
            f"sum({column('amount')})",
            f"avg({number})",
            f"min({self._pick(number, self._text(), column('day', 'placed', 'token', 'amount'))})",
            f"max({self._pick(number, self._text(), column('day', 'placed', 'token', 'amount'))})",
            f"bool_or({column('paid')})",
            f"bool_and({column('weight')} > 0)",
            f"min(DISTINCT {number})",
            f"sum(DISTINCT {number})",
            f"stddev_pop({column('id')})",
            f"median({column('id')})",
            f"arg_max({column('country')}, {column('id')})",
        )
        return f"{call} FILTER (WHERE {self._predicate(1)})" if self._rng.random() < 0.15 else call

    def _calculated(self) -> str:
        """Of aggregates."""
        return self._pick(
            *[self._call()] * 4,
            f"{self._call()} IS NULL",
            f"coalesce(sum({self._number()}), 0) + count(*)",
            f"max({self._number()}) - min({self._number()})",
            f"round(avg({self._number()}), 3)",
            "count(*) * 2",
        )

    # -- statements --------------------------------------------------------------------------------------------------

    def _from(self) -> str:
        return f"FROM orders {self._alias}".rstrip()

    def _where(self) -> str:
        return f" WHERE {self._predicate()}" if self._rng.random() < 0.6 else ""

    def _tail(self, columns: int) -> tuple[str, bool]:
        """ORDER BY of everything there is, so that there are no ties; LIMIT."""
        kind = self._rng.random()
        if kind < 0.4:
            return "", False
        if kind < 0.6:
            order = " ORDER BY ALL" + self._pick("", " DESC", " NULLS FIRST")
        else:
            positions = list(range(1, columns + 1))
            self._rng.shuffle(positions)
            order = " ORDER BY " + ", ".join(
                f"{each}{self._pick('', ' DESC', ' NULLS FIRST', ' ASC NULLS LAST')}" for each in positions
            )
        if self._rng.random() < 0.6:
            order += f" LIMIT {self._value(self._rng.randint(0, 12))}"
            if self._rng.random() < 0.4:
                order += f" OFFSET {self._value(self._rng.randint(0, 9))}"
        return order, True

    def _rows(self) -> tuple[str, bool]:
        column = self._column
        items = [self._named(self.scalar(), index) for index in range(self._rng.randint(1, 4))]
        if self._rng.random() < 0.3:
            tail, is_ordered = self._tail(len(items))
            return f"SELECT DISTINCT {', '.join(items)} {self._from()}{self._where()}{tail}", is_ordered
        if self._rng.random() < 0.2:
            items = ["*"]
        keys = f"{self._number()}{self._pick('', ' DESC')}, {self._text()}, {column('id')}"
        tail, is_ordered = self._pick_tail(f" ORDER BY {keys}")
        return f"SELECT {', '.join(items)} {self._from()}{self._where()}{tail}", is_ordered

    def _pick_tail(self, order: str) -> tuple[str, bool]:
        if self._rng.random() < 0.4:
            return "", False
        if self._rng.random() < 0.3:
            return order, True
        offset = f" OFFSET {self._value(self._rng.randint(0, 9))}" if self._rng.random() < 0.4 else ""
        return f"{order} LIMIT {self._value(self._rng.randint(0, 15))}{offset}", True

    def _named(self, expression: str, index: int) -> str:
        return f"{expression} AS x{index}" if self._rng.random() < 0.4 else expression

    def _aggregate(self) -> tuple[str, bool]:
        groups = [self.scalar() for _ in range(self._rng.choice((0, 1, 1, 2)))]
        items = [*groups, *(self._calculated() for _ in range(self._rng.randint(1, 3)))]
        named = [self._named(item, index) for index, item in enumerate(items)]
        grouping = ""
        if groups:
            by_alias = [
                item.rpartition(" AS ")[2] if " AS x" in item else group
                for group, item in zip(groups, named, strict=False)
            ]
            by_position = [str(index + 1) for index in range(len(groups))]
            grouping = f" GROUP BY {self._pick('ALL', ', '.join(groups), ', '.join(by_position), ', '.join(by_alias))}"
        having = (
            f" HAVING {self._pick('count(*) > 1', f'{self._call()} IS NOT NULL')}" if self._rng.random() < 0.3 else ""
        )
        tail, is_ordered = self._tail(len(items))
        distinct = "DISTINCT " if self._rng.random() < 0.1 else ""
        return f"SELECT {distinct}{', '.join(named)} {self._from()}{self._where()}{grouping}{having}{tail}", is_ordered

    def _partition_join(self) -> tuple[str, bool]:
        join = self._pick("JOIN", "LEFT JOIN", "RIGHT JOIN", "FULL JOIN")
        on = "o.id = p.order_id AND o._partition = p._partition"
        source = f"FROM orders o {join} payments p ON {on}"
        where = self._pick("", " WHERE p.paid_amount > 0", " WHERE o.weight < 4 OR p.order_id IS NULL")
        return self._pick(
            f"SELECT o.id, p.order_id, p.paid_amount, p._offset, p._partition {source}{where}",
            f"SELECT o.country, count(*), sum(p.paid_amount), max(o.day) {source}{where} GROUP BY o.country",
            f"SELECT p.country, count(DISTINCT o.id) AS n {source}{where} GROUP BY 1 HAVING n > 1",
            f"SELECT avg(o.weight + p.paid_amount) {source}{where}",
        ), False

    def _other(self) -> tuple[str, bool]:
        """What a partition cannot decide alone."""
        self._alias = ""
        number, predicate = self._number(), self._predicate()
        shared = "SELECT count(*) FROM orders o JOIN payments p USING (country)"
        on_id = "SELECT o.id, p.paid_amount FROM orders o, payments p WHERE o.id = p.order_id AND o.weight > 2"
        return self._pick(
            on_id,
            shared,
            f"{shared.replace('count(*)', 'o.country, count(*)')} WHERE p.paid_amount > 3 GROUP BY 1",
            "SELECT o.id FROM orders o LEFT JOIN payments p ON p.order_id = o.id WHERE p.order_id IS NULL",
            f"SELECT id, row_number() OVER (PARTITION BY country ORDER BY id) FROM orders WHERE {predicate}",
            f"SELECT id FROM orders WHERE weight > (SELECT avg(weight) FROM orders WHERE {predicate})",
            f"WITH big AS (SELECT country, {number} AS n FROM orders) SELECT country, sum(n) FROM big GROUP BY 1",
            f"SELECT id FROM orders WHERE {predicate} UNION SELECT order_id FROM payments",
            "SELECT country FROM orders EXCEPT SELECT country FROM payments",
            "SELECT id FROM orders WHERE id IN (SELECT order_id FROM payments WHERE paid_amount > 0)",
            f"SELECT DISTINCT ON (country) country, id FROM orders WHERE {predicate} ORDER BY country, id DESC",
            "SELECT country, day, count(*) FROM orders GROUP BY ROLLUP (country, day)",
            "SELECT tag, count(*) FROM (SELECT unnest(tags) AS tag FROM orders) GROUP BY tag",
            "SELECT id, orders FROM orders WHERE id < 5",
            "SELECT count(*) FROM orders o WHERE EXISTS (SELECT 1 FROM payments p WHERE p.order_id = o.id)",
            "SELECT string_agg(country, ',' ORDER BY id) FROM orders",
            "SELECT id AS amount, amount AS n FROM orders",
            "SELECT sum(c) FROM (SELECT country, count(*) AS c FROM orders GROUP BY country)",
            "SELECT id FROM orders ORDER BY country COLLATE nocase, id LIMIT 9",
        ), False
