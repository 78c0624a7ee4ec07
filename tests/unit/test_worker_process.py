"""What the process of a worker loads, and what works in it all the same."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
#: Both engines look for pandas: DuckDB for parameters, Arrow for lists.
PROGRAM = """
import importlib.util, sys
assert importlib.util.find_spec("pandas"), "it must be installed for this test to mean anything"
import agents.__main__
import duckdb
import pyarrow
assert duckdb.connect().execute("SELECT ?", ["x"]).fetchall() == [("x",)]
assert pyarrow.table({"number": [1, 2]}).num_rows == 2
assert "pandas" not in sys.modules
"""


def test_a_worker_does_without_pandas_and_reads_lists_and_parameters() -> None:
    done = subprocess.run([sys.executable, "-c", PROGRAM], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
