"""Pid files, and the sweep of processes that a killed run left behind.

A record names a process by pid AND start time, so that a reused pid never gets a stranger killed. Records are written
right after the start and removed once the process is gone; what a new run (or the reaper) still finds is an orphan.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil

#: Two readings of one process's start time agree within this; a reused pid is at least a clock tick apart.
_SAME_START_SECONDS = 0.05


@dataclass(frozen=True)
class ProcessRecord:
    """Who a process is, and which run started it."""

    name: str
    pid: int
    started_at: float
    owner: str

    def process(self) -> psutil.Process | None:
        """The process if it still is the recorded one and alive, else None."""
        try:
            process = psutil.Process(self.pid)
            alive = process.status() != psutil.STATUS_ZOMBIE
            same = abs(process.create_time() - self.started_at) < _SAME_START_SECONDS
        except psutil.NoSuchProcess:
            return None
        return process if alive and same else None


class ProcessRecords:
    """The records of one stack, one file a process, below `directory`."""

    def __init__(self, directory: Path, *, owner: str) -> None:
        self.directory = directory
        self.owner = owner
        directory.mkdir(parents=True, exist_ok=True)

    def add(self, name: str, pid: int) -> None:
        """Records a process just started; one that is gone already leaves nothing to record."""
        with contextlib.suppress(psutil.NoSuchProcess):
            record = ProcessRecord(name, pid, psutil.Process(pid).create_time(), self.owner)
            write_atomically(self._path(name), json.dumps(asdict(record)))

    def remove(self, name: str) -> None:
        """Forgets a process that is gone. Idempotent."""
        self._path(name).unlink(missing_ok=True)

    def sweep(self, *, owner: str | None = None, deadline_seconds: float = 10.0) -> list[str]:
        """Ends every recorded process that still runs (of run `owner`, or of any) and removes the records.

        Politely first, with SIGKILL after `deadline_seconds`. Returns the names of those that were still running.
        """
        records = [record for record in self._read() if owner in (None, record.owner)]
        running = [(record, process) for record in records if (process := record.process())]
        for _, process in running:
            _send(process, signal.SIGTERM)
        if not _wait_gone([record for record, _ in running], deadline_seconds):
            for record, process in running:
                if record.process():
                    _send(process, signal.SIGKILL)
            _wait_gone([record for record, _ in running], deadline_seconds)
        for record in records:
            self.remove(record.name)
        return [record.name for record, _ in running]

    def _read(self) -> Iterator[ProcessRecord]:
        for path in sorted(self.directory.glob("*.json")):
            try:
                yield ProcessRecord(**json.loads(path.read_text()))
            except (ValueError, TypeError, FileNotFoundError):
                path.unlink(missing_ok=True)  # not a record of ours, or swept by the reaper this very moment

    def _path(self, name: str) -> Path:
        return self.directory / f"{name}.json"


def write_atomically(path: Path, text: str, *, mode: int = 0o644) -> None:
    """Readers see the old content or the new one, never a part."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.{threading.get_ident()}")
    with os.fdopen(os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, mode), "w") as file:
        file.write(text)
    partial.replace(path)


def _send(process: psutil.Process, number: signal.Signals) -> None:
    with contextlib.suppress(psutil.NoSuchProcess):
        process.send_signal(number)


def _wait_gone(records: list[ProcessRecord], deadline_seconds: float) -> bool:
    # Orphans are not our children: there is nothing to wait on but the process table.
    deadline = time.monotonic() + deadline_seconds
    while any(record.process() for record in records):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True
