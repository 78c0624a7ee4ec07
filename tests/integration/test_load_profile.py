"""A load profile runs from outside on the real stack, loses and doubles nothing, and says so in three files."""

from __future__ import annotations

from pathlib import Path

import orjson

from tests.benchmarks import last_line_of


def test_a_profile_finds_every_row_once_and_leaves_its_results(tmp_path: Path) -> None:
    options = ("--scale", "0.02", "--seconds", "3", "--note", "a test")
    folders = ("--data-dir", str(tmp_path / "data"), "--results", str(tmp_path / "results"))
    result = last_line_of("loadtest", "steady", *options, *folders)
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
