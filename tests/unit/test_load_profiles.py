"""The load profiles and what judges them: schedule, oracle, visibility, report."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import duckdb
import pytest
from hypothesis import given
from hypothesis import strategies as st

from loadtest.__main__ import main
from loadtest.log_oracle import (
    Expected,
    Record,
    Verdict,
    bucket_size,
    compare_dead_letters,
    compare_rows,
    expected_of,
    judged,
)
from loadtest.open_loop import Phase, Schedule, stretched
from loadtest.profile_report import bounds_of, by_second, page, write_results
from loadtest.profile_run import Outcome, as_result
from loadtest.profiles import PROFILES, Bound, Profile
from loadtest.visibility import Seen, visible_at
from schemas.dead_letters import dead_letter_headers
from schemas.duckdb_ddl import create_table_sql
from schemas.parser import parse_table
from schemas.table import TableDefinition

phases = st.lists(
    st.builds(Phase, st.floats(0.1, 20), st.floats(1, 200_000).map(lambda rate: round(rate, 1))), min_size=1, max_size=4
)


def table_of(folder: Path, profile: Profile, name: str) -> TableDefinition:
    """One table of a profile."""
    home = folder / name
    home.mkdir(parents=True, exist_ok=True)
    (home / "001_create.sql").write_text(profile.tables[name])
    return parse_table(home).table


# -- the schedule ------------------------------------------------------------------------------------------------------


@given(phases, st.data())
def test_an_event_is_sent_when_it_is_due_and_not_before(phases: list[Phase], data: st.DataObject) -> None:
    schedule = Schedule(phases)
    if not schedule.events:
        return
    number = data.draw(st.integers(0, schedule.events - 1))
    due_at = schedule.due_at(number)
    assert schedule.due(due_at + 1e-5) > number
    assert schedule.due(due_at - 1e-4) <= number
    assert 0 <= due_at < schedule.seconds
    assert schedule.due(schedule.seconds + 1) == schedule.events
    assert schedule.due(-0.001) == 0


def test_the_rates_of_phases_are_kept() -> None:
    schedule = Schedule([Phase(2, 10), Phase(1, 100), Phase(2, 10)])
    assert schedule.events == 140
    assert [schedule.due_at(number) for number in (0, 1, 20, 21, 120)] == [0.0, 0.1, 2.0, 2.01, 3.0]


def test_a_shorter_run_keeps_the_rates_and_a_scaled_one_the_time() -> None:
    assert stretched([Phase(2, 10), Phase(6, 20)], seconds=4) == (Phase(1, 10), Phase(3, 20))
    assert stretched([Phase(2, 10)], scale=0.5) == (Phase(2, 5),)


# -- the profiles ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("profile", PROFILES.values(), ids=PROFILES.keys())
def test_a_profile_sends_what_its_tables_take(tmp_path: Path, profile: Profile) -> None:
    tables = {name: table_of(tmp_path, profile, name) for name in profile.tables}
    assert {table.topic for table in tables.values()} == {profile.event(number).topic for number in range(2_000)}
    good = 0
    for number in range(1_000):
        event = profile.event(number)
        fields = judged(tables[event.topic], event.key, event.value)
        good += fields is not None
        assert fields is None or fields["n"] == number
        assert event.partition < tables[event.topic].partitions
    assert good == (800 if profile.name == "poison-storm" else 1_000)
    assert bool(profile.backlog) != bool(profile.phases)
    assert profile.catches.count(".") == 1, "one sentence"
    assert profile.bounds


def test_the_hot_partition_gets_a_hundred_times_the_events() -> None:
    profile = PROFILES["hot-partition"]
    counts = [0] * 8
    for number in range(107_000):
        counts[profile.event(number).partition] += 1
    assert counts == [100_000, *[1_000] * 7]


# -- the oracle --------------------------------------------------------------------------------------------------------


class Rows:
    """A table in DuckDB, asked as the query topic is."""

    def __init__(self, table: TableDefinition) -> None:
        self._connection = duckdb.connect()
        self._connection.execute(create_table_sql(table, qualified_name=table.name))
        self._name = table.name

    def add(self, *rows: tuple[int, int, int]) -> None:
        """(partition, offset, number)."""
        for partition, offset, number in rows:
            self._connection.execute(
                f"INSERT INTO {self._name} VALUES (1, {number}, 'c', 1.0, 'DE', now(), {partition}, {offset}, now())"
            )

    def change(self, sql: str) -> None:
        """Breaks something."""
        self._connection.execute(f"{sql.format(table=self._name)}")

    def ask(self, sql: str) -> Sequence[Sequence[Any]]:
        """The rows of a SELECT."""
        return self._connection.execute(sql).fetchall()


def records(profile: Profile, numbers: Iterable[int], *, partition: int = 0) -> list[Record]:
    """These events in one partition, one after the other."""
    return [
        Record(partition, offset, event.key, event.value)
        for offset, event in enumerate(profile.event(number) for number in numbers)
    ]


@pytest.fixture
def orders(tmp_path: Path) -> tuple[TableDefinition, Expected, Rows]:
    """3,000 events of an append table, all of them stored."""
    profile = PROFILES["hot-partition"]
    table = table_of(tmp_path, profile, "orders")
    expected = expected_of(table, records(profile, range(3_000)))
    rows = Rows(table)
    rows.change("INSERT INTO {table} SELECT 1, i, 'c', 1.0, 'DE', now(), 0, i, now() FROM range(3000) t(i)")
    return table, expected, rows


def test_the_oracle_finds_nothing_where_nothing_is_wrong(orders: tuple[TableDefinition, Expected, Rows]) -> None:
    table, expected, rows = orders
    verdict = compare_rows(table, expected, rows.ask)
    assert verdict == Verdict(expected=3_000)
    assert verdict.is_right


@pytest.mark.parametrize(
    ("damage", "counts"),
    [
        ("DELETE FROM {table} WHERE _offset IN (0, 999, 2999)", {"lost": 3}),
        ("INSERT INTO {table} FROM {table} WHERE _offset IN (7, 1007)", {"doubled": 2}),
        ("UPDATE {table} SET n = n + 1 WHERE _offset IN (5, 6)", {"changed": 2}),
        ("UPDATE {table} SET _offset = _offset + 5000 WHERE _offset = 42", {"lost": 1, "unexpected": 1}),
        ("UPDATE {table} SET _partition = 3 WHERE _offset = 42", {"lost": 1, "unexpected": 1}),
        # The same number of rows, and the same sum of offsets: 1 and 4 are lost, 2 and 3 there twice.
        (
            "UPDATE {table} SET _offset = CASE _offset WHEN 1 THEN 2 ELSE 3 END, "
            "n = CASE _offset WHEN 1 THEN 2 ELSE 3 END WHERE _offset IN (1, 4)",
            {"lost": 2, "doubled": 2},
        ),
        ("DELETE FROM {table}", {"lost": 3_000}),
    ],
)
def test_the_oracle_counts_what_is_wrong(
    orders: tuple[TableDefinition, Expected, Rows], damage: str, counts: dict[str, int]
) -> None:
    table, expected, rows = orders
    rows.change(damage)
    verdict = compare_rows(table, expected, rows.ask)
    assert {name: getattr(verdict, name) for name in ("lost", "doubled", "unexpected", "changed")} == {
        "lost": 0,
        "doubled": 0,
        "unexpected": 0,
        "changed": 0,
        **counts,
    }
    assert not verdict.is_right
    assert 0 < len(verdict.named) <= 5


def test_of_a_keyed_table_only_the_newest_record_of_a_key_is_a_row(tmp_path: Path) -> None:
    profile = PROFILES["steady"]
    table = table_of(tmp_path, profile, "accounts")
    expected = expected_of(table, records(profile, [1, 3, 20_001, 20_003, 40_001]))
    assert expected.rows == {0: {3: 20_003, 4: 40_001}}
    assert expected.arrivals == {0: [(0, 1), (1, 3), (2, 20_001), (3, 20_003), (4, 40_001)]}
    assert expected.last_offsets == {0: 4}
    rows = Rows(table)
    rows.add((0, 3, 20_003), (0, 4, 40_001), (0, 2, 20_001))
    verdict = compare_rows(table, expected, rows.ask)
    assert (verdict.unexpected, verdict.lost) == (1, 0)


class Letter:
    """A dead letter, as a consumer gives it."""

    def __init__(self, topic: str, offset: int) -> None:
        self._headers = dead_letter_headers(
            topic=topic, partition=0, offset=offset, timestamp_ms=1, reason="not_json", detail="d"
        )

    def headers(self) -> list[tuple[str, bytes]]:
        """Its provenance."""
        return self._headers


def test_dead_letters_are_counted_by_where_they_come_from(tmp_path: Path) -> None:
    profile = PROFILES["poison-storm"]
    table = table_of(tmp_path, profile, "orders")
    expected = expected_of(table, records(profile, range(20)))
    assert expected.parked == {(0, 0), (0, 5), (0, 10), (0, 15)}
    assert len(expected.rows[0]) == 16
    right: Any = [Letter("orders", offset) for offset in (0, 5, 10, 15)]
    assert compare_dead_letters(table, expected, [*right, Letter("other", 5)]) == Verdict(expected=4)
    wrong = compare_dead_letters(table, expected, [*right[:3], *right[:2], Letter("orders", 3)])
    assert (wrong.lost, wrong.doubled, wrong.unexpected) == (1, 2, 1)


def test_an_answer_about_all_buckets_stays_small() -> None:
    assert bucket_size(10) == 1_000
    assert 40_000_000 / bucket_size(40_000_000) <= 4_000


# -- visibility --------------------------------------------------------------------------------------------------------


def test_an_event_is_visible_with_the_first_answer_that_reflects_it() -> None:
    seen = [
        Seen(2.0, {"orders": {0: 3}}),
        Seen(1.0, {"orders": {0: 1}}),
        Seen(3.0, {"orders": {0: 3, 1: 9}}),
        Seen(4.0, {"orders": {0: 5}}),
    ]
    arrivals = [(0, 10), (1, 11), (2, 12), (4, 14), (5, 15)]
    assert visible_at(seen, "orders", 0, arrivals) == [(10, 1.0), (11, 2.0), (12, 2.0), (14, 4.0)]
    assert visible_at(seen, "orders", 1, [(8, 1)]) == [(1, 3.0)]
    assert visible_at(seen, "others", 0, arrivals) == []


# -- the report --------------------------------------------------------------------------------------------------------


def test_bounds_say_whether_they_are_met() -> None:
    profile = PROFILES["backlog-drain"]
    bounds = bounds_of(profile, {"drain_events_per_second": 999_999, "peak_rss_mib": 1_024})
    assert [bound["met"] for bound in bounds] == [False, True]
    assert [bound["met"] for bound in bounds_of(profile, {})] == [False, False]
    assert Bound("x", 5, at_least=True).is_met(5)


def test_latencies_by_the_second_in_which_events_were_due() -> None:
    assert by_second([(1.5, 10.0), (0.1, 2.0), (1.9, 10.0)]) == [(0, 2.0, 2.0, 2.0), (1, 10.0, 10.0, 10.0)]


@pytest.mark.parametrize("name", ["steady", "backlog-drain"])
def test_results_are_a_file_for_programs_a_picture_and_a_page(tmp_path: Path, name: str) -> None:
    from loadtest.machine import machine

    profile = PROFILES[name]
    outcome = Outcome(3, metrics={"visible_ms_p99": 12.5}, rows=Verdict(expected=3))
    outcome.latencies = [(0.5, 3.0), (1.5, 12.5)] if name == "steady" else []
    outcome.progress = [(0.0, 1, 0), (1.0, 3, 3)]
    outcome.memory = [(0.0, 100.0), (1.0, 120.0)]
    outcome.rows.note("lost", "orders[1]@7")
    result = {
        "profile": name,
        "catches": profile.catches,
        "scale": 1.0,
        "note": "a test",
        "started": "2026-01-01T00:00:00+00:00",
        "machine": machine(),
        "is_right": outcome.is_right,
        "bounds": bounds_of(profile, outcome.metrics),
        **as_result(outcome),
    }
    write_results(tmp_path / "results", profile, result, outcome)
    assert json.loads((tmp_path / "results" / f"{name}.json").read_text())["rows"]["lost"] == 1
    assert (tmp_path / "results" / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    text = (tmp_path / "results" / f"{name}.md").read_text()
    assert text == page(result)
    for words in (
        profile.catches,
        "NOT CORRECT",
        "orders[1]@7",
        f"{name}.png",
        "a test",
        "cores",
        "DuckDB",
        "peak_rss",
    ):
        assert words in text


def test_without_arguments_the_profiles_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 0
    listed = capsys.readouterr().out
    assert all(name in listed for name in PROFILES)
