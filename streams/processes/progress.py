"""How far the recovery of one partition is, for the log, the metrics and /ready.

Steps follow one another: each rung of the ladder that is tried, then `replay`. One object per assignment, written by
its recovery and read by the status page, all on the worker's event loop.
"""

from __future__ import annotations

import logging
import time
from typing import Any

from streams import telemetry

logger = logging.getLogger(__name__)

#: A step that takes long says so this often.
LOG_SECONDS = 5.0


class RecoveryProgress:
    """The step at hand, and how much of it is done; both counted in `unit`."""

    def __init__(self, partition: int) -> None:
        self.partition = partition
        #: local_file, snapshot, clickhouse, whole_log or replay; empty before the first.
        self.step = ""
        self.unit = ""
        self.done = 0
        self.total = 0
        #: What was found damaged since the partition was assigned; it stays when another rung has made up for it.
        self.damage: list[str] = []
        self._logged = 0.0

    @property
    def ratio(self) -> float:
        """From 0 to 1; a step with nothing to do is done."""
        return min(1.0, self.done / self.total) if self.total else 1.0

    def begin(self, step: str, total: int, unit: str) -> None:
        """The next step starts."""
        self.step, self.unit, self.done, self.total = step, unit, 0, total
        self._logged = time.monotonic()
        self._show()

    def reach(self, done: int) -> None:
        """So much of the step is done."""
        self.done = done
        self._show()
        if time.monotonic() - self._logged > LOG_SECONDS:
            self._logged = time.monotonic()
            logger.info("partition %d: %s at %.0f%%, %d of %d %s", self.partition, *self._logged_values())

    def end(self) -> None:
        """The step is done."""
        self.reach(self.total)

    def found_damage(self, place: str, what: str) -> None:
        """The file or a snapshot version cannot be used: loud, although recovery goes on without it."""
        logger.error("partition %d: %s", self.partition, what)
        telemetry.DAMAGE_FOUND.labels(self.partition, place).inc()
        if what not in self.damage:
            self.damage.append(what)

    def report(self) -> dict[str, Any]:
        """As /ready shows it."""
        return {
            "step": self.step,
            "done": self.done,
            "total": self.total,
            "unit": self.unit,
            "ratio": round(self.ratio, 4),
        }

    def _logged_values(self) -> tuple[object, ...]:
        return self.step, 100 * self.ratio, self.done, self.total, self.unit

    def _show(self) -> None:
        telemetry.RECOVERY_PROGRESS.labels(self.partition).set(self.ratio)
