"""The parts of the benchmarks that decide what is expected, and what was used and how fast."""

from __future__ import annotations

import json
from collections import Counter
from decimal import Decimal
from pathlib import Path

import pytest

from loadtest.bench_ingest import ratios
from loadtest.ingest_contest import growth
from loadtest.latencies import percentiles
from loadtest.orders import Totals, expected_totals, orders, slices, table_sql
from loadtest.store_drain import seconds_per_part
from loadtest.usage import Sample, cpu_at
from schemas.parser import parse_table


@pytest.mark.parametrize("text_ids", [False, True])
@pytest.mark.parametrize(("events", "count"), [(1, 2), (10, 1), (997, 3), (20_000, 2)])
def test_what_tables_of_orders_must_hold_is_what_the_events_say(events: int, count: int, text_ids: bool) -> None:
    rows = []
    for part in slices(events, count):
        for key, value in orders(part, text_ids=text_ids):
            rows.append(json.loads(value, parse_float=Decimal))
            assert str(rows[-1]["id"]).encode() == key
    newest = {row["id"]: row["amount"] for row in rows}
    appended, upserted = expected_totals(slices(events, count))
    assert appended == Totals(len(rows), len(newest), sum((row["amount"] for row in rows), Decimal()))
    assert upserted == Totals(len(newest), len(newest), sum(newest.values(), Decimal()))
    assert len(rows) == events


def test_every_tenth_order_changes_an_earlier_one_and_events_are_narrow() -> None:
    (part,) = slices(10_000, 1)
    values = [value for _, value in orders(part)]
    times = Counter(json.loads(value)["id"] for value in values)
    assert len(times) == 9_000
    assert max(times.values()) == 2
    assert 90 < sum(map(len, values)) / len(values) < 120


def test_slices_cover_all_events_once_and_no_key_is_in_two() -> None:
    parts = slices(1_234, 4)
    assert [number for part in parts for number in range(*part)] == list(range(1_234))
    keys = [{key for key, _ in orders(part)} for part in parts]
    assert sum(map(len, keys)) == len(set().union(*keys))


@pytest.mark.parametrize("keyed", [False, True])
def test_the_table_of_orders_is_a_table(tmp_path: Path, keyed: bool) -> None:
    folder = tmp_path / "orders"
    folder.mkdir()
    (folder / "001_create.sql").write_text(table_sql(keyed=keyed, partitions=3))
    table = parse_table(folder).table
    assert (table.name, table.topic, table.partitions, table.is_keyed) == ("orders", "orders", 3, keyed)


def test_percentiles_of_a_known_distribution() -> None:
    assert percentiles([float(number) for number in range(101)]) == {"p50": 50.0, "p99": 99.0, "max": 100.0}
    assert percentiles([7.0]) == {"p50": 7.0, "p99": 7.0, "max": 7.0}


def test_cpu_seconds_are_interpolated_between_looks_and_end_with_the_process() -> None:
    samples = [Sample(10.0, 1.0, 1), Sample(11.0, 3.0, 1)]
    assert [cpu_at(samples, moment) for moment in (9.0, 10.0, 10.5, 11.0, 99.0)] == [1.0, 1.0, 2.0, 3.0, 3.0]
    assert cpu_at([], 1.0) == 0.0


def test_the_time_of_each_part_of_a_drain() -> None:
    curve = [(100.0, 0), (101.0, 50), (102.0, 250), (104.0, 350)]
    assert seconds_per_part(curve, 100) == [1.25, 0.5, 1.25]
    assert growth(curve, 100) == {
        "events_per_part": 100,
        "events_per_second": [80, 200, 80],
        "last_vs_first": 1.0,
    }
    assert growth(curve, 1_000)["last_vs_first"] is None


def test_ratios_are_those_of_the_peers_that_took_part() -> None:
    rates = {"pintail_append": 100, "raw_append": 40, "pintail_upsert": 60, "plain_faust_upsert": 5}
    drains = {name: {"events_per_second": rate} for name, rate in rates.items()}
    assert ratios(drains) == {"vs_raw": 2.5, "upsert_vs_plain_faust": 12.0}
