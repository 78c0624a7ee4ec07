"""When the partitions of one instance may commit: side by side, but not while a query takes all of them at one point.

A transaction over several attached files has no common snapshot: DuckDB begins it in each file when the statement that
first names the file is bound. So what has to be one point is made one: for the moment of that statement no commit is
under way. Used by the partitions' writers and by queries that ask for a snapshot.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager


class CommitGate:
    """Many commits at a time, or one snapshot."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._commits = 0
        self._is_shut = False

    @contextmanager
    def committing(self) -> Iterator[None]:
        """A commit is under way; begins once no snapshot is being taken, which is a matter of microseconds."""
        with self._changed:
            self._changed.wait_for(lambda: not self._is_shut)
            self._commits += 1
        try:
            yield
        finally:
            with self._changed:
                self._commits -= 1
                self._changed.notify_all()

    @contextmanager
    def shut(self) -> Iterator[None]:
        """No commit is under way; begins once those that are have ended, which is a matter of milliseconds."""
        with self._changed:
            self._changed.wait_for(lambda: not self._is_shut)
            self._is_shut = True
            self._changed.wait_for(lambda: self._commits == 0)
        try:
            yield
        finally:
            with self._changed:
                self._is_shut = False
                self._changed.notify_all()
