"""The demo as a fresh clone runs it, on a selection of the flights: exit status, promises, and nothing left running."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import orjson
import psutil
import pytest

from loadtest.observers import get
from streams.localstack.stack import LocalStack, StackOptions

ROOT = Path(__file__).resolve().parents[2]
FLIGHTS = 3_000
PROMISES = (
    "the whole system starts on this machine, without Docker",
    "every event is acknowledged by Kafka",
    "queries are answered while events pour in",
    "the sink worker dies (kill -9) in the middle of its work",
    "every event can be queried",
    "5 questions in SQL are answered over Kafka",
    "the next question sees each write",
    "a poison record is parked with its reason, and stops nothing",
    "every partition has a snapshot that holds every record",
    "the store worker comes back from Redis with the same content",
    "after its kill -9 the sink delivered every record exactly once",
)


class RunningDemo:
    """A demo without a terminal, whose output is read line by line."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process = process
        self.output = ""

    def read_until(self, text: str) -> None:
        """Reads on until `text` was printed. AssertionError if the demo ends before."""
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.output += line
            if text in line:
                return
        raise AssertionError(f"the demo ended without saying {text!r}:\n{self.output}")

    def finish(self) -> int:
        """Reads the rest; returns the exit status."""
        assert self.process.stdout is not None
        self.output += self.process.stdout.read()
        return self.process.wait()

    def promises(self, mark: str) -> list[str]:
        """What was kept (✔) or broken (✘), as said in the course of the demo."""
        return re.findall(rf"^  {mark} (.+) \([\d.]+ s\)$", self.output, re.MULTILINE)


@contextmanager
def running_demo(data_dir: Path, *arguments: str) -> Iterator[RunningDemo]:
    """Starts it; at the end it is killed if it still runs."""
    command = [sys.executable, "-m", "loadtest.demo", "--data-dir", str(data_dir), "--rows", str(FLIGHTS), *arguments]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PINTAIL_")}
    with subprocess.Popen(
        command,
        cwd=ROOT,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as process:
        try:
            yield RunningDemo(process)
        finally:
            process.kill()


def processes_of(data_dir: Path) -> list[str]:
    """Every process that works for the stack of this folder."""
    found = []
    for process in psutil.process_iter():
        try:
            known_by = [*process.cmdline(), process.environ().get("PINTAIL_DATA_DIR", "")]
        except (psutil.NoSuchProcess, psutil.AccessDenied, psutil.ZombieProcess):
            continue
        if any(str(data_dir) in text for text in known_by):
            found.append(" ".join(process.cmdline()))
    return found


def test_every_promise_is_kept_and_the_demo_ends_by_itself_without_a_terminal(tmp_path: Path) -> None:
    with running_demo(tmp_path / "demo") as demo:
        status = demo.finish()
    assert demo.promises("✘") == [], demo.output
    assert sorted(demo.promises("✔")) == sorted(PROMISES), demo.output
    assert status == 0, demo.output
    assert f"{len(PROMISES)} of {len(PROMISES)} promises kept" in demo.output
    assert "Ctrl-C" not in demo.output
    assert processes_of(tmp_path) == []


def test_a_broken_promise_is_named_and_the_exit_status_says_so(tmp_path: Path) -> None:
    """While it stays up, other terminals can ask."""
    data_dir = tmp_path / "demo"
    with running_demo(data_dir, "--keep") as demo:
        demo.read_until("Kill the store worker")
        stack = orjson.loads((data_dir / "stack.json").read_bytes())
        one_row_too_many = b"INSERT INTO weather (origin, _offset) VALUES ('JFK', 0)"
        assert get(stack["settings"]["clickhouse"], "/", body=one_row_too_many)[0] == 200
        demo.read_until("Ctrl-C stops everything")
        answer = subprocess.run(
            [sys.executable, "-m", "streams.cli.main", "query", "SELECT count(*) FROM flights", "--format", "csv"],
            cwd=ROOT,
            env={**os.environ, "PINTAIL_DATA_DIR": str(data_dir)},
            capture_output=True,
            text=True,
            check=False,
        )
        demo.process.send_signal(signal.SIGINT)
        status = demo.finish()
    assert str(FLIGHTS) in answer.stdout.split(), answer.stderr
    assert demo.promises("✘") == ["after its kill -9 the sink delivered every record exactly once"], demo.output
    assert re.search(r"weather: 26,116 rows \w+ instead of 26,115 rows", demo.output), demo.output
    assert f"{len(PROMISES) - 1} of {len(PROMISES)} promises kept" in demo.output
    assert status == 1
    assert processes_of(tmp_path) == []


def test_ctrl_c_in_the_middle_stops_everything(tmp_path: Path) -> None:
    with running_demo(tmp_path / "demo") as demo:
        demo.read_until("store-0     starting")
        demo.process.send_signal(signal.SIGINT)
        status = demo.finish()
    assert status == 130, demo.output
    assert "Traceback" not in demo.output
    assert processes_of(tmp_path) == []


def test_without_java_the_demo_offers_only_what_it_can_use(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "bin").mkdir()
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    monkeypatch.delenv("JAVA_HOME", raising=False)
    with running_demo(tmp_path / "demo") as demo:
        status = demo.finish()
    assert status == 1
    assert "apt-get install openjdk-17" in demo.output
    assert "PINTAIL_KAFKA" not in demo.output
    assert "--broker" not in demo.output


def test_a_folder_with_other_data_is_not_wiped(tmp_path: Path) -> None:
    letter = tmp_path / "letter.txt"
    letter.write_text("dear")
    with running_demo(tmp_path) as demo:
        status = demo.finish()
    assert status == 1
    assert letter.read_text() == "dear"
    assert "--data-dir" in demo.output


def test_the_folder_of_a_running_stack_is_not_wiped(tmp_path: Path) -> None:
    data_dir = tmp_path / "demo"
    with LocalStack(data_dir, StackOptions(services=("redis",))) as stack:
        with running_demo(data_dir) as demo:
            status = demo.finish()
        pid = stack.process("redis").pid
        assert pid is not None
        assert psutil.pid_exists(pid)
        assert (data_dir / "stack.json").exists()
    assert status == 1
    assert "another local stack runs" in demo.output
