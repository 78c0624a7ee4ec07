"""The benchmark runs from outside on a small backlog, and its result can be read by a program."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import orjson
import pytest

from loadtest.bench_measures import TABLES, flights_for
from loadtest.flights import ROWS
from schemas.catalog import load_catalog

ROOT = Path(__file__).resolve().parents[2]
EVENTS = 2_000


def test_both_sides_drain_the_same_rows_and_the_last_line_is_the_result(tmp_path: Path) -> None:
    output = tmp_path / "results" / "one.json"
    command = [sys.executable, "-m", "loadtest.bench", "--events", str(EVENTS), "--samples", "20"]
    command += ["--data-dir", str(tmp_path / "bench"), "--output", str(output), "--note", "a test"]
    done = subprocess.run(
        command,
        cwd=ROOT,
        env={name: value for name, value in os.environ.items() if not name.startswith("PINTAIL_")},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    result = orjson.loads(done.stdout.splitlines()[-1])
    assert result == orjson.loads(output.read_bytes())
    assert result["note"] == "a test"
    assert result["machine"]["cores"] >= 1
    for table in ("flights_append", "flights_upsert"):
        drain = result["drain"][table]
        assert drain["pintail"]["rows"] == drain["by_hand"]["rows"] == EVENTS
        rates = [drain[side]["events_per_second"] for side in ("pintail", "by_hand")]
        assert drain["ratio"] == pytest.approx(rates[0] / rates[1], abs=0.01)
    for latency in ("query_ms", "write_to_visible_ms"):
        assert 0 < result[latency]["p50"] <= result[latency]["p99"] <= result[latency]["max"]
    assert not (tmp_path / "bench").exists()


def test_events_beyond_the_data_set_are_flights_of_their_own() -> None:
    table = load_catalog(TABLES).by_name("flights_upsert")
    events = ROWS["flights"] + 1_000
    keys = set()
    for event in flights_for(table, events):
        assert event.value.startswith(b'{"id":"' + event.key + b'"')
        keys.add(event.key)
    assert len(keys) == events
