"""Answers over partitions of several workers are those of one DuckDB that holds everything."""

from __future__ import annotations

import os
import random
from collections.abc import AsyncIterator, Iterator
from typing import Any

import duckdb
import pyarrow as pa
import pytest

from schemas.duckdb_ddl import create_table_sql
from schemas.messages import Answer, ArrowAnswer, Refusal, RefusalCode
from streams.adapters.duckdb_split import splits_of
from streams.adapters.duckdb_store import DuckDBStore
from tests.fleet import Fleet, stores_of
from tests.query_generator import CATALOG, ORDERS, PARTITIONS, PAYMENTS, GeneratedQuery, QueryGenerator, order, payment
from tests.query_store import write

#: PINTAIL_TEST_QUERIES=10000 is the long mode.
QUERIES = int(os.environ.get("PINTAIL_TEST_QUERIES", "150"))
QUERIES_SEED = int(os.environ.get("PINTAIL_TEST_SEED", "1"))
ORDERS_TOTAL, WORKERS = 90, 3


@pytest.fixture(scope="module")
def stores(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[DuckDBStore]]:
    """Of three workers with two partitions each; one of the six is empty."""
    stores = stores_of(tmp_path_factory.mktemp("fleet"), CATALOG, workers=WORKERS, partitions=PARTITIONS)
    rng = random.Random(7)
    for partition in range(PARTITIONS - 1):
        store = stores[partition % WORKERS]
        write(
            store, ORDERS, partition, 0, [order(number, rng) for number in range(partition, ORDERS_TOTAL, PARTITIONS)]
        )
        write(store, PAYMENTS, partition, 0, [payment(ORDERS_TOTAL, rng) for _ in range(12)])
    yield stores
    for store in stores:
        store.close()


@pytest.fixture
async def fleet(stores: list[DuckDBStore]) -> AsyncIterator[Fleet]:
    fleet = Fleet(stores, CATALOG, partitions=PARTITIONS)
    yield fleet
    await fleet.close()


@pytest.fixture
def oracle(fleet: Fleet) -> Iterator[duckdb.DuckDBPyConnection]:
    """One DuckDB with all rows."""
    with duckdb.connect(":memory:", config={"threads": 1}) as oracle:
        oracle.execute("SET TimeZone = 'UTC'")
        for table in CATALOG.tables:
            oracle.execute(create_table_sql(table, qualified_name=table.name))
            for store in fleet.stores:
                with store.query_cursor(None) as cursor:
                    rows = cursor.execute(f"FROM {table.name}").to_arrow_table()
                oracle.register("rows", rows)
                oracle.execute(f"INSERT INTO {table.name} BY NAME FROM rows")
        yield oracle


def comparable(table: pa.Table, *, is_ordered: bool) -> list[str]:
    """Rows as text, averages as far as they are the same in any order."""

    def rounded(value: Any) -> Any:
        return f"{value:.9g}" if isinstance(value, float) else value

    rows = [
        str([rounded(value) for value in row])
        for row in zip(*(column.to_pylist() for column in table.columns), strict=True)
    ]
    return rows if is_ordered else sorted(rows)


def result_of(oracle: duckdb.DuckDBPyConnection, query: GeneratedQuery) -> pa.Table | None:
    """None if DuckDB finds a fault in it."""
    try:
        return oracle.execute(query.sql, query.params or None).to_arrow_table()
    except duckdb.Error:
        return None


async def test_generated_queries_have_the_answers_of_one_database(
    fleet: Fleet, oracle: duckdb.DuckDBPyConnection
) -> None:
    generator = QueryGenerator(QUERIES_SEED)
    ways = {"split": 0, "tables": 0, "refused": 0}
    for number in range(QUERIES):
        query = generator.query()
        answer = await fleet.ask(query.sql, partition=number % PARTITIONS, params=query.params, format="arrow")
        expected = result_of(oracle, query)
        if expected is None:
            assert isinstance(answer, Refusal), (query, answer)
            ways["refused"] += 1
            continue
        assert isinstance(answer, ArrowAnswer), (query, answer)
        assert answer.table.schema.remove_metadata() == expected.schema.remove_metadata(), query
        rows, wanted = (comparable(table, is_ordered=query.is_ordered) for table in (answer.table, expected))
        assert rows == wanted, query
        cheapest, *others = splits_of(query.sql, CATALOG)
        is_split = bool(others) and fleet.asked[-1].sql == cheapest.parts[-1].sql
        ways["split" if is_split else "tables"] += 1
    assert ways["split"] > QUERIES / 3, ways
    assert ways["tables"] > QUERIES / 10, ways
    assert ways["refused"] < QUERIES / 10, ways


async def test_an_answer_states_the_offsets_and_epochs_of_all_partitions(fleet: Fleet) -> None:
    answer = await fleet.ask("SELECT count(*) AS n, sum(amount) IS NULL FROM orders", partition=4)
    assert isinstance(answer, Answer)
    assert [column.name for column in answer.columns] == ["n", "(sum(amount) IS NULL)"]
    assert answer.rows == [[ORDERS_TOTAL - ORDERS_TOTAL // PARTITIONS, False]]
    per_partition = ORDERS_TOTAL // PARTITIONS
    assert answer.offsets == {"orders": {**{str(n): per_partition for n in range(PARTITIONS - 1)}, "5": 0}}
    assert answer.epoch == {str(partition): 1 for partition in range(PARTITIONS)}


async def test_only_partial_results_travel_for_aggregates(fleet: Fleet) -> None:
    await fleet.ask("SELECT country, avg(price) FROM orders WHERE day > '2026-03-02' GROUP BY 1 ORDER BY 2 LIMIT 3")
    assert {request.partition for request in fleet.asked} == {1, 2, 4, 5}
    (sql,) = {request.sql for request in fleet.asked}
    assert "sum(price)" in sql
    assert "GROUP BY" in sql


async def test_only_what_a_query_names_travels_for_joins(fleet: Fleet) -> None:
    await fleet.ask("SELECT o.id, p.paid_amount FROM orders o JOIN payments p USING (country) WHERE o.id = 5")
    assert {request.sql for request in fleet.asked} == {
        "SELECT id, country FROM orders AS o WHERE (o.id = 5)",
        "SELECT country, paid_amount FROM payments",
    }


async def test_a_moving_partition_refuses_the_whole_and_may_be_asked_again(fleet: Fleet) -> None:
    fleet.states[1].epochs.pop(4)
    refusal = await fleet.ask("SELECT count(*) FROM orders", partition=0)
    assert isinstance(refusal, Refusal)
    assert (refusal.code, refusal.retriable) == (RefusalCode.NOT_SERVING, True)
    fleet.states[1].epochs[4] = 2
    answer = await fleet.ask("SELECT count(*) FROM orders", partition=0)
    assert isinstance(answer, Answer)
    assert answer.epoch["4"] == 2


async def test_the_ledger_is_read_like_a_table(fleet: Fleet) -> None:
    answer = await fleet.ask("SELECT topic, sum(rows), count(DISTINCT partition) FROM _ledger GROUP BY 1 ORDER BY 1")
    assert isinstance(answer, Answer)
    assert answer.rows == [["orders", 75, PARTITIONS - 1], ["payments", 60, PARTITIONS - 1]]
    joined = await fleet.ask("SELECT count(*) FROM _ledger a JOIN _ledger b ON a.topic = b.topic AND b.rows > 0")
    assert isinstance(joined, Answer)
    assert joined.rows == [[2 * (PARTITIONS - 1) ** 2]]


async def test_one_partition_may_be_asked_alone(fleet: Fleet) -> None:
    reply = await fleet.reply(
        b'{"id":"1","sql":"SELECT count(*) FROM orders","reply_to":"replies","partition":4}', partition=4
    )
    assert isinstance(reply, Answer)
    assert (reply.rows, list(reply.epoch), fleet.asked) == ([[ORDERS_TOTAL // PARTITIONS]], ["4"], [])
    elsewhere = await fleet.reply(
        b'{"id":"1","sql":"SELECT count(*) FROM orders","reply_to":"replies","partition":2}', partition=4
    )
    assert isinstance(elsewhere, Refusal)
    assert (elsewhere.code, elsewhere.retriable) == (RefusalCode.WRONG_PARTITION, True)
    assert "partition 2" in elsewhere.hint


async def test_rows_that_are_too_many_to_gather_are_refused_with_the_reason(
    fleet: Fleet, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("streams.processes.answering.QUERY_PART_BYTES_MAX", 500)
    refusal = await fleet.ask("SELECT id, row_number() OVER () FROM orders")
    assert isinstance(refusal, Refusal)
    assert (refusal.code, refusal.retriable) == (RefusalCode.TOO_MANY_BYTES, False)
    assert "a window function" in refusal.message
    assert "`key`" in refusal.hint
