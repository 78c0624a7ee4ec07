"""The recovery benchmark runs from outside on little state, and its result can be read by a program."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import orjson

ROOT = Path(__file__).resolve().parents[2]


def test_every_step_is_measured_no_row_is_lost_and_the_last_line_is_the_result(tmp_path: Path) -> None:
    output = tmp_path / "results" / "one.json"
    command = [sys.executable, "-m", "loadtest.bench_recovery", "--rows", "4000", "--samples", "10"]
    command += ["--data-dir", str(tmp_path / "bench"), "--output", str(output), "--note", "a test"]
    done = subprocess.run(
        command,
        cwd=ROOT,
        env={name: value for name, value in os.environ.items() if not name.startswith("PINTAIL_")},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    result = orjson.loads(done.stdout.splitlines()[-1])
    assert result == orjson.loads(output.read_bytes())
    assert result["faults"] == []
    assert (result["local"]["rung"], result["redis"]["rung"]) == ("local_file", "snapshot")
    assert 0 < result["changed_snapshot_bytes"] < result["full_snapshot_bytes"] < result["state_bytes"]
    assert (result["standby"]["rung"], result["standby_seconds"]) == ("warm", result["standby"]["answered_seconds"])
    assert not (tmp_path / "bench").exists()
