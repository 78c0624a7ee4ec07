"""Running `pintail audit` on a system and reading its report, and tampering with what it compares."""

from __future__ import annotations

import json
from typing import Any

from loadtest.observers import get
from tests.system import System


def audited(system: System, *options: str) -> tuple[int, dict[tuple[str, int], dict[str, Any]]]:
    """Exit status, and what was found: (table, partition) -> its part of the report."""
    done = system.pintail("audit", "--json", "--deadline-seconds", "60", *options)
    assert done.stdout, done.stderr
    report = json.loads(done.stdout)
    assert (report["verdict"] == "not_proven") is (done.returncode == 1), done.stderr
    found = {(each["topic"].rpartition(".")[2], each["partition"]): each for each in report["partitions"]}
    return done.returncode, found


def problems(found: dict[tuple[str, int], dict[str, Any]]) -> list[Any]:
    """Everything that kept a partition from being proven."""
    return [(place, report["differences"], report["open"]) for place, report in found.items()]


def found_in(report: dict[str, Any]) -> set[tuple[str, str, int, int]]:
    """(where, kind, first offset, next offset) of each difference."""
    return {(d["where"], d["kind"], d["first_offset"], d["next_offset"]) for d in report["differences"]}


def clickhouse(system: System, statement: str) -> None:
    """Runs it there; a mutation is done when this returns."""
    is_mutation = statement.startswith("ALTER") and "CONSTRAINT" not in statement
    text = statement + " SETTINGS mutations_sync = 2" * is_mutation
    status, reply = get(system.settings.clickhouse, "/", body=text.encode())
    assert status == 200, reply
