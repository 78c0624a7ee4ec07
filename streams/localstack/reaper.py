"""Ends the processes of a stack the moment the stack's own process dies, however it dies.

The stack holds the other end of this process's standard input and never writes to it: end of file means the stack is
gone. That works from any thread and on any Unix, unlike a parent-death signal. After an orderly stop nothing is left
to sweep.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

from streams.localstack.records import ProcessRecords


def start_reaper(records: ProcessRecords, stack_file: Path) -> subprocess.Popen[bytes]:
    """The reaper of this process's stack; close its `stdin` when all is stopped."""
    return subprocess.Popen(
        [sys.executable, "-m", __name__, str(records.directory), records.owner, str(stack_file)],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,  # Ctrl-C in a terminal is for the stack alone
    )


def main(directory: str, owner: str, stack_file: str) -> None:
    """Waits for the stack to end, then sweeps what it left."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    while os.read(sys.stdin.fileno(), 1):
        pass
    # First, as in an orderly stop: nobody shall find addresses that are about to close.
    remove_stack_file(Path(stack_file), owner)
    ProcessRecords(Path(directory), owner=owner).sweep(owner=owner)


def remove_stack_file(path: Path, owner: str) -> None:
    """Removes the stack file of run `owner`; one that another run has published since stays."""
    try:
        published_by = json.loads(path.read_text())["run"]
    except (FileNotFoundError, ValueError, KeyError):
        return
    if published_by == owner:
        path.unlink(missing_ok=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
