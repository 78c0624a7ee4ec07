"""`make bench-ingest` on a small topic: everybody drains the same rows, and the last line can be read by a program.

Quix Streams is left out: it would be fetched from a package index in the middle of the tests.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from loadtest.orders import expected_totals, slices
from tests.benchmarks import bench

EVENTS = 3_000


def bench_ingest(tmp_path: Path, *arguments: str) -> dict[str, Any]:
    """The result of one run from outside."""
    result = bench("loadtest.bench_ingest", tmp_path, "--events", str(EVENTS), "--partitions", "4", *arguments)
    assert result["faults"] == []
    return result


def test_everybody_drains_the_same_rows(tmp_path: Path) -> None:
    result = bench_ingest(tmp_path, "--without", "quix", "--note", "a test")
    drains = result["drains"]
    names = {"ceiling", "raw", "plain_faust", "pintail"}
    assert drains.keys() == {f"{name}_{kind}" for name in names for kind in ("append", "upsert")}
    for kind, expected in zip(("append", "upsert"), expected_totals(slices(EVENTS, 2)), strict=True):
        for name in names:
            drain = drains[f"{name}_{kind}"]
            assert drain["rows"] == expected.rows, (name, kind)
            assert drain["complete"]
            assert drain["peak_rss_mib"] > 0
        rates = {name: drains[f"{name}_{kind}"]["events_per_second"] for name in names}
        prefix = "upsert_vs_" if kind == "upsert" else "vs_"
        for name in names - {"pintail"}:
            assert result[prefix + name] == pytest.approx(rates["pintail"] / rates[name], abs=0.01)
    assert result["note"] == "a test"


def test_growth_gives_the_rate_of_every_part_with_text_keys_too(tmp_path: Path) -> None:
    result = bench_ingest(tmp_path, "--growth", "--text-keys")
    assert result["keys"] == "text"
    for kind in ("append", "upsert"):
        growth = result["drains"][f"pintail_{kind}"]["growth"]
        assert len(growth["events_per_second"]) == EVENTS // growth["events_per_part"] == 4
        assert all(rate > 0 for rate in growth["events_per_second"])
