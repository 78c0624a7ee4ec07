"""Opens the files of a store worker while it starts, before it knows which partitions are its own.

To check every block of a file and to replay DuckDB's log takes about as long as to load Python's modules and to join
the group, and needs neither. A static member gets back what it had, so the files that were written last are opened
first, on threads of their own; whoever recovers a partition finds its file open, or waits for the rest. Once the group
has assigned, nothing more is begun, and what belongs to others is closed.

A file that cannot be opened is left to recovery, which opens it again and says what is wrong. Called by
agents/store_files.py and agents/store_app.py.
"""

from __future__ import annotations

import logging
import os
import threading
from collections import deque
from collections.abc import Collection

from streams.adapters.duckdb_store import DuckDBStore
from streams.errors import PintailError

logger = logging.getLogger(__name__)


class OpeningAhead:
    """Begins at once. `settle` and `close` may be called from any thread."""

    def __init__(self, store: DuckDBStore) -> None:
        self._store = store
        self._pending = deque(sorted(store.local_partitions(), key=self._written_at, reverse=True))
        self._lock = threading.Lock()  # guards _kept
        #: What stays open, once that is known.
        self._kept: frozenset[int] | None = None
        threads = min(os.cpu_count() or 1, len(self._pending))
        self._threads = [threading.Thread(target=self._open_pending, name=f"ahead-{n}") for n in range(threads)]
        for thread in self._threads:
            thread.start()

    def settle(self, kept: Collection[int]) -> None:
        """From now on no file is opened ahead any more; one that is being opened stays open if it is to be `kept`. Does
        not wait, and says nothing of files that are open already."""
        with self._lock:
            self._kept = frozenset(kept)

    def close(self) -> None:
        """Waits for the files that are being opened, and closes them."""
        self.settle(())
        for thread in self._threads:
            thread.join()

    def _open_pending(self) -> None:
        # A worker that cannot start ends at once.
        while self._kept is None and threading.main_thread().is_alive():
            try:
                partition = self._pending.popleft()
            except IndexError:
                return
            self._open(partition)

    def _open(self, partition: int) -> None:
        try:
            self._store.open_ahead(partition, lambda: self._kept is None)
        except (PintailError, OSError) as error:
            logger.info("partition %d was not opened ahead: %s", partition, error)
        with self._lock:
            kept = self._kept
        if kept is not None and partition not in kept:
            self._store.close_unclaimed(partition)

    def _written_at(self, partition: int) -> int:
        path = self._store.path_of(partition)
        return max(file.stat().st_mtime_ns for file in (path, *path.parent.glob(f"{path.name}.wal")))
