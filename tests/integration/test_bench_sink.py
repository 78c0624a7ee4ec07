"""The sink's benchmark runs from outside on a small load, and its result can be read by a program."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import orjson

ROOT = Path(__file__).resolve().parents[2]


def test_the_last_line_is_the_result_with_every_target_judged(tmp_path: Path) -> None:
    output = tmp_path / "one.json"
    command = [sys.executable, "-m", "loadtest.bench_sink", "--events", "2000", "--insert-events", "2000"]
    command += ["--rate", "500", "--seconds", "2", "--data-dir", str(tmp_path / "bench"), "--output", str(output)]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PINTAIL_")}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    result = orjson.loads(done.stdout.splitlines()[-1])
    assert result == orjson.loads(output.read_bytes())
    assert result["drain"]["events"] == 2_000
    assert result["freshness"]["events"] == 1_000
    visible = result["freshness"]["visible_ms"]
    assert 0 < visible["p50"] <= visible["p99"] <= visible["max"]
    assert result["freshness"]["active_parts"]["max"] >= 1
    assert set(result["cpu_us_per_row"]) == {"pintail_decode", "pintail_insert", "rows_decode", "rows_insert"}
    targets = result["targets"]
    assert targets["rows_per_second"]["measured"] == result["drain"]["rows_per_second"]
    assert targets["visible_ms_p99"]["measured"] == visible["p99"]
    assert not (tmp_path / "bench").exists()
