"""`python -m loadtest <profile>`: one load profile on a fresh local stack; without arguments, the list of them.

Exit status 1 if a row or a dead letter is lost, doubled, unexpected or changed; with `--strict` also if a bound on
speed or memory is not met. Results go to loadtest/results/<profile>.json, .png and .md.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import orjson
from rich.console import Console
from rich.table import Table

from loadtest.bench_command import report_on, say_on
from loadtest.machine import machine
from loadtest.profile_report import RESULTS_DIR, bounds_of, write_results
from loadtest.profile_run import as_result, run_profile
from loadtest.profiles import PROFILES
from schemas.errors import PintailError

DATA_DIR_DEFAULT = Path(".pintail/loadtest")


def main(arguments: list[str] | None = None) -> int:
    """Runs a profile, or lists them; returns the exit status."""
    options = _parse(arguments)
    if options.profile is None:
        _list()
        return 0
    profile = PROFILES[options.profile]
    console = Console(stderr=True, highlight=False)
    result: dict[str, Any] = {
        "profile": profile.name,
        "catches": profile.catches,
        "scale": options.scale,
        "note": options.note,
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": machine(),
    }
    try:
        outcome = run_profile(
            profile,
            options.data_dir,
            scale=options.scale,
            seconds=options.seconds,
            say=say_on(console),
            report=report_on(console),
        )
    except PintailError as error:
        console.print(f"{error.message}\n  -> {error.hint}", style="red", markup=False)
        return 1
    finally:
        shutil.rmtree(options.data_dir, ignore_errors=True)
    bounds = bounds_of(profile, outcome.metrics)
    result |= as_result(outcome) | {"is_right": outcome.is_right, "bounds": bounds}
    write_results(options.results, profile, result, outcome)
    _print(result, options.results)
    print(orjson.dumps(result).decode())
    bounds_are_met = all(bound["met"] for bound in bounds)
    return 0 if outcome.is_right and (bounds_are_met or not options.strict) else 1


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m loadtest", description=__doc__.partition("\n\n")[2])
    add = parser.add_argument
    add("profile", nargs="?", choices=PROFILES, help="without one, all profiles are listed")
    add("--scale", type=float, default=1.0, help="times the rates, or the size of a backlog [%(default)s]")
    add("--seconds", type=float, help="how long to send, instead of the profile's own time")
    add("--strict", action="store_true", help="a bound that is not met is a failure, too")
    add("--results", type=Path, default=RESULTS_DIR, help="folder of the results [loadtest/results]")
    add("--data-dir", type=Path, default=DATA_DIR_DEFAULT, help="a new folder, removed afterwards [%(default)s]")
    add("--note", default="", help="kept with the result, such as what else the machine was doing")
    options = parser.parse_args(arguments)
    if options.data_dir.exists():
        parser.error(f"{options.data_dir} exists; remove it or choose another folder with --data-dir")
    return options


def _list() -> None:
    grid = Table(
        "profile", "what it catches, and what is expected", box=None, header_style="bold", padding=(0, 2, 1, 0)
    )
    for profile in PROFILES.values():
        bounds = ", ".join(
            f"{bound.metric} {'>=' if bound.at_least else '<='} {bound.limit:,}" for bound in profile.bounds
        )
        grid.add_row(profile.name, f"{profile.catches}\n[dim]no row or dead letter lost or doubled; {bounds}[/dim]")
    Console(highlight=False, width=None if sys.stdout.isatty() else 140).print(grid)


def _print(result: dict[str, Any], folder: Path) -> None:
    console = Console(highlight=False, width=None if sys.stdout.isatty() else 140)
    for kind, words in (("rows", "rows"), ("dead_letters", "dead letters")):
        each = result[kind]
        counts = ", ".join(f"{each[name]:,} {name}" for name in ("lost", "doubled", "unexpected", "changed"))
        console.print(f"{each['expected']:,} {words} expected: {counts}", *each["named"], sep="\n  ", markup=False)
    for bound in result["bounds"]:
        words = "met    " if bound["met"] else "NOT MET"
        sign = ">=" if bound["at_least"] else "<="
        console.print(f"{words} {bound['metric']} {sign} {bound['limit']:,}: {bound['measured']}", markup=False)
    console.print(f"{folder / result['profile']}.json, .png, .md", markup=False, soft_wrap=True)


if __name__ == "__main__":
    sys.exit(main())
