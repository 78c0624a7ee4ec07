"""A load profile runs from outside on the real stack, loses and doubles nothing, and says so in three files."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import orjson

ROOT = Path(__file__).resolve().parents[2]


def test_a_profile_finds_every_row_once_and_leaves_its_results(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "loadtest", "steady", "--scale", "0.02", "--seconds", "3"]
    command += ["--data-dir", str(tmp_path / "data"), "--results", str(tmp_path / "results"), "--note", "a test"]
    done = subprocess.run(
        command,
        cwd=ROOT,
        env={name: value for name, value in os.environ.items() if not name.startswith("PINTAIL_")},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, f"{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    result = orjson.loads(done.stdout.splitlines()[-1])
    assert result == orjson.loads((tmp_path / "results" / "steady.json").read_bytes())
    assert result["is_right"]
    assert result["events"] == 1_200
    # 600 orders, and the 600 accounts that 600 changes are about.
    assert result["rows"] == {
        "expected": 1_200, "lost": 0, "doubled": 0, "unexpected": 0, "changed": 0, "named": [],
    }  # fmt: skip
    assert result["dead_letters"]["expected"] == 0
    metrics = result["metrics"]
    assert 0 < metrics["visible_ms_p50"] <= metrics["visible_ms_p99"] <= metrics["visible_ms_max"]
    assert {bound["metric"] for bound in result["bounds"]} == {"visible_ms_p99", "peak_rss_mib"}
    assert (tmp_path / "results" / "steady.png").stat().st_size > 1_000
    assert "**Correct**" in (tmp_path / "results" / "steady.md").read_text()
    assert not (tmp_path / "data").exists()
