"""The sink's benchmark runs from outside on a small load, and its result can be read by a program."""

from __future__ import annotations

from pathlib import Path

from tests.benchmarks import bench


def test_the_last_line_is_the_result_with_every_target_judged(tmp_path: Path) -> None:
    load = ("--events", "2000", "--insert-events", "2000", "--rate", "500", "--seconds", "2")
    result = bench("loadtest.bench_sink", tmp_path, *load)
    assert result["drain"]["events"] == 2_000
    assert result["freshness"]["events"] == 1_000
    visible = result["freshness"]["visible_ms"]
    assert 0 < visible["p50"] <= visible["p99"] <= visible["max"]
    assert result["freshness"]["active_parts"]["max"] >= 1
    assert set(result["cpu_us_per_row"]) == {"pintail_decode", "pintail_insert", "rows_decode", "rows_insert"}
    targets = result["targets"]
    assert targets["rows_per_second"]["measured"] == result["drain"]["rows_per_second"]
    assert targets["visible_ms_p99"]["measured"] == visible["p99"]
