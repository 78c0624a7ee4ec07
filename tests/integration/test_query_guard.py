"""The guard over a corpus: nothing hostile runs, everything useful does, on a real store."""

from __future__ import annotations

import contextlib
import os
import random
from collections.abc import Iterator

import duckdb
import pytest
from pydantic import JsonValue

from schemas.messages import QueryRequest, RefusalCode
from streams.adapters.duckdb_dialect import FUNCTIONS
from streams.adapters.duckdb_guard import QueryGuard
from streams.adapters.duckdb_queries import DuckDBQueries, FetchLimits
from streams.adapters.duckdb_store import DuckDBStore
from streams.errors import QueryRefusedError
from tests.query_corpus import BOMBS, HOSTILE, PARAMETER_BOMBS, USEFUL, USEFUL_WITH_PARAMETERS
from tests.query_store import CATALOG, PARTITIONS, filled_store
from tests.statement_fuzzer import StatementFuzzer

#: PINTAIL_TEST_QUERIES=10000 is the long mode.
FUZZED_STATEMENTS = int(os.environ.get("PINTAIL_TEST_QUERIES", "300"))
FUZZED_SEED = int(os.environ.get("PINTAIL_TEST_SEED", "1"))
#: What a hostile statement may be told. Reaching DuckDB's binder is not among it.
REFUSED_BEFORE_EXECUTION = {RefusalCode.NOT_ALLOWED, RefusalCode.UNKNOWN_TABLE, RefusalCode.BAD_SQL}


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[DuckDBStore]:
    store = filled_store(tmp_path_factory.mktemp("guard"))
    yield store
    store.close()


@pytest.fixture(scope="module")
def guard() -> QueryGuard:
    return QueryGuard(CATALOG)


def refusal(guard: QueryGuard, sql: str) -> QueryRefusedError:
    with pytest.raises(QueryRefusedError) as caught:
        guard.check(sql, [])
    return caught.value


def test_the_corpus_is_as_large_as_promised() -> None:
    assert len(set(HOSTILE)) >= 300
    assert len(BOMBS) + len(PARAMETER_BOMBS) >= 40
    assert len(set(USEFUL)) >= 60


@pytest.mark.parametrize("sql", HOSTILE)
def test_hostile_statements_are_refused_before_anything_runs(guard: QueryGuard, sql: str) -> None:
    error = refusal(guard, sql)
    assert error.code in REFUSED_BEFORE_EXECUTION
    assert error.message
    assert error.hint


@pytest.mark.parametrize("sql", BOMBS.values(), ids=BOMBS.keys())
def test_small_texts_that_build_huge_things_are_refused(guard: QueryGuard, sql: str) -> None:
    assert refusal(guard, sql).code in REFUSED_BEFORE_EXECUTION


@pytest.mark.parametrize(("sql", "params"), PARAMETER_BOMBS.values(), ids=PARAMETER_BOMBS.keys())
def test_long_parameters_that_build_huge_things_are_refused(
    guard: QueryGuard, sql: str, params: list[JsonValue]
) -> None:
    with pytest.raises(QueryRefusedError) as caught:
        guard.check(sql, params)
    assert caught.value.code == RefusalCode.NOT_ALLOWED
    assert "too complex" in caught.value.message


def test_a_statement_that_passed_with_short_parameters_is_checked_again_with_long_ones(guard: QueryGuard) -> None:
    sql = "SELECT replace(carrier, 'A', $1) FROM flights"
    guard.check(sql, ["B"])
    with pytest.raises(QueryRefusedError, match="long parameters"):
        guard.check(sql, ["B" * 20_000])


@pytest.mark.parametrize(("sql", "params"), USEFUL_WITH_PARAMETERS)
def test_long_parameters_that_are_only_looked_at_are_accepted(
    store: DuckDBStore, sql: str, params: list[JsonValue]
) -> None:
    request = QueryRequest(id="1", sql=sql, params=params)
    queries = DuckDBQueries(store, CATALOG)
    assert queries.prepare(
        request, partition=None, scope=frozenset(range(PARTITIONS)), limits=FetchLimits(10_000, 1_000_000)
    ).run()


@pytest.mark.parametrize("sql", USEFUL)
def test_useful_statements_are_accepted_and_run(store: DuckDBStore, sql: str) -> None:
    queries = DuckDBQueries(store, CATALOG)
    for partition in (None, 1):
        scope = frozenset(range(PARTITIONS) if partition is None else [partition])
        for answer_format in ("json", "arrow"):
            request = QueryRequest.model_validate({"id": "1", "sql": sql, "format": answer_format})
            body = queries.prepare(
                request, partition=partition, scope=scope, limits=FetchLimits(10_000, 1_000_000)
            ).run()
            assert body.columns


def test_reading_the_ledger_is_reading_every_table(store: DuckDBStore) -> None:
    request = QueryRequest(id="1", sql="SELECT (SELECT count(*) FROM _LEDGER)")
    queries = DuckDBQueries(store, CATALOG)
    query = queries.prepare(request, partition=0, scope=frozenset([0]), limits=FetchLimits(1, 99))
    assert query.run().offsets.keys() == set(CATALOG.topics)
    assert queries.check(request).tables == tuple(sorted(table.name for table in CATALOG.tables))


def test_hostile_pieces_are_refused_wherever_they_stand(guard: QueryGuard) -> None:
    fuzzer = StatementFuzzer(seed=FUZZED_SEED)
    passed = 0
    for _ in range(FUZZED_STATEMENTS):
        statement = fuzzer.statement()
        try:
            guard.check(statement.sql, [])
        except QueryRefusedError as error:
            if statement.hostile:
                assert error.code in REFUSED_BEFORE_EXECUTION  # noqa: PT017
        else:
            assert not statement.hostile, statement
            passed += 1
    assert passed > FUZZED_STATEMENTS / 5, "what is not hostile passes"


def test_noise_is_refused_and_nothing_else(guard: QueryGuard) -> None:
    """Statements with characters deleted, doubled and swapped: whatever comes of it, the guard has an answer."""
    rng = random.Random(FUZZED_SEED)
    statements = [*HOSTILE, *USEFUL]
    for _ in range(FUZZED_STATEMENTS):
        text = list(rng.choice(statements))
        for _ in range(rng.randint(1, 5)):
            place = rng.randrange(len(text) + 1)
            text[place : place + rng.randint(0, 3)] = rng.choice(
                ("", ";", "'", '"', "(", ")", "--", "/*", "\x00", "ü", "$1")
            )
        with contextlib.suppress(QueryRefusedError):
            guard.check("".join(text), [])


def test_every_allowed_function_exists() -> None:
    with duckdb.connect() as connection:
        known = {
            name for (name,) in connection.execute("SELECT DISTINCT function_name FROM duckdb_functions()").fetchall()
        }
    parsed_away = {"unnest", "row", "count_star"}  # the binder's own
    assert set(FUNCTIONS) - known - parsed_away == set()


def test_refusals_name_the_construct_and_the_way_out(guard: QueryGuard) -> None:
    unknown = refusal(guard, "SELECT * FROM flihgts")
    assert unknown.code == RefusalCode.UNKNOWN_TABLE
    assert "did you mean flights?" in unknown.hint
    assert "airlines" in unknown.hint

    syntax = refusal(guard, "SELECT id FROM flights WERE id = 1")
    assert syntax.code == RefusalCode.BAD_SQL
    assert "syntax error" in syntax.message
    assert "at character" in syntax.message

    function = refusal(guard, "SELECT regexp_replce(carrier, 'a', 'b') FROM flights")
    assert function.code == RefusalCode.NOT_ALLOWED
    assert "regexp_replce()" in function.message
    assert "did you mean regexp_replace()?" in function.hint

    qualified = refusal(guard, "SELECT * FROM main.flights")
    assert qualified.code == RefusalCode.NOT_ALLOWED
    assert "'main'" in qualified.message


def test_a_query_knows_its_tables_and_parameters(guard: QueryGuard) -> None:
    query = guard.check(
        "WITH a AS (SELECT * FROM flights WHERE id = $id) FROM a JOIN Airlines USING (carrier) WHERE name = $name",
        {"id": 1, "name": "x"},
    )
    assert query.tables == ("airlines", "flights")
    assert query.parameters == {"id", "name"}


@pytest.mark.parametrize(
    ("sql", "params", "words"),
    [
        ("SELECT ?", [], "no value for $1"),
        ("SELECT ?", [1, 2], "no parameter in the statement for $2"),
        ("SELECT $a", {"b": 1}, "no value for $a; no parameter in the statement for $b"),
        ("SELECT $a", [1], "no value for $a"),
        ("SELECT ?", ["x" * 20_001], "20001 characters"),
        ("SELECT carrier LIKE '%' || ? || '%' FROM flights", ["%a%a%b"], "more than 2 %"),
        ("SELECT regexp_matches(carrier, $p) FROM flights", {"p": "(a?){1000}"}, "repeats more than 200"),
        ("SELECT ?", [[{"deep": "x" * 20_001}]], "20001 characters"),
    ],
)
def test_parameters_must_match_the_statement(guard: QueryGuard, sql: str, params: list[object], words: str) -> None:
    with pytest.raises(QueryRefusedError) as caught:
        guard.check(sql, params)  # type: ignore[arg-type]
    assert caught.value.code == RefusalCode.BAD_PARAMS
    assert words in caught.value.message


def test_a_function_that_slips_past_the_guard_still_cannot_write(store: DuckDBStore) -> None:
    """The second wall: queries run in a read-only transaction."""
    cursor = store.query_cursor(None)
    cursor.execute("BEGIN TRANSACTION READ ONLY")
    with pytest.raises(duckdb.Error, match="read-only"):
        cursor.execute("DELETE FROM partition_0.main.flights")
    cursor.close()
