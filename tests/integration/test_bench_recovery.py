"""The recovery benchmark runs from outside on little state, and its result can be read by a program."""

from __future__ import annotations

from pathlib import Path

from tests.benchmarks import bench


def test_every_step_is_measured_no_row_is_lost_and_the_last_line_is_the_result(tmp_path: Path) -> None:
    result = bench("loadtest.bench_recovery", tmp_path, "--rows", "4000", "--samples", "10", "--note", "a test")
    assert result["faults"] == []
    assert (result["local"]["rung"], result["redis"]["rung"]) == ("local_file", "snapshot")
    assert 0 < result["changed_snapshot_bytes"] < result["full_snapshot_bytes"] < result["state_bytes"]
    assert (result["standby"]["rung"], result["standby_seconds"]) == ("warm", result["standby"]["answered_seconds"])
