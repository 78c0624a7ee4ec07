"""Times one store worker that drains a backlog, from its first sight of the log to the last record applied.

Seen through the worker's status page, which says how far every partition is. Moments are of `time.monotonic`. Used by
the benchmarks and by the load profile of a backlog.
"""

from __future__ import annotations

import time
from itertools import pairwise

from loadtest.observers import ObservationError, WorkerPages, wait_until
from loadtest.usage import UsageSampler
from streams.localstack.stack import LocalStack

STORE = "store-0"
DRAIN_SECONDS_MAX = 3_600.0
#: Often enough for a drain of some seconds, seldom enough not to slow it down.
_LOOK_SECONDS = 0.03


class StoreDrain:
    """One drain of one topic by the worker of a stack, which must be stopped before."""

    def __init__(self, stack: LocalStack, topic: str) -> None:
        self._stack = stack
        self._topic = topic
        self._pages = WorkerPages(stack.process(STORE).specification.port)
        self.process_started = self.started = self.finished = 0.0
        #: (moment, records applied), as seen.
        self.curve: list[tuple[float, int]] = []
        self.usage: UsageSampler | None = None

    @property
    def seconds(self) -> float:
        """From the first sight of the log to the last record."""
        return self.finished - self.started

    def run(self, events: int, *, others: dict[str, int] | None = None) -> None:
        """Starts the worker and returns when `events` records of the topic are applied.

        `others` are processes, name -> pid, whose usage is sampled too.
        """
        self.process_started = time.monotonic()
        process = self._stack.process(STORE)
        process.start()
        assert process.pid is not None
        with UsageSampler({STORE: process.pid, **(others or {})}) as self.usage:
            self.started = wait_until(
                self._begun, "a worker that reads the log", seconds=DRAIN_SECONDS_MAX, every=_LOOK_SECONDS
            )
            self.finished = wait_until(
                lambda: self._all_applied(events),
                f"{events:,} events applied",
                seconds=DRAIN_SECONDS_MAX,
                every=_LOOK_SECONDS,
            )

    def _begun(self) -> float:
        """The moment, once a partition is read; 0.0 before."""
        try:
            states = {each["state"] for each in self._pages.partitions().values()}
        except ObservationError:
            return 0.0
        moment = time.monotonic() if states & {"replaying", "serving"} else 0.0
        if moment:
            self.curve.append((moment, 0))
        return moment

    def _all_applied(self, events: int) -> float:
        """The moment, once they are; the topic has no gaps."""
        partitions = self._pages.partitions().values()
        applied = sum(each["next_offsets"].get(self._topic, 0) for each in partitions)
        moment = time.monotonic()
        self.curve.append((moment, applied))
        return moment if applied >= events else 0.0


def seconds_per_part(curve: list[tuple[float, int]], part: int) -> list[float]:
    """How long each `part` events took, one after the other, interpolated between two looks; the rest is left out."""
    moments = [curve[0][0]]
    for (before_at, before), (after_at, after) in pairwise(curve):
        while (mark := len(moments) * part) <= after:
            moments.append(before_at + (after_at - before_at) * (mark - before) / (after - before))
    return [after - before for before, after in pairwise(moments)]
