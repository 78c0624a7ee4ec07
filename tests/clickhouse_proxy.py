"""A faulty network between a client and ClickHouse: an HTTP proxy that fails requests on demand and logs them.

The server behind it is the real one and knows nothing of it. A fault is used up by the insert it hits; a standing one
hits every request.
"""

from __future__ import annotations

import http.client
import socket
import struct
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from urllib.parse import parse_qs, urlsplit


class FaultKind(StrEnum):
    """What happens to the request."""

    UNAVAILABLE = "unavailable"  # answered 503, never reaches the server
    EXCEPTION = "exception"  # answered with a ClickHouse error code, never reaches the server
    DROP_BEFORE = "drop_before"  # connection reset, never reaches the server
    DROP_AFTER = "drop_after"  # carried out, then the connection is reset before the reply
    CUT_REPLY = "cut_reply"  # carried out, then half of the reply and a reset
    LATE = "late"  # connection reset at once, reaches the server only then
    SLOW = "slow"  # reaches the server late, perhaps after the client gave up


@dataclass(frozen=True)
class Fault:
    """One fault for one request."""

    kind: FaultKind
    seconds: float = 0.0
    code: int = 0


@dataclass(frozen=True)
class LoggedInsert:
    """An insert as it came over the wire."""

    statement: str
    settings: dict[str, str]
    encoding: str
    body: bytes


class ClickHouseProxy(ThreadingHTTPServer):
    """Use as a context manager; clients connect to `url`."""

    daemon_threads = True
    request_queue_size = 64

    def __init__(self, server_url: str) -> None:
        self.server = urlsplit(server_url).netloc
        self.inserts: list[LoggedInsert] = []
        #: What every request suffers while it is set, queries included.
        self.standing: Fault | None = None
        #: Texts that statements other than inserts carry -> others of the same length.
        self.replacements: dict[bytes, bytes] = {}
        self._faults: deque[Fault] = deque()
        self._callbacks: dict[int, Callable[[], object]] = {}
        self._changed = threading.Condition()
        self._under_way = 0
        super().__init__(("127.0.0.1", 0), _Handler)
        self._thread = threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)

    def __enter__(self) -> ClickHouseProxy:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.shutdown()
        self.server_close()

    @property
    def url(self) -> str:
        """Where clients reach it."""
        return f"http://127.0.0.1:{self.server_address[1]}"

    def inject(self, *faults: Fault) -> None:
        """The next inserts suffer these, one each."""
        with self._changed:
            self._faults.extend(faults)

    def call_at_insert(self, count: int, callback: Callable[[], object]) -> None:
        """Calls back, on a thread of the proxy, when insert number `count` comes in."""
        with self._changed:
            self._callbacks[count] = callback

    def wait_idle(self, *, seconds: float = 30.0) -> None:
        """Returns once no request is on its way to the server."""
        with self._changed:
            assert self._changed.wait_for(lambda: not self._under_way, seconds), "requests are still under way"

    def begin(self, insert: LoggedInsert | None) -> Fault | None:
        """Logs a request; the fault it suffers."""
        with self._changed:
            self._under_way += 1
            if insert is None:
                return self.standing
            self.inserts.append(insert)
            callback = self._callbacks.pop(len(self.inserts), None)
            if callback:
                callback()
            return self._faults.popleft() if self._faults else self.standing

    def end(self) -> None:
        """A request is done with."""
        with self._changed:
            self._under_way -= 1
            self._changed.notify_all()


class _Handler(BaseHTTPRequestHandler):
    server: ClickHouseProxy
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    wbufsize = -1

    def do_GET(self) -> None:
        self._relay()

    def do_POST(self) -> None:
        self._relay()

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002  # the name is inherited
        pass

    def _relay(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        insert = self._as_insert(body)
        fault = self.server.begin(insert)
        for text, other in self.server.replacements.items() if insert is None else ():
            assert len(text) == len(other)
            body = body.replace(text, other)
        try:
            self._relay_with(fault, body)
        except ConnectionError:
            self.close_connection = True
        finally:
            self.server.end()

    def _relay_with(self, fault: Fault | None, body: bytes) -> None:
        kind = fault.kind if fault else None
        if fault and kind is FaultKind.SLOW:
            time.sleep(fault.seconds)
        elif kind is FaultKind.UNAVAILABLE:
            return self._reply(503, [], b"overloaded")
        elif fault and kind is FaultKind.EXCEPTION:
            headers = [("X-ClickHouse-Exception-Code", str(fault.code))]
            return self._reply(500, headers, f"Code: {fault.code}. DB::Exception: injected. (INJECTED)".encode())
        elif kind is FaultKind.DROP_BEFORE:
            return self._reset()
        elif fault and kind is FaultKind.LATE:
            self._reset()
            time.sleep(fault.seconds)
            self._forward(body)
            return None
        status, headers, answer = self._forward(body)
        if kind is FaultKind.DROP_AFTER:
            return self._reset()
        return self._reply(status, headers, answer, cut=kind is FaultKind.CUT_REPLY)

    def _forward(self, body: bytes) -> tuple[int, list[tuple[str, str]], bytes]:
        upstream = http.client.HTTPConnection(self.server.server, timeout=60)
        try:
            headers = {name: value for name, value in self.headers.items() if name.lower() != "connection"}
            upstream.request(self.command, self.path, body=body or None, headers=headers)
            reply = upstream.getresponse()
            kept = [(n, v) for n, v in reply.getheaders() if n.lower() not in ("content-length", "date", "server")]
            return reply.status, kept, reply.read()
        finally:
            upstream.close()

    def _reply(self, status: int, headers: list[tuple[str, str]], body: bytes, *, cut: bool = False) -> None:
        self.send_response(status)
        for name, value in headers:
            self.send_header(name, value)
        # A cut reply promises a byte that never comes.
        self.send_header("Content-Length", str(len(body) + cut))
        self.end_headers()
        self.wfile.write(body[: len(body) // 2] if cut else body)
        self.wfile.flush()
        if cut:
            self._reset()

    def _reset(self) -> None:
        self.close_connection = True
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.connection.close()

    def _as_insert(self, body: bytes) -> LoggedInsert | None:
        parameters = {name: values[0] for name, values in parse_qs(urlsplit(self.path).query).items()}
        statement = parameters.pop("query", "")
        if not statement.startswith("INSERT"):
            return None
        return LoggedInsert(statement, parameters, self.headers.get("Content-Encoding", ""), body)
