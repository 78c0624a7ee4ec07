"""One child process of a local stack: started, awaited until it is ready, restarted when it dies, stopped in order.

A thread per process probes it until it is ready and then blocks in `wait()`; whether a death means "restart" or "we
asked for it" is decided under the process's lock. Children run in sessions of their own, so that Ctrl-C reaches the
stack alone and the stack decides the order. Called by `LocalStack`.
"""

from __future__ import annotations

import http.client
import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path

from streams.errors import LocalStackError
from streams.limits import KIB
from streams.localstack.ports import HOST
from streams.localstack.records import ProcessRecords
from streams.retry import Backoff

RESTART_FIRST_SECONDS = 0.1
RESTART_CEILING_SECONDS = 10.0
#: A process that was up this long did not fail to start: it is restarted at once.
RESTART_RESET_SECONDS = 30.0
ENDING_SIGNALS = frozenset({signal.SIGKILL, signal.SIGTERM, signal.SIGINT})
_READY_POLL_SECONDS = 0.05
_LOG_TAIL_LINES = 12
#: A process that was ended by a signal had nothing to say about it.
_LOG_TAIL_LINES_OF_KILLED = 2
_LOG_TAIL_BYTES = 32 * KIB


class ProcessState(StrEnum):
    """What is reported about a process."""

    PREPARING = "preparing"
    STARTING = "starting"
    READY = "ready"
    DIED = "died"
    STOPPED = "stopped"


#: Told about every change: name of the process, its new state, details for a person.
Report = Callable[[str, ProcessState, str], None]


@dataclass(frozen=True)
class ProcessSpecification:
    """A process as the stack wants it. `ready` is asked again and again until it is true."""

    name: str
    command: Sequence[str]
    log: Path
    ready: Callable[[], bool]
    port: int = 0
    environment: Mapping[str, str] = field(default_factory=dict)
    ready_deadline_seconds: float = 60.0
    stop_deadline_seconds: float = 15.0
    restart: bool = True
    #: Runs after an orderly stop.
    after_stop: Callable[[], None] = lambda: None


class ChildProcess:
    """A supervised process.

    States: idle -> running -> ready -> (died -> running -> ready)* -> idle. Callers: `start`, `stop`, `kill` and
    `wait_until_ready` by the stack's user, from any thread; everything from `_watch` on by the process's own thread.
    `_changed` guards all fields and is notified at each change of state.
    """

    def __init__(self, specification: ProcessSpecification, records: ProcessRecords, report: Report) -> None:
        self.specification = specification
        self._records = records
        self._report = report
        self._changed = threading.Condition()
        self._unwanted = threading.Event()
        self._popen: subprocess.Popen[bytes] | None = None
        self._watcher: threading.Thread | None = None
        self._ready = False
        self._deaths = 0
        #: Size of the log when the running incarnation was started.
        self._log_start = 0

    @property
    def name(self) -> str:
        """The name of the process in the stack."""
        return self.specification.name

    @property
    def pid(self) -> int | None:
        """The pid of the running incarnation, None while there is none."""
        popen = self._popen
        return popen.pid if popen and popen.poll() is None else None

    def start(self) -> None:
        """Starts it without waiting for readiness. Idempotent while it is wanted."""
        if self._watcher and self._watcher.is_alive():
            return
        self._unwanted.clear()
        self.specification.log.parent.mkdir(parents=True, exist_ok=True)
        popen = self._spawn()
        self._watcher = threading.Thread(target=self._watch, args=(popen,), name=f"watch-{self.name}", daemon=True)
        self._watcher.start()

    def wait_until_ready(self, *, deaths_allowed: int = 0) -> None:
        """Returns once the running incarnation answers.

        Raises LocalStackError, with the end of its log, when it dies more often than allowed or the deadline passes.
        """
        seconds = self.specification.ready_deadline_seconds
        with self._changed:
            deaths_max = self._deaths + deaths_allowed
            in_time = self._changed.wait_for(
                lambda: self._ready or self._deaths > deaths_max or self._unwanted.is_set() or self._popen is None,
                timeout=seconds,
            )
            ready = self._ready
        if not ready:
            fault = "did not start" if in_time else f"is not ready after {seconds:.0f} s"
            raise LocalStackError(
                f"{self.name} {fault}; the end of its log:\n{self.log_tail()}",
                hint=f"its whole log is {self.specification.log}",
            )

    def kill(self, number: signal.Signals = signal.SIGKILL) -> None:
        """Sends a signal to the running incarnation; for one that ends it, returns when it is gone.

        The process stays wanted: it is restarted as after any death.
        """
        popen = self._popen
        if popen is None or popen.poll() is not None:
            return
        popen.send_signal(number)
        if number in ENDING_SIGNALS:
            popen.wait()
            with self._changed:
                self._changed.wait_for(lambda: self._popen is not popen or not self._ready)

    def stop(self) -> None:
        """SIGTERM, then SIGKILL after the deadline; returns when it is gone and stays gone. Idempotent."""
        watcher = self._watcher
        if watcher is None:
            return
        with self._changed:
            self._unwanted.set()
            self._changed.notify_all()
            popen = self._popen
        orderly = True
        if popen and popen.poll() is None:
            popen.terminate()
            popen.send_signal(signal.SIGCONT)  # one that was paused hears SIGTERM only when it goes on
            try:
                popen.wait(self.specification.stop_deadline_seconds)
            except subprocess.TimeoutExpired:
                orderly = False
                popen.kill()
        watcher.join()
        self._watcher = None
        if orderly:
            self.specification.after_stop()
        self._report(self.name, ProcessState.STOPPED, "" if orderly else "killed: it did not end in time")

    def log_tail(self, *, lines_max: int = _LOG_TAIL_LINES, since: int = 0) -> str:
        """The last lines of its log, for error messages; only what was written from byte `since` on."""
        try:
            with self.specification.log.open("rb") as log:
                log.seek(max(since, log.seek(0, os.SEEK_END) - _LOG_TAIL_BYTES))
                lines = log.read().decode(errors="replace").splitlines()
        except FileNotFoundError:
            return "  (no log)"
        return "\n".join(f"  {line[:300]}" for line in lines[-lines_max:]) or "  (it logged nothing)"

    def _spawn(self) -> subprocess.Popen[bytes] | None:
        """Starts an incarnation, unless `stop` was called; under the lock, so that `stop` sees the newest one."""
        specification = self.specification
        with self._changed:
            if self._unwanted.is_set():
                return None
            with specification.log.open("ab") as log:
                self._log_start = log.seek(0, os.SEEK_END)
                popen = subprocess.Popen(
                    specification.command,
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    env={**os.environ, **specification.environment},
                    start_new_session=True,
                )
            self._records.add(self.name, popen.pid)
            self._popen = popen
        self._report(self.name, ProcessState.STARTING, "")
        return popen

    def _watch(self, popen: subprocess.Popen[bytes] | None) -> None:
        backoff = Backoff(RESTART_FIRST_SECONDS, RESTART_CEILING_SECONDS)
        while popen:
            started = time.monotonic()
            self._await_ready(popen)
            code = popen.wait()
            with self._changed:
                self._records.remove(self.name)
                self._ready = False
                self._deaths += 1
                self._popen = popen if self.specification.restart else None
                self._changed.notify_all()
                if self._unwanted.is_set():
                    return
            if not self.specification.restart:
                self._report(self.name, ProcessState.DIED, f"{describe_exit(code)}; {self._last_words(code)}")
                return
            if time.monotonic() - started > RESTART_RESET_SECONDS:
                backoff.reset()
                delay = 0.0
            else:
                delay = backoff.next_delay_seconds()
            going_on = f"restarting in {delay:.1f} s"
            self._report(self.name, ProcessState.DIED, f"{describe_exit(code)}; {going_on}; {self._last_words(code)}")
            self._unwanted.wait(delay)
            popen = self._spawn()

    def _last_words(self, code: int) -> str:
        """What the incarnation that just died said last, and where to read the rest."""
        lines_max = _LOG_TAIL_LINES if code >= 0 else _LOG_TAIL_LINES_OF_KILLED
        said = self.log_tail(lines_max=lines_max, since=self._log_start)
        return f"the end of its log, {self.specification.log}:\n{said}"

    def _await_ready(self, popen: subprocess.Popen[bytes]) -> None:
        started = time.monotonic()
        while not self.specification.ready():
            if popen.poll() is not None or self._unwanted.wait(_READY_POLL_SECONDS):
                return
        if popen.poll() is None:  # else what answered was not this incarnation
            self._report(self.name, ProcessState.READY, f"{time.monotonic() - started:.1f} s")
            with self._changed:
                self._ready = True
                self._changed.notify_all()


def describe_exit(code: int) -> str:
    """An exit status in words."""
    return f"exit status {code}" if code >= 0 else f"ended by {signal.Signals(-code).name}"


def answers_http(port: int, path: str) -> bool:
    """True if GET `path` on the loopback address answers 200."""
    connection = http.client.HTTPConnection(HOST, port, timeout=1)
    try:
        connection.request("GET", path)
        return connection.getresponse().status == http.HTTPStatus.OK
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()
