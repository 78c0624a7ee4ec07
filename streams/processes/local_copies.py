"""Which partitions this worker has a copy of, and how far each is: what it tells its group when it joins.

Files that are open say so themselves. For the others a small file beside them remembers it, as Kafka Streams'
checkpoint file does: to open a file only to ask it could take longer than the group waits. A lost or an old one costs a
longer replay, or that another worker warms up first, and nothing else.
"""

from __future__ import annotations

import json
import logging
from pathlib import Path

from streams.adapters.duckdb_store import DuckDBStore

logger = logging.getLogger(__name__)

FILE_NAME = "copies.json"


class LocalCopies:
    """Positions of this worker's copies. `positions` may be called from any thread."""

    def __init__(self, store: DuckDBStore, directory: Path) -> None:
        self._store = store
        self._path = directory / FILE_NAME
        self._remembered = self._read()

    def positions(self) -> dict[int, int]:
        """Partition -> records applied to its copy (the sum of its next_offsets), of those that hold anything."""
        closed = {p: position for p, position in self._remembered.items() if self._store.path_of(p).exists()}
        open_ = {p: sum(store.next_offsets().values()) for p, store in self._store.partitions().items()}
        return {p: position for p, position in (closed | open_).items() if position}

    def remember(self) -> None:
        """Writes what `positions` says, if it changed. Blocks."""
        positions = self.positions()
        if positions != self._remembered:
            temporary = self._path.with_suffix(".writing")
            temporary.write_text(json.dumps(positions))
            temporary.replace(self._path)
            self._remembered = positions

    def _read(self) -> dict[int, int]:
        try:
            return {int(partition): int(position) for partition, position in json.loads(self._path.read_text()).items()}
        except FileNotFoundError:
            return {}
        except (OSError, ValueError, AttributeError, TypeError) as error:
            logger.warning("%s cannot be read, as if there were no copies: %r", self._path, error)
            return {}
