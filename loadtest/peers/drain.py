"""The command line that peers share, and what they report about a drain.

A drain ends after `--events` events or `--seconds`, whichever comes first; what was applied by then is durable. Moments
are of `time.monotonic`, so that who started the peer can tell what it used meanwhile.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import orjson

from loadtest.fingerprints import Fingerprint
from schemas.catalog import load_catalog
from schemas.table import TableDefinition


@dataclass(frozen=True)
class DrainOptions:
    """What to drain."""

    kafka: str
    table: TableDefinition
    #: The DuckDB file to create.
    path: Path
    events: int
    seconds: float
    group: str


@dataclass(frozen=True)
class Drained:
    """Applied and durable, between two moments."""

    events: int
    started: float
    finished: float
    #: partition -> the position after what was applied, and what the table holds; None: the peer's file says it.
    next_offsets: dict[int, int] | None = None
    fingerprint: Fingerprint | None = None


class Progress:
    """Counts a drain from its first record, or from `start`."""

    def __init__(self, options: DrainOptions) -> None:
        self._options = options
        self._started = 0.0
        self._finished = 0.0
        self.events = 0

    def start(self) -> None:
        """The clock runs from here; only the first call counts."""
        self._started = self._started or time.monotonic()

    def applied(self, events: int) -> None:
        """So many more are durable."""
        self.events += events
        self._finished = time.monotonic()

    @property
    def is_over(self) -> bool:
        """True once enough is applied, or the time is up."""
        if not self._started:
            return False
        time_is_up = time.monotonic() - self._started > self._options.seconds
        return self.events >= self._options.events or time_is_up

    def report(self) -> Drained:
        """What was done."""
        return Drained(self.events, self._started, self._finished)


def drain_options(arguments: list[str] | None = None) -> DrainOptions:
    """From the command line."""
    parser = argparse.ArgumentParser(description="Drain a topic into a DuckDB file.")
    parser.add_argument("--kafka", required=True)
    parser.add_argument("--tables", required=True, type=Path, help="folder of table files")
    parser.add_argument("--table", required=True)
    parser.add_argument("--path", required=True, type=Path, help="the DuckDB file to create")
    parser.add_argument("--events", required=True, type=int)
    parser.add_argument("--seconds", type=float, default=float("inf"))
    parser.add_argument("--group", default="peer")
    given = parser.parse_args(arguments)
    table = load_catalog(given.tables).by_name(given.table)
    return DrainOptions(given.kafka, table, given.path, given.events, given.seconds, given.group)


def say(drained: Drained) -> None:
    """The last line of a peer's output."""
    numbers = None if drained.fingerprint is None else [str(number) for number in drained.fingerprint]
    line = asdict(drained) | {"fingerprint": numbers}
    print(orjson.dumps(line, option=orjson.OPT_NON_STR_KEYS).decode(), flush=True)


def read_drained(line: bytes) -> Drained:
    """What `say` printed."""
    fields = orjson.loads(line)
    offsets, numbers = fields.pop("next_offsets"), fields.pop("fingerprint")
    return Drained(
        **fields,
        next_offsets=offsets and {int(partition): offset for partition, offset in offsets.items()},
        fingerprint=numbers and Fingerprint.of(numbers),
    )
