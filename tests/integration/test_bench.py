"""The benchmark runs from outside on a small backlog, and its result can be read by a program."""

from __future__ import annotations

from pathlib import Path

import pytest

from loadtest.bench_measures import TABLES, flights_for
from loadtest.flights import ROWS
from schemas.catalog import load_catalog
from tests.benchmarks import bench

EVENTS = 2_000


def test_both_sides_drain_the_same_rows_and_the_last_line_is_the_result(tmp_path: Path) -> None:
    result = bench("loadtest.bench", tmp_path, "--events", str(EVENTS), "--samples", "20", "--note", "a test")
    assert result["note"] == "a test"
    assert result["machine"]["cores"] >= 1
    for table in ("flights_append", "flights_upsert"):
        drain = result["drain"][table]
        assert drain["pintail"]["rows"] == drain["by_hand"]["rows"] == EVENTS
        rates = [drain[side]["events_per_second"] for side in ("pintail", "by_hand")]
        assert drain["ratio"] == pytest.approx(rates[0] / rates[1], abs=0.01)
    for latency in ("query_ms", "write_to_visible_ms"):
        assert 0 < result[latency]["p50"] <= result[latency]["p99"] <= result[latency]["max"]


def test_events_beyond_the_data_set_are_flights_of_their_own() -> None:
    table = load_catalog(TABLES).by_name("flights_upsert")
    events = ROWS["flights"] + 1_000
    keys = set()
    for event in flights_for(table, events):
        assert event.value.startswith(b'{"id":"' + event.key + b'"')
        keys.add(event.key)
    assert len(keys) == events
