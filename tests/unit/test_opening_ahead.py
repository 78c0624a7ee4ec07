"""What a worker's files are to whoever recovers them when they were opened while the worker started."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from schemas.catalog import Catalog
from streams.adapters.duckdb_file import FileLock, strip_zero_tail
from streams.adapters.duckdb_store import DuckDBStore
from streams.errors import StoreLockedError
from streams.processes.opening_ahead import OpeningAhead
from streams.processes.progress import RecoveryProgress
from streams.processes.recovery import Recovery, Rung
from tests.store_samples import EVENTS, decoded
from tests.watched_log import SECONDS_MAX, until

CATALOG = Catalog((EVENTS,))
REACHED = {EVENTS.topic: 2}


@pytest.fixture
def store(tmp_path: Path) -> Iterator[DuckDBStore]:
    """Of a worker that starts on the files of partitions 0 to 2."""
    before = DuckDBStore(tmp_path, CATALOG, threads=1)
    for partition in range(3):
        before.open_partition(partition).apply([decoded(EVENTS, [{"what": "a"}, {"what": "b"}], partition=partition)])
    before.close()
    store = DuckDBStore(tmp_path, CATALOG, threads=1)
    yield store
    store.close()


class Gate:
    """Where files that are being opened wait."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.reached, self.opened = threading.Event(), threading.Event()
        monkeypatch.setattr("streams.adapters.duckdb_store.strip_zero_tail", self._wait)

    def _wait(self, path: Path) -> int:
        self.reached.set()
        assert self.opened.wait(SECONDS_MAX), "the gate was never opened"
        return strip_zero_tail(path)


def is_locked(store: DuckDBStore, partition: int) -> bool:
    try:
        FileLock(store.path_of(partition).with_name(f"{partition}.lock")).release()
    except StoreLockedError:
        return True
    return False


async def test_recovery_goes_on_with_a_file_that_was_opened_ahead(store: DuckDBStore) -> None:
    ahead = OpeningAhead(store)
    await until(lambda: store.partitions().keys() == {0, 1, 2})
    assert is_locked(store, 0)
    ahead.settle({0})
    recovered = await Recovery(store, None, None).recover(0)
    assert (recovered.rung, recovered.store.next_offsets()) == (Rung.LOCAL_FILE, REACHED)
    recovered.store.apply([decoded(EVENTS, [{"what": "c"}], first=2)])
    store.release_partition(0)
    assert (await Recovery(store, None, None).recover(0)).rung is Rung.WARM


async def test_recovery_waits_for_a_file_that_is_being_opened_and_strangers_are_closed(
    store: DuckDBStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = Gate(monkeypatch)
    ahead = OpeningAhead(store)
    assert gate.reached.wait(SECONDS_MAX)
    ahead.settle({0})
    recovering = asyncio.create_task(Recovery(store, None, None).recover(0))
    gate.opened.set()
    recovered = await recovering
    assert (recovered.rung, recovered.store.next_offsets()) == (Rung.LOCAL_FILE, REACHED)
    await until(lambda: store.partitions().keys() == {0})
    assert not is_locked(store, 1)
    recovered.store.apply([decoded(EVENTS, [{"what": "c"}], first=2)])  # nobody fenced its writer


async def test_a_worker_that_ends_meanwhile_leaves_nothing_open(
    store: DuckDBStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = Gate(monkeypatch)
    ahead = OpeningAhead(store)
    assert gate.reached.wait(SECONDS_MAX)
    closing = asyncio.create_task(asyncio.to_thread(ahead.close))
    gate.opened.set()
    await closing
    assert store.partitions() == {}
    assert not any(is_locked(store, partition) for partition in range(3))


async def test_a_damaged_file_is_left_to_recovery_which_names_it(store: DuckDBStore) -> None:
    path = store.path_of(0)
    with path.open("r+b") as file:
        file.seek(4096 + 100)
        file.write(b"damage")
    OpeningAhead(store)
    await until(lambda: store.partitions().keys() == {1, 2})
    progress = RecoveryProgress(0)
    recovered = await Recovery(store, None, None).recover(0, progress=progress)
    assert recovered.rung is Rung.WHOLE_LOG
    assert "the header at byte 4096 is damaged" in progress.damage[0]


def test_the_file_of_somebody_at_work_is_no_file_to_open_ahead(store: DuckDBStore) -> None:
    partition = store.open_partition(0)
    store.open_ahead(0, lambda: True)
    store.close_unclaimed(0)
    partition.apply([decoded(EVENTS, [{"what": "c"}], first=2)])
    assert partition.next_offsets() == {EVENTS.topic: 3}


def test_a_file_that_is_not_there_is_not_made(store: DuckDBStore) -> None:
    store.open_ahead(3, lambda: True)
    assert not store.path_of(3).exists()
