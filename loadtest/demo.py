"""`make demo`: the whole system on real parts and real data, with one line for every promise that is kept or broken.

Starts the local stack in an empty data folder, runs the steps, and says what was seen. On a terminal it then stays up
until Ctrl-C; otherwise it stops everything. Exit status 0 if every promise was kept, 1 if not, 130 after Ctrl-C in the
middle. Whatever happens, nothing is left running.
"""

from __future__ import annotations

import argparse
import io
import os
import shutil
import sys
import time
from pathlib import Path

from rich.console import Console

from loadtest.demo_report import DemoReport
from loadtest.demo_steps import SINK, STORE, DemoSteps
from loadtest.flights import ROWS
from schemas.catalog import load_catalog
from schemas.errors import ConfigurationError, PintailError
from streams.client import Client
from streams.config import PACKAGED_TABLES, Settings, load_settings
from streams.localstack.signals import ending_signals_interrupt, signals_ignored
from streams.localstack.stack import LocalStack, StackOptions

#: Apart from the folder of `pintail dev`, so that the demo may begin with nothing each time.
DATA_DIR_DEFAULT = Path(".pintail/demo")
#: Short, because the demo waits for snapshots of what it has just published.
SNAPSHOT_INTERVAL_SECONDS = 2
INTERRUPTED = 130
_WIDTH_WITHOUT_TERMINAL = 140
#: What a data folder of the local stack holds; a folder with anything else in it is not wiped.
_STACK_LOCK = "stack.lock"


def main(arguments: list[str] | None = None) -> int:
    """Runs the demo; returns the exit status."""
    options = _parse(arguments)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a terminal without check marks is no reason to stop
    on_terminal = sys.stdin.isatty() and sys.stdout.isatty()
    console = Console(highlight=False, width=None if sys.stdout.isatty() else _WIDTH_WITHOUT_TERMINAL)
    report = DemoReport(console)
    try:
        with ending_signals_interrupt():
            return _run(options, report, stays_up=on_terminal or options.keep)
    except KeyboardInterrupt:
        console.print("\nInterrupted; everything is stopped.")
        return INTERRUPTED
    except PintailError as error:
        console.print(f"\n{error.message}", style="red", markup=False, soft_wrap=True)
        if error.hint:
            console.print(f"  -> {error.hint}", markup=False, soft_wrap=True)
        return 1


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="make demo", description="Watch the whole system at work on real flights.")
    parser.add_argument("--data-dir", type=Path, default=DATA_DIR_DEFAULT, help="wiped at the start [%(default)s]")
    parser.add_argument("--rows", type=int, default=ROWS["flights"], help="how many flights [all of them]")
    parser.add_argument("--keep", action="store_true", help="stay up until Ctrl-C, also without a terminal")
    options = parser.parse_args(arguments)
    if not 2 <= options.rows <= ROWS["flights"]:
        parser.error(f"--rows is between 2 and {ROWS['flights']}")
    return options


def _run(options: argparse.Namespace, report: DemoReport, *, stays_up: bool) -> int:
    started = time.perf_counter()
    _empty_folder(options.data_dir)
    catalog = load_catalog(PACKAGED_TABLES)
    stack = LocalStack(
        options.data_dir,
        StackOptions(
            store_workers=1,
            sink_workers=1,
            worker_environment={
                "PINTAIL_SNAPSHOT_INTERVAL_SECONDS": str(SNAPSHOT_INTERVAL_SECONDS),
                "PINTAIL_TABLES_DIR": str(PACKAGED_TABLES),
            },
        ),
        report=report.on_stack_change,
    )
    try:
        report.heading(f"Start Kafka, Redis, ClickHouse, a store worker and a sink worker in {options.data_dir}")
        with report.promise("the whole system starts on this machine, without Docker"):
            stack.start()
        # From here on this process is one of the stack's own.
        os.environ.update(stack.settings_environment())
        settings = load_settings()
        with Client.connect(settings) as client:
            steps = DemoSteps(stack, catalog, client, report, flights=options.rows)
            try:
                steps.run()
            except PintailError as error:
                report.say(f"\n  The demo cannot go on: {error.message}\n  -> {error.hint}")
                for worker in (STORE, SINK):
                    report.say(f"\n  The end of the log of {worker}:\n{stack.process(worker).log_tail()}")
        report.summary(time.perf_counter() - started)
        if stays_up:
            _stay_up(stack, settings, report)
    finally:
        with signals_ignored():
            stack.stop()
    return 0 if report.every_promise_was_kept else 1


def _empty_folder(folder: Path) -> None:
    """Wipes what an earlier run left, and only that. Raises PintailError if another run is using it."""
    if not folder.exists() or not any(folder.iterdir()):
        return
    if not (folder / _STACK_LOCK).exists():
        raise ConfigurationError(
            f"{folder} holds something that is not the data of a local stack, and the demo would delete it",
            hint="give an empty or a new folder: --data-dir",
        )
    # A stack without services takes the folder, which fails while another one runs, and ends what a killed one left.
    with LocalStack(folder, StackOptions(services=())):
        pass
    shutil.rmtree(folder)


def _stay_up(stack: LocalStack, settings: Settings, report: DemoReport) -> None:
    """Says what to try, and waits for Ctrl-C."""
    kafka, clickhouse = stack.addresses["kafka"], stack.addresses["clickhouse"]
    request = f'{{"id":"1","sql":"SELECT count(*) FROM flights","reply_to":"{settings.reply_topic}"}}'
    report.heading("It is all still running: try it from another terminal")
    report.say(
        f"""
  export PINTAIL_DATA_DIR={stack.data_dir} PATH="{Path(sys.executable).parent}:$PATH"
  pintail query "SELECT carrier, count(*) FROM flights GROUP BY ALL ORDER BY 2 DESC"
  pintail tables
  pintail snapshots list
  kcat -b {kafka} -t flights -C -o -3 -e
  echo '{request}' | kcat -b {kafka} -t {settings.query_topic} -P
  kcat -b {kafka} -t {settings.reply_topic} -C -o -1 -e
  curl {clickhouse}/ --data-binary 'SELECT origin, count() FROM flights FINAL WHERE _deleted = 0 GROUP BY origin'
  curl http://127.0.0.1:{stack.process(STORE).specification.port}/metrics
  tail -f {stack.data_dir / "logs"}/*.log

Ctrl-C stops everything; the data stays in {stack.data_dir} until the next demo."""
    )
    try:
        stack.wait()
    except KeyboardInterrupt:
        report.say("\nStopping.")


if __name__ == "__main__":
    sys.exit(main())
