"""What the command lines of all benchmarks have in common: options, the head of a result, and where a result goes."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import orjson
from rich.console import Console

from loadtest.machine import machine


class BenchParser(argparse.ArgumentParser):
    """Options of one benchmark, and `--data-dir`, `--output` and `--note`, which every one has."""

    def __init__(self, name: str, description: str, *, data_dir: Path) -> None:
        super().__init__(prog=f"make {name}", description=description)
        self.add_argument(
            "--data-dir", type=Path, default=data_dir, help="a new folder, removed afterwards [%(default)s]"
        )
        self.add_argument("--output", type=Path, help="also write the result to this file")
        self.add_argument("--note", default="", help="kept with the result, such as what else the machine was doing")

    def parse_bench(self, arguments: Sequence[str] | None) -> argparse.Namespace:
        """The options; ends the program if the data folder is there already."""
        options = self.parse_args(arguments)
        if options.data_dir.exists():
            self.error(f"{options.data_dir} exists; remove it or choose another folder with --data-dir")
        return options


def head_of_result(note: str) -> dict[str, Any]:
    """Where and when."""
    return {"machine": machine(), "note": note, "started": datetime.now(UTC).isoformat(timespec="seconds")}


def say_on(console: Console) -> Callable[[str], None]:
    """Tells what happens."""
    return lambda text: console.print(text, markup=False)


def report_on(console: Console) -> Callable[[str, str, str], None]:
    """Tells what the processes of a local stack do."""
    return lambda name, state, detail: console.print(f"{name} {state} {detail}", style="dim", markup=False)


def publish_result(result: dict[str, Any], output: Path | None) -> None:
    """As the last line of standard output, and to the file."""
    print(orjson.dumps(result).decode())
    if output is not None:
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_bytes(orjson.dumps(result, option=orjson.OPT_INDENT_2) + b"\n")
