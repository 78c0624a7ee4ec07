"""LocalStack: Kafka, Redis, ClickHouse and the workers as processes of one data folder.

Order of effects. Start: 1 lock the folder, 2 sweep orphans, 3 reaper, 4 servers, 5 stack file, 6 workers. Stop: the
reverse; the stack file goes first, so that nobody finds addresses that are about to close. Used by `pintail dev`, the
demo, the load tests and the test suite.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import secrets
import signal
import subprocess
import sys
import threading
import uuid
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import IO, Literal, Self

from streams.config import ENVIRONMENT_PREFIX, STACK_FILE_NAME
from streams.errors import LocalStackError
from streams.localstack.kafka import kafka_process
from streams.localstack.memory_broker import address_of, memory_broker_process
from streams.localstack.ports import HOST, choose_port
from streams.localstack.processes import ChildProcess, ProcessSpecification, ProcessState, Report, answers_http
from streams.localstack.reaper import start_reaper
from streams.localstack.records import ProcessRecords, write_atomically
from streams.localstack.redis_server import redis_process

ServiceName = Literal["kafka", "redis", "clickhouse"]
SERVICES: tuple[ServiceName, ...] = ("kafka", "redis", "clickhouse")
SNAPSHOT_KEY_FILE_NAME = "snapshot.key"


@dataclass(frozen=True)
class StackOptions:
    """What a stack consists of. Port 0 chooses a free one, the same as last time where possible."""

    services: tuple[ServiceName, ...] = SERVICES
    #: Addresses of services to use instead of starting them, by service.
    given: Mapping[str, str] = field(default_factory=dict)
    broker: Literal["kafka", "memory"] = "kafka"
    #: Topics that the in-memory broker creates at once.
    memory_topics: tuple[str, ...] = ()
    ports: Mapping[ServiceName, int] = field(default_factory=dict)
    store_workers: int = 0
    sink_workers: int = 0
    #: Further `PINTAIL_*` variables of the workers.
    worker_environment: Mapping[str, str] = field(default_factory=dict)
    #: False when the settings name a key already.
    snapshot_key_generated: bool = True


class LocalStack:
    """The running stack of one data folder, as a context manager or with `start` and `stop`."""

    def __init__(
        self, data_dir: Path, options: StackOptions | None = None, *, report: Report = lambda *_: None
    ) -> None:
        self.data_dir = data_dir.resolve()
        self.options = options or StackOptions()
        self.addresses: dict[str, str] = dict(self.options.given)
        self.processes: dict[str, ChildProcess] = {}
        self._report = report
        self._owner = uuid.uuid4().hex
        self._lock_file: IO[str] | None = None
        self._reaper: subprocess.Popen[bytes] | None = None
        self._records: ProcessRecords | None = None
        self._last_ports: dict[str, int] = {}
        self._lost = threading.Event()
        self._published = False
        self._publishing = threading.Lock()

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    @property
    def stack_file(self) -> Path:
        """Where other processes find the addresses while the stack runs."""
        return self.data_dir / STACK_FILE_NAME

    @property
    def has_workers(self) -> bool:
        """True for a stack that answers queries, False for servers alone."""
        return self.options.store_workers > 0

    def start(self) -> None:
        """Starts everything and returns when all of it is ready; on any failure nothing is left running.

        Raises LocalStackError or MissingProgramError.
        """
        try:
            self._take_folder()
            self._start_services()
            self._published = True
            self._publish()
            self._start_workers()
        except BaseException:
            self.stop()
            raise

    def stop(self) -> None:
        """Stops everything, last started first. Idempotent."""
        if self._lock_file is None:
            return  # the folder is not ours
        with self._publishing:
            self._published = False
            self.stack_file.unlink(missing_ok=True)
        # Workers among themselves, then servers among themselves, end at the same time: each kind needs only the next.
        workers = [process for name, process in self.processes.items() if name not in SERVICES]
        servers = [process for name, process in self.processes.items() if name in SERVICES]
        for group in (workers, servers):
            _all_at_once([process.stop for process in reversed(group)])
        self.processes.clear()
        if self._reaper:
            assert self._reaper.stdin is not None
            self._reaper.stdin.close()
            self._reaper.wait()
            self._reaper = None
        self._lock_file.close()
        self._lock_file = None

    def wait(self) -> None:
        """Blocks until a process is lost that cannot be restarted, and raises LocalStackError then."""
        self._lost.wait()
        raise LocalStackError("a server of the stack ended and what it held is gone", hint="start the stack again")

    def settings_environment(self) -> dict[str, str]:
        """The `PINTAIL_*` variables with which any Pintail process uses this stack."""
        values = {**self._settings(), "data_dir": str(self.data_dir)}
        return {f"{ENVIRONMENT_PREFIX}{name.upper()}": value for name, value in values.items()}

    def process(self, name: str) -> ChildProcess:
        """The process of that name: `kafka`, `redis`, `clickhouse`, `store-0`, `sink-0`, ..."""
        try:
            return self.processes[name]
        except KeyError:
            raise LocalStackError(
                f"the stack has no process {name!r}", hint=f"it has: {', '.join(self.processes) or 'none'}"
            ) from None

    def kill(self, name: str, number: signal.Signals = signal.SIGKILL) -> None:
        """Sends a signal; a process that ends from it is restarted like one that died by itself."""
        self.process(name).kill(number)

    def stop_process(self, name: str) -> None:
        """Stops one process until `start_process`."""
        self.process(name).stop()

    def start_process(self, name: str) -> None:
        """Starts one process that was stopped, and waits until it is ready."""
        process = self.process(name)
        process.start()
        process.wait_until_ready()

    def add_worker(self, kind: Literal["store", "sink"], number: int) -> ChildProcess:
        """Starts a worker that the options do not name; returns at once."""
        return self._add(self._worker(kind, number))

    def wait_until_ready(self, name: str, *, deaths_allowed: int = 5) -> None:
        """Waits until a process that was killed is back and ready."""
        self.process(name).wait_until_ready(deaths_allowed=deaths_allowed)

    def _take_folder(self) -> None:
        self.data_dir.mkdir(parents=True, exist_ok=True)
        lock_file = (self.data_dir / "stack.lock").open("a+")
        try:
            fcntl.flock(lock_file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock_file.seek(0)
            holder = lock_file.read().strip() or "unknown"
            lock_file.close()
            raise LocalStackError(
                f"another local stack runs in {self.data_dir} (process {holder})",
                hint="stop it (Ctrl-C), or give this one a folder of its own: --data-dir",
            ) from None
        lock_file.truncate(0)
        lock_file.write(str(os.getpid()))
        lock_file.flush()
        self._lock_file = lock_file
        self._records = ProcessRecords(self.data_dir / "run", owner=self._owner)
        orphans = self._records.sweep()
        if orphans:
            self._report("stack", ProcessState.STOPPED, f"processes of a killed run: {', '.join(orphans)}")
        self.stack_file.unlink(missing_ok=True)
        self._reaper = start_reaper(self._records, self.stack_file)

    def _start_services(self) -> None:
        self._last_ports = _read_ports(self.data_dir / "ports.json")
        makers = {"kafka": self._kafka, "redis": self._redis, "clickhouse": self._clickhouse}
        for name in self.options.services:
            if name not in self.addresses:
                self._add(makers[name]())
        for process in self.processes.values():
            process.wait_until_ready()
            self.addresses[process.name] = self._address(process)
        ports = {name: process.specification.port for name, process in self.processes.items()}
        write_atomically(self.data_dir / "ports.json", json.dumps(self._last_ports | ports))

    def _kafka(self) -> ProcessSpecification:
        data_dir, log = self.data_dir / "kafka", self._log("kafka")
        if self.options.broker == "memory":
            return memory_broker_process(data_dir, topics=self.options.memory_topics, log=log)
        progress = partial(self._report, "kafka", ProcessState.PREPARING)
        return kafka_process(data_dir, port=self._port("kafka"), log=log, progress=progress)

    def _redis(self) -> ProcessSpecification:
        return redis_process(self.data_dir / "redis", port=self._port("redis"), log=self._log("redis"))

    def _clickhouse(self) -> ProcessSpecification:
        port, path = self._port("clickhouse"), self.data_dir / "clickhouse"
        command = [
            sys.executable,
            "-m",
            "streams.localstack.clickhouse_front",
            "--path",
            str(path),
            "--port",
            str(port),
        ]
        return ProcessSpecification(
            name="clickhouse",
            command=command,
            log=self._log("clickhouse"),
            port=port,
            ready=lambda: answers_http(port, "/ping"),
        )

    def _start_workers(self) -> None:
        workers = [self.add_worker("store", number) for number in range(self.options.store_workers)]
        workers += [self.add_worker("sink", number) for number in range(self.options.sink_workers)]
        for worker in workers:
            worker.wait_until_ready()

    def _worker(self, kind: str, number: int) -> ProcessSpecification:
        name = f"{kind}-{number}"
        port = choose_port(server=name)
        environment = self.settings_environment() | {
            "PYTHONUNBUFFERED": "1",
            # Empty is unset: what the first start compiles, the next ones load.
            "PYTHONDONTWRITEBYTECODE": "",
            "PINTAIL_WORKER": name,
            "PINTAIL_METRICS_HOST": HOST,
            "PINTAIL_METRICS_PORT": str(port),
            **self.options.worker_environment,
        }
        return ProcessSpecification(
            name=name,
            command=[sys.executable, "-m", "agents", kind],
            log=self._log(name),
            port=port,
            environment=environment,
            ready=lambda: answers_http(port, "/ready"),
            ready_deadline_seconds=180,
            stop_deadline_seconds=30,
        )

    def _add(self, specification: ProcessSpecification) -> ChildProcess:
        assert self._records is not None
        process = ChildProcess(specification, self._records, self._on_change)
        self.processes[specification.name] = process
        process.start()
        return process

    def _on_change(self, name: str, state: ProcessState, detail: str) -> None:
        """Called from the processes' own threads."""
        process = self.processes[name]
        if state is ProcessState.READY:
            detail = f"{self._address(process)} ({detail})"
        self._report(name, state, detail)
        if state is ProcessState.STARTING:
            self._publish()
        if state is ProcessState.DIED and not process.specification.restart:
            self._lost.set()

    def _address(self, process: ChildProcess) -> str:
        port = process.specification.port
        if process.name == "kafka":
            return f"{HOST}:{port}" if port else address_of(self.data_dir / "kafka")
        return f"redis://{HOST}:{port}/0" if process.name == "redis" else f"http://{HOST}:{port}"

    def _port(self, service: ServiceName) -> int:
        given = self.options.ports.get(service, 0)
        return choose_port(given=given, preferred=self._last_ports.get(service, 0), server=service)

    def _log(self, name: str) -> Path:
        return self.data_dir / "logs" / f"{name}.log"

    def _settings(self) -> dict[str, str]:
        settings: dict[str, str] = dict(self.addresses)
        if self.options.snapshot_key_generated:
            settings["snapshot_key_file"] = str(ensure_snapshot_key(self.data_dir / SNAPSHOT_KEY_FILE_NAME))
        return settings

    def _publish(self) -> None:
        """Writes the stack file as things are, between the start of the servers and the stop."""
        with self._publishing:
            if not self._published:
                return
            processes = {
                name: {"pid": process.pid, "log": str(process.specification.log), "port": process.specification.port}
                for name, process in list(self.processes.items())
            }
            stack = {"pid": os.getpid(), "run": self._owner, "settings": self._settings(), "processes": processes}
            # Addresses may carry passwords.
            write_atomically(self.stack_file, json.dumps(stack, indent=2) + "\n", mode=0o600)


def ensure_snapshot_key(path: Path) -> Path:
    """A file with a random AES-256 key that only its owner can read; kept if it exists."""
    with contextlib.suppress(FileExistsError):
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(descriptor, "w") as file:
            file.write(secrets.token_hex(32) + "\n")
    return path


def _all_at_once(actions: list[Callable[[], None]]) -> None:
    with ThreadPoolExecutor(max_workers=len(actions) or 1) as pool:
        for done in [pool.submit(action) for action in actions]:
            done.result()


def _read_ports(path: Path) -> dict[str, int]:
    try:
        return {name: int(port) for name, port in json.loads(path.read_text()).items()}
    except (FileNotFoundError, ValueError):
        return {}
