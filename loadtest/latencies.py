"""Percentiles of latencies, exact: every value is kept and sorted."""

from __future__ import annotations

import statistics
from collections.abc import Sequence


def percentiles(milliseconds: Sequence[float]) -> dict[str, float]:
    """Median, 99th percentile and largest, of one value or more."""
    ordered = sorted(milliseconds)
    cuts = statistics.quantiles(ordered, n=100, method="inclusive") if len(ordered) > 1 else ordered * 99
    return {"p50": round(cuts[49], 2), "p99": round(cuts[98], 2), "max": round(ordered[-1], 2)}
