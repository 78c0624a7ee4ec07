"""An event loop whose clock jumps: when nothing happens, the next timer is due at once.

Waits of hours take as long as what is done in between. Work in threads counts as happening for `idle_seconds` of real
time; nothing here suits code that compares the loop's clock with another one.
"""

from __future__ import annotations

import asyncio
import selectors
from typing import Any


class _ImpatientSelector(selectors.DefaultSelector):
    """Waits no longer than `idle_seconds`, and says how much of the wait it left out."""

    idle_seconds = 0.001
    skipped_seconds = 0.0

    def select(self, timeout: float | None = None) -> list[Any]:
        if timeout is None or timeout <= self.idle_seconds:
            return super().select(timeout)
        events = super().select(self.idle_seconds)
        if not events:
            self.skipped_seconds += timeout - self.idle_seconds
        return events


class VirtualTimeLoop(asyncio.SelectorEventLoop):
    """Use as `asyncio.Runner(loop_factory=VirtualTimeLoop)`."""

    def __init__(self) -> None:
        self._impatient = _ImpatientSelector()
        super().__init__(self._impatient)

    def time(self) -> float:
        """Seconds, real ones and those that were left out."""
        return super().time() + self._impatient.skipped_seconds
