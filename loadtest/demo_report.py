"""What the demo shows: numbered headings, small tables, progress, and one line per promise, kept or broken.

A promise that is found broken is noted and the demo goes on; an operating error inside one breaks it and ends the demo.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from schemas.errors import PintailError
from streams.localstack.processes import ProcessState

_CELL_CHARS_MAX = 40


@dataclass
class Promise:
    """Something that Pintail says it does, and what was seen of it."""

    text: str
    #: Why it is broken; empty while it holds.
    faults: list[str] = field(default_factory=list)
    detail: str = ""
    seconds: float = 0.0

    @property
    def is_kept(self) -> bool:
        """True if nothing was seen that breaks it."""
        return not self.faults

    def check(self, holds: bool, fault: str) -> None:
        """Notes `fault` unless it holds."""
        if not holds:
            self.faults.append(fault)


class DemoReport:
    """Prints as things happen, and remembers the promises for the summary."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self.promises: list[Promise] = []
        self._lock = threading.Lock()
        self._steps = 0

    @property
    def every_promise_was_kept(self) -> bool:
        """False as well if there was none."""
        return bool(self.promises) and all(promise.is_kept for promise in self.promises)

    def heading(self, text: str) -> None:
        """The next numbered step."""
        self._steps += 1
        self.console.print()
        self.console.rule(f"[bold]{self._steps}  {text}", align="left")

    def say(self, text: str) -> None:
        """A line of plain text."""
        self.console.print(text, markup=False, soft_wrap=True)

    def on_stack_change(self, name: str, state: ProcessState, detail: str) -> None:
        """The stack's reports, from its own threads."""
        with self._lock:
            self.say(f"  {name:<11} {state:<10} {detail}".rstrip())

    @contextmanager
    def promise(self, text: str) -> Iterator[Promise]:
        """Times what is done inside. A PintailError breaks the promise and is raised on."""
        promise = Promise(text)
        self.promises.append(promise)
        started = time.perf_counter()
        try:
            yield promise
        except PintailError as error:
            promise.faults.append(error.message)
            raise
        except BaseException as error:
            promise.faults.append(f"interrupted by {type(error).__name__}")
            raise
        finally:
            promise.seconds = time.perf_counter() - started
            self._print_promise(promise)

    @contextmanager
    def progress(self, text: str, total: int) -> Iterator[Callable[[int], None]]:
        """A bar; tell the yielded function how many are done."""
        with Progress(
            TextColumn("  {task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            _Rate(),
            TimeElapsedColumn(),
            console=self.console,
        ) as bar:
            task = bar.add_task(text, total=total)
            yield lambda done: bar.update(task, completed=done)

    def table(self, columns: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
        """A small table."""
        grid = Table(*columns, box=None, header_style="bold", padding=(0, 2, 0, 2))
        numeric = [all(isinstance(row[n], int | float | None) for row in rows) for n in range(len(columns))]
        for column, is_numeric in zip(grid.columns, numeric, strict=True):
            column.justify = "right" if is_numeric else "left"
        for row in rows:
            grid.add_row(*(Text(_cell(value)) for value in row))
        self.console.print(grid)

    def summary(self, seconds: float) -> None:
        """All promises with their times."""
        self.heading("Summary")
        grid = Table("", "promise", "seen", "seconds", box=None, header_style="bold", padding=(0, 2, 0, 0))
        grid.columns[3].justify = "right"
        for promise in self.promises:
            seen = promise.detail if promise.is_kept else "; ".join(promise.faults)
            grid.add_row(_mark(promise), promise.text, Text(seen), f"{promise.seconds:.1f}")
        self.console.print(grid)
        kept = sum(promise.is_kept for promise in self.promises)
        self.console.print(f"\n  {kept} of {len(self.promises)} promises kept in {seconds:.0f} s")

    def _print_promise(self, promise: Promise) -> None:
        seen = promise.detail if promise.is_kept else "; ".join(promise.faults)
        line = Text.assemble(f"  {_symbol(promise)} ", promise.text, f" ({promise.seconds:.1f} s)")
        line.stylize("green" if promise.is_kept else "bold red", 0, 4)
        self.console.print(line, soft_wrap=True)
        if seen:
            self.console.print(Text(f"      {seen}", style="dim" if promise.is_kept else "red"), soft_wrap=True)


class _Rate(ProgressColumn):
    """Events per second since the start."""

    def render(self, task: Task) -> Text:
        elapsed = task.finished_time if task.finished else task.elapsed
        return Text(f"{task.completed / elapsed:,.0f} events/s" if elapsed else "")


def _symbol(promise: Promise) -> str:
    return "✔" if promise.is_kept else "✘"


def _mark(promise: Promise) -> Text:
    return Text(_symbol(promise), style="green" if promise.is_kept else "bold red")


def _cell(value: object) -> str:
    if value is None:
        return ""
    text = f"{value:,}" if isinstance(value, int) and value >= 10_000 else str(value)
    return text if len(text) <= _CELL_CHARS_MAX else text[: _CELL_CHARS_MAX - 1] + "…"
