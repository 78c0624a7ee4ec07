"""Ends the processes of a stack the moment the stack's own process dies, however it dies.

The stack holds the other end of this process's standard input and never writes to it: end of file means the stack is
gone. That works from any thread and on any Unix, unlike a parent-death signal. After an orderly stop nothing is left
to sweep.
"""

from __future__ import annotations

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
    if ProcessRecords(Path(directory), owner=owner).sweep(owner=owner):
        Path(stack_file).unlink(missing_ok=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
