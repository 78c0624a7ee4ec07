"""A child process of the local stack: failures come with its log, it is restarted, and it never outlives a stop."""

from __future__ import annotations

import dataclasses
import json
import signal
import subprocess
import sys
import threading
from pathlib import Path

import psutil
import pytest

from streams.errors import LocalStackError
from streams.localstack.processes import ChildProcess, ProcessSpecification, ProcessState
from streams.localstack.records import ProcessRecord, ProcessRecords, write_atomically

#: Says it is ready by a file, then waits to be told to end.
SERVES = "import pathlib, signal, sys; pathlib.Path(sys.argv[1]).write_text('up'); signal.pause()"
DEAF = "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN); " + SERVES


class Bench:
    """A ChildProcess with a folder of its own and a list of what it reported."""

    def __init__(self, folder: Path, code: str, *, deadline_seconds: float = 20.0, restart: bool = True) -> None:
        self.up = folder / "up"
        self.records = ProcessRecords(folder / "run", owner="test")
        self.reported: list[ProcessState] = []
        self.details: list[str] = []
        self.died = threading.Event()
        specification = ProcessSpecification(
            name="server",
            command=[sys.executable, "-c", code, str(self.up)],
            log=folder / "logs" / "server.log",
            ready=self.up.exists,
            ready_deadline_seconds=deadline_seconds,
            stop_deadline_seconds=0.3,
            restart=restart,
        )
        self.process = ChildProcess(specification, self.records, self._on_report)

    def _on_report(self, _name: str, state: ProcessState, detail: str) -> None:
        self.reported.append(state)
        self.details.append(detail)
        if state is ProcessState.DIED:
            self.died.set()


def test_a_process_that_dies_at_once_is_reported_with_the_end_of_its_log(tmp_path: Path) -> None:
    bench = Bench(tmp_path, "import sys; sys.exit('no such table: flights')")
    bench.process.start()
    with pytest.raises(LocalStackError, match=r"did not start.*\n.*no such table: flights"):
        bench.process.wait_until_ready()
    bench.process.stop()


def test_the_report_of_a_death_carries_what_was_logged_last_and_where_the_log_is(tmp_path: Path) -> None:
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs" / "server.log").write_text("words of an earlier run\n")
    bench = Bench(tmp_path, "import sys; print(*range(90), sep='\\n', flush=True); sys.exit('no such table: flights')")
    bench.process.start()
    assert bench.died.wait(20)
    bench.process.stop()
    detail = bench.details[bench.reported.index(ProcessState.DIED)]
    assert detail.startswith("exit status 1; restarting in ")
    assert str(tmp_path / "logs" / "server.log") in detail
    assert detail.endswith("\n  88\n  89\n  no such table: flights")
    assert len(detail.splitlines()) == 13


def test_a_death_without_a_word_does_not_repeat_the_words_of_an_earlier_run(tmp_path: Path) -> None:
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs" / "server.log").write_text("words of an earlier run\n")
    bench = Bench(tmp_path, "import sys; sys.exit(3)", restart=False)
    bench.process.start()
    assert bench.died.wait(20)
    bench.process.stop()
    detail = bench.details[bench.reported.index(ProcessState.DIED)]
    assert detail.startswith("exit status 3; the end of its log, ")
    assert detail.endswith("(it logged nothing)")


def test_a_process_that_never_answers_is_given_up_after_its_deadline(tmp_path: Path) -> None:
    bench = Bench(tmp_path, "import signal; signal.pause()", deadline_seconds=0.2)
    bench.process.start()
    with pytest.raises(LocalStackError, match=r"not ready after 0 s"):
        bench.process.wait_until_ready()
    bench.process.stop()
    assert bench.process.pid is None


def test_a_killed_process_comes_back_as_another_one(tmp_path: Path) -> None:
    bench = Bench(tmp_path, SERVES)
    bench.process.start()
    bench.process.wait_until_ready()
    first = bench.process.pid
    bench.up.unlink()

    bench.process.kill(signal.SIGKILL)
    bench.process.wait_until_ready(deaths_allowed=0)

    assert bench.process.pid not in (None, first)
    assert bench.up.exists()
    bench.process.stop()
    running = [ProcessState.STARTING, ProcessState.READY]
    assert bench.reported == [*running, ProcessState.DIED, *running, ProcessState.STOPPED]


def test_a_process_that_cannot_be_restarted_stays_dead(tmp_path: Path) -> None:
    bench = Bench(tmp_path, SERVES, restart=False)
    bench.process.start()
    bench.process.wait_until_ready()
    bench.process.kill(signal.SIGKILL)
    with pytest.raises(LocalStackError, match="did not start"):
        bench.process.wait_until_ready(deaths_allowed=9)
    bench.process.stop()
    assert bench.reported[2] is ProcessState.DIED


@pytest.mark.parametrize("code", [SERVES, DEAF], ids=["hears SIGTERM", "ignores SIGTERM"])
@pytest.mark.parametrize("paused", [False, True])
def test_after_stop_nothing_runs_and_nothing_is_recorded(tmp_path: Path, code: str, paused: bool) -> None:
    bench = Bench(tmp_path, code)
    bench.process.start()
    bench.process.wait_until_ready()
    pid = bench.process.pid
    assert pid is not None
    if paused:
        bench.process.kill(signal.SIGSTOP)

    bench.process.stop()

    assert not psutil.pid_exists(pid)
    assert bench.process.pid is None
    assert list((tmp_path / "run").iterdir()) == []


def test_a_stopped_process_can_be_started_again(tmp_path: Path) -> None:
    bench = Bench(tmp_path, SERVES)
    for _ in range(2):
        bench.up.unlink(missing_ok=True)
        bench.process.start()
        bench.process.wait_until_ready()
        bench.process.stop()
    assert bench.reported.count(ProcessState.READY) == 2


def test_a_sweep_never_ends_a_process_that_only_reuses_the_pid(tmp_path: Path) -> None:
    records = ProcessRecords(tmp_path, owner="test")
    with subprocess.Popen([sys.executable, "-c", "import signal; signal.pause()"]) as stranger:
        started_at = psutil.Process(stranger.pid).create_time()
        old = ProcessRecord("server", stranger.pid, started_at - 1.0, "a run of yesterday")
        write_atomically(tmp_path / "server.json", _as_json(old))

        assert records.sweep() == []
        assert stranger.poll() is None
        assert list(tmp_path.iterdir()) == []
        stranger.kill()


def test_a_sweep_for_one_run_leaves_the_processes_of_another(tmp_path: Path) -> None:
    mine, theirs = ProcessRecords(tmp_path, owner="mine"), ProcessRecords(tmp_path, owner="theirs")
    with subprocess.Popen([sys.executable, "-c", "import signal; signal.pause()"]) as running:
        theirs.add("server", running.pid)
        assert mine.sweep(owner="mine") == []
        assert running.poll() is None

        assert mine.sweep() == ["server"]
        assert running.wait(10) == -signal.SIGTERM


def test_a_file_is_written_with_its_mode_and_whole(tmp_path: Path) -> None:
    path = tmp_path / "stack.json"
    path.write_text("old")
    write_atomically(path, "new", mode=0o600)
    assert path.read_text() == "new"
    assert path.stat().st_mode & 0o777 == 0o600
    assert list(tmp_path.iterdir()) == [path]


def _as_json(record: ProcessRecord) -> str:
    return json.dumps(dataclasses.asdict(record))
