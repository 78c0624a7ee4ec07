"""What numbers depend on: cores, memory, load and versions. Part of every result."""

from __future__ import annotations

import os
import platform
from importlib.metadata import version
from typing import Any

_PACKAGES = (
    *("pintail", "duckdb", "aiokafka", "faust-streaming", "confluent-kafka", "pyarrow"),
    *("clickhouse-connect", "chdb-core"),
)


def machine() -> dict[str, Any]:
    """The machine as it is at this moment."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory_gib": round(memory / 2**30, 1),
        "load_before": round(os.getloadavg()[0], 1),
        "system": platform.platform(),
        "python": platform.python_version(),
        **{package: version(package) for package in _PACKAGES},
    }


def machine_in_words(each: dict[str, Any]) -> str:
    """One line for people."""
    return (
        f"{each['cores']} cores, {each['memory_gib']} GiB, load {each['load_before']} before the run; "
        f"Python {each['python']}, DuckDB {each['duckdb']}"
    )
