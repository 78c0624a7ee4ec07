"""Benchmarks and load profiles, run from outside as a user runs them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import orjson

ROOT = Path(__file__).resolve().parents[1]


def last_line_of(module: str, *arguments: str) -> dict[str, Any]:
    """The object on the last line of `python -m module`, which must succeed."""
    done = subprocess.run(
        [sys.executable, "-m", module, *arguments],
        cwd=ROOT,
        env={name: value for name, value in os.environ.items() if not name.startswith("PINTAIL_")},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, f"{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    result: dict[str, Any] = orjson.loads(done.stdout.splitlines()[-1])
    return result


def bench(module: str, folder: Path, *arguments: str) -> dict[str, Any]:
    """The result of a benchmark, which is on its last line and in its file; its data is gone."""
    data_dir, output = folder / "bench", folder / "results" / "one.json"
    result = last_line_of(module, *arguments, "--data-dir", str(data_dir), "--output", str(output))
    assert result == orjson.loads(output.read_bytes())
    assert not data_dir.exists()
    return result
