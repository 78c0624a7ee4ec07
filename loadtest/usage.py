"""CPU seconds and memory of processes, sampled from outside, the same way for everybody.

`ru_maxrss` of a child begins at its parent's size, so it says nothing about a small child of a large parent; samples of
the resident set do. Times are of `time.monotonic`, which all processes of a machine share. Used by the load tests.
"""

from __future__ import annotations

import threading
import time
from bisect import bisect_left
from collections.abc import Mapping
from types import TracebackType
from typing import NamedTuple, Self

import psutil

EVERY_SECONDS = 0.05


class Sample(NamedTuple):
    """One look at a process."""

    at: float
    cpu_seconds: float
    rss_bytes: int


class UsageSampler:
    """Looks at processes, by name and pid, until the context ends. One that has ended is left out from then on."""

    def __init__(self, pids: Mapping[str, int], *, every_seconds: float = EVERY_SECONDS) -> None:
        self.samples: dict[str, list[Sample]] = {name: [] for name in pids}
        self._processes = {name: psutil.Process(pid) for name, pid in pids.items()}
        self._every_seconds = every_seconds
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name="usage", daemon=True)

    def __enter__(self) -> Self:
        self._look()
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ended.set()
        self._thread.join()
        self._look()

    def peak_rss_mib(self, name: str) -> float:
        """The largest resident set that was seen."""
        return round(max((sample.rss_bytes for sample in self.samples[name]), default=0) / 2**20, 1)

    def cpu_seconds(self, name: str, started: float, finished: float) -> float:
        """CPU seconds between two moments, of all threads."""
        return round(cpu_at(self.samples[name], finished) - cpu_at(self.samples[name], started), 2)

    def _run(self) -> None:
        while not self._ended.wait(self._every_seconds):
            self._look()

    def _look(self) -> None:
        for name, process in self._processes.items():
            try:
                with process.oneshot():
                    cpu, rss = process.cpu_times(), process.memory_info().rss
            except psutil.Error:
                continue
            if rss:  # a zombie has none, and its CPU time is already known
                self.samples[name].append(Sample(time.monotonic(), cpu.user + cpu.system, rss))


def cpu_at(samples: list[Sample], moment: float) -> float:
    """CPU seconds used up to a moment, interpolated between two looks; 0.0 without samples."""
    if not samples:
        return 0.0
    place = bisect_left(samples, moment, key=lambda sample: sample.at)
    if place == 0 or place == len(samples):
        return samples[min(place, len(samples) - 1)].cpu_seconds
    before, after = samples[place - 1], samples[place]
    part = (moment - before.at) / (after.at - before.at)
    return before.cpu_seconds + part * (after.cpu_seconds - before.cpu_seconds)
