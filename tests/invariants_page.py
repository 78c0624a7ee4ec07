"""docs/invariants.md, made from the marks of the tests: `python -m tests.invariants_page` rewrites it.

`make check` runs it with --check: it fails while the page and the tests disagree, and while a place that must have no
holes has one. Pytest itself collects the tests, without running them; the suite skips none, so what is collected runs.
"""

from __future__ import annotations

import io
import re
import sys
from collections.abc import Iterable, Mapping
from contextlib import redirect_stdout
from enum import StrEnum
from itertools import product
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "invariants.md"
#: The tests below these inject faults or simulate them.
PROVING = ("tests/fault/", "tests/simulation/")

_INTRODUCTION = """# Invariants

What holds, whatever happens, and the tests that show it, by the place where it could break. **proven**: tests that
inject faults (`kill -9`, lost replies, zombies, cut connections) or simulate them show it. **tested**: other tests do.
An empty cell: no test is marked for it.

"""
_END = """
This page is made by `python -m tests.invariants_page` from the marks of the tests. `make check` fails while it is out
of date, and while `checkpoint` or `rebalance` has an empty cell. Mark a test for what would make it fail, nothing else;
faults (below `tests/fault`) and simulations prove:

```python
@pytest.mark.invariant(1, 2, place="checkpoint")
```
"""


class Place(StrEnum):
    """Where an invariant could break."""

    INPUT = "input"
    CHECKPOINT = "checkpoint"
    REBALANCE = "rebalance"
    RECOVERY = "recovery"
    OUTAGE = "outage"


MEANINGS = {
    Place.INPUT: "records, requests and tables as they come: poison, repeated, changing",
    Place.CHECKPOINT: "progress is made durable, or a worker ends in the middle of that: a store's transaction, "
    "DuckDB's checkpoint, a snapshot's publication, the sink's record of a range, a committed position",
    Place.REBALANCE: "partitions leave a worker and come to another, and who had them does not know it yet",
    Place.RECOVERY: "a worker starts with what is left: files, snapshots, ClickHouse, the log",
    Place.OUTAGE: "Kafka, Redis, ClickHouse or the schema registry is away, and comes back",
}
WITHOUT_HOLES = (Place.CHECKPOINT, Place.REBALANCE)

#: A cell of the matrix -> the tests that are marked for it, as file::name.
Marked = Mapping[tuple[int, Place], set[str]]


class _Collection:
    """A plugin of pytest that keeps the marks."""

    def __init__(self) -> None:
        self.marked: dict[tuple[int, Place], set[str]] = {}

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        for item in session.items:
            for mark in item.iter_markers("invariant"):
                for cell in product(mark.args, [Place(mark.kwargs["place"])]):
                    self.marked.setdefault(cell, set()).add(item.nodeid.partition("[")[0])


def collect() -> Marked:
    """Raises SystemExit with pytest's own words if the tests cannot be collected."""
    collection, shown = _Collection(), io.StringIO()
    with redirect_stdout(shown):
        status = pytest.main(
            [
                "--collect-only",
                "-q",
                "--assert=plain",
                "-p",
                "no:cacheprovider",
                f"--rootdir={ROOT}",
                str(ROOT / "tests"),
            ],
            [collection],
        )
    if status:
        sys.exit(shown.getvalue())
    return collection.marked


def invariants() -> dict[int, str]:
    """Number -> text, as docs/architecture.md lists them."""
    section = (ROOT / "docs" / "architecture.md").read_text().partition("## Invariants\n")[2].partition("\n\n")[0]
    return {int(number): text for number, text in re.findall(r"^(\d+)\. (.+)$", section, re.MULTILINE)}


def page(marked: Marked) -> str:
    """The whole page."""
    numbers = invariants()
    lines = [f"{number}. {text}" for number, text in numbers.items()]
    lines += ["", "| place | " + " | ".join(map(str, numbers)) + " |", "|---" * (len(numbers) + 1) + "|"]
    lines += [
        f"| `{place}` | " + " | ".join(_cell(marked.get((n, place), ())) for n in numbers) + " |" for place in Place
    ]
    lines += ["", *(f"- `{place}`: {MEANINGS[place]}." for place in Place)]
    for place in Place:
        lines += ["", f"## {place.capitalize()}"]
        for number in numbers:
            lines += [f"- {number}: {_linked(test)}" for test in sorted(marked.get((number, place), ()))]
    return _INTRODUCTION + "\n".join(lines) + "\n" + _END


def _cell(tests: Iterable[str]) -> str:
    if any(test.startswith(PROVING) for test in tests):
        return "proven"
    return "tested" if tests else ""


def _linked(test: str) -> str:
    file, _, name = test.partition("::")
    return f"[{name.replace('::', '.')}](../{file})"


def faults(marked: Marked) -> list[str]:
    """What keeps `make check` from passing."""
    numbers = invariants()
    found = [f"there is no invariant {number}" for number, _ in sorted(marked) if number not in numbers]
    found += [
        f"no test is marked for invariant {number} with place={place.value!r}: {numbers[number]}"
        for place, number in product(WITHOUT_HOLES, numbers)
        if not marked.get((number, place))
    ]
    if not PAGE.exists() or PAGE.read_text() != page(marked):
        found.append("docs/invariants.md is out of date: run `python -m tests.invariants_page`")
    return found


if __name__ == "__main__":
    marks = collect()
    if "--check" not in sys.argv[1:]:
        PAGE.write_text(page(marks))
    elif wrong := faults(marks):
        sys.exit("\n".join(wrong))
