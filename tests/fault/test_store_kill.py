"""kill -9 while applying: rows and next_offset agree afterwards, and nothing durable is lost (invariant 1)."""

from __future__ import annotations

import random
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from schemas.catalog import Catalog
from streams.adapters.duckdb_store import DuckDBStore
from tests.store_samples import EVENTS, FLIGHTS, decoded

CATALOG = Catalog((EVENTS, FLIGHTS))
KEYS = 50


def keep_applying(directory: Path) -> None:
    """Applies batches without end from where the store is, checkpoints now and then, prints what is durable."""
    store = DuckDBStore(directory, CATALOG, memory_limit="256MB")
    partition = store.open_partition(0)
    rounds = 0
    while True:
        first = partition.next_offsets().get(EVENTS.topic, 0)
        offsets = range(first, first + 40)
        partition.apply(
            [
                decoded(EVENTS, [{"what": str(offset)} for offset in offsets], first=first),
                decoded(FLIGHTS, [{"id": offset % KEYS, "delay": offset} for offset in offsets], first=first),
            ]
        )
        print(first + 40, flush=True)
        rounds += 1
        if rounds % 3 == 0:
            partition.checkpoint()


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.invariant(1, place="checkpoint")
@pytest.mark.invariant(1, place="recovery")
def test_rows_and_positions_agree_after_every_kill(tmp_path: Path, seed: int) -> None:
    choice = random.Random(seed)
    durable = 0
    for _ in range(3):
        worker = subprocess.Popen(
            [sys.executable, "-m", "tests.fault.test_store_kill", str(tmp_path)], stdout=subprocess.PIPE, text=True
        )
        assert worker.stdout is not None
        with worker.stdout:
            for _ in range(choice.randrange(1, 25)):
                durable = int(worker.stdout.readline())
            worker.send_signal(signal.SIGKILL)
            assert worker.wait() == -signal.SIGKILL
            for line in worker.stdout:
                durable = int(line) if line.endswith("\n") else durable
        reached = check(tmp_path)
        assert reached >= durable


def check(directory: Path) -> int:
    """The store's position, which its rows must agree with exactly."""
    store = DuckDBStore(directory, CATALOG)
    partition = store.open_partition(0)
    positions = partition.next_offsets()
    reached = positions[EVENTS.topic]
    assert positions == {EVENTS.topic: reached, FLIGHTS.topic: reached}
    store.publish_scopes([0])
    cursor = store.query_cursor(0)
    assert cursor.execute("SELECT count(*), count(DISTINCT what), max(_offset) + 1 FROM events").fetchone() == (
        reached,
        reached,
        reached,
    )
    newest = cursor.execute("SELECT id, delay::BIGINT, _offset FROM flights ORDER BY _offset").fetchall()
    assert newest == [(offset % KEYS, offset, offset) for offset in range(max(0, reached - KEYS), reached)]
    cursor.close()
    store.close()
    return reached


if __name__ == "__main__":
    keep_applying(Path(sys.argv[1]))
