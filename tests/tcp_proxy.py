"""A network that can be cut: a TCP proxy on the loopback address in front of one server.

While it is cut nothing gets through and nothing is closed, as if packets were lost; what was sent meanwhile arrives
when it is healed.
"""

from __future__ import annotations

import socket
import threading
from types import TracebackType
from typing import Self

from streams.localstack.ports import HOST

_CHUNK_BYTES = 1 << 16


class TcpProxy:
    """Listens on `port`; use as a context manager."""

    def __init__(self, port: int, *, server_port: int) -> None:
        self._listener = socket.create_server((HOST, port))
        self._server_port = server_port
        self._is_whole = threading.Event()
        self._is_whole.set()
        self._sockets: set[socket.socket] = set()
        self._lock = threading.Lock()

    def cut(self) -> None:
        """From now on nothing gets through."""
        self._is_whole.clear()

    def heal(self) -> None:
        """Everything gets through again, late."""
        self._is_whole.set()

    def __enter__(self) -> Self:
        threading.Thread(target=self._accept, daemon=True).start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        with self._lock:
            for each in list(self._sockets):
                _shut(each)
        self.heal()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return  # closed
            threading.Thread(target=self._connect, args=(client,), daemon=True).start()

    def _connect(self, client: socket.socket) -> None:
        self._is_whole.wait()
        try:
            server = socket.create_connection((HOST, self._server_port))
        except OSError:
            client.close()
            return
        with self._lock:
            self._sockets |= {client, server}
        back = threading.Thread(target=self._carry, args=(server, client), daemon=True)
        back.start()
        self._carry(client, server)
        back.join()
        with self._lock:
            self._sockets -= {client, server}
        client.close()
        server.close()

    def _carry(self, source: socket.socket, target: socket.socket) -> None:
        try:
            while data := source.recv(_CHUNK_BYTES):
                self._is_whole.wait()
                target.sendall(data)
        except OSError:
            pass  # one side is gone
        _shut(source)
        _shut(target)


def _shut(each: socket.socket) -> None:
    try:
        each.shutdown(socket.SHUT_RDWR)
    except OSError:
        return  # it is already
