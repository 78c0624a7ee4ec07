"""Ports for the servers of a local stack: free ones below the range the system uses for outgoing connections."""

from __future__ import annotations

import random
import socket

from streams.errors import LocalStackError

HOST = "127.0.0.1"
#: Linux takes outgoing ports from 32768 up, macOS from 49152 up: a server's port must not be borrowed between the
#: moment it is chosen and the moment the server binds it.
FIRST_PORT = 20_000
LAST_PORT = 29_999
_TRIES = 200
#: Ports this process has chosen: a server may not have bound its port yet when the next one is chosen.
_chosen: set[int] = set()


def is_free(port: int) -> bool:
    """True if a server could listen on `port` of the loopback address."""
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, port))
        except OSError:
            return False
    return True


def choose_port(*, given: int = 0, preferred: int = 0, server: str) -> int:
    """`given` if it is set, else `preferred` (where the server was last time) if that is free, else any free port.

    Raises LocalStackError when the given port is taken.
    """
    if given:
        if not is_free(given):
            raise LocalStackError(
                f"port {given} for {server} is taken by another program",
                hint="give another port, or none and a free one is chosen",
            )
        return given
    at_random = random.SystemRandom().sample(range(FIRST_PORT, LAST_PORT + 1), _TRIES)
    for port in [preferred, *(port for port in at_random if port not in _chosen)]:
        if port and is_free(port):
            _chosen.add(port)
            return port
    raise LocalStackError(
        f"no free port for {server} between {FIRST_PORT} and {LAST_PORT}",
        hint="give a port for it, or end some servers",
    )
