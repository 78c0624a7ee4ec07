"""ClickHouse's HTTP interface over the embedded engine: the ClickHouse of the local stack, and of the tests.

`python -m streams.localstack.clickhouse_front --path DIR --port N` serves clickhouse-connect, curl and anything else
that speaks the interface: parameters, settings, sessions, compressed bodies and replies, error codes. It prints one
JSON line with its address when it is ready and stops on SIGTERM or SIGINT. What it leaves out: users and passwords
(any are accepted), external data, and streaming of results (a reply is built whole).
"""

from __future__ import annotations

import argparse
import gzip
import json
import logging
import re
import signal
import sys
import threading
import time
import uuid
import zlib
from collections.abc import Callable, Mapping
from email.parser import BytesParser
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qsl, urlsplit

import cramjam
import lz4.frame

from streams.errors import PintailError
from streams.localstack.clickhouse_engine import SESSION_SECONDS_DEFAULT, Engine, EngineError, Outcome, Statement

log = logging.getLogger(__name__)

#: Request parameters that are not settings of the statement.
_NOT_SETTINGS = frozenset(
    {
        *("query", "database", "default_format", "query_id", "client_protocol_version", "stacktrace"),
        *("session_id", "session_timeout", "session_check", "quota_key", "user", "password", "role"),
        *("compress", "decompress", "enable_http_compression", "http_zlib_compression_level"),
        *("wait_end_of_query", "buffer_size", "cancel_http_readonly_queries_on_client_close"),
        *("send_progress_in_http_headers", "http_headers_progress_interval_ms"),
    }
)
#: ClickHouse error code -> HTTP status; every other error is a 500.
_STATUS_OF_CODE = {
    **dict.fromkeys((36, 41, 43, 53, 62, 70, 72, 117, 130, 456, 457), 400),
    **dict.fromkeys((60, 81, 46, 47, 50, 56, 73, 115), 404),
    **dict.fromkeys((497, 516), 403),
    **dict.fromkeys((373,), 423),
    **dict.fromkeys((48,), 501),
    **dict.fromkeys((236,), 503),
    **dict.fromkeys((241,), 507),
}
_CANNOT_DECOMPRESS = 271
_NOT_IMPLEMENTED = 48

_TRAILING_FORMAT = re.compile(rb"\bFORMAT\s+(\w+)\s*;?\s*\Z", re.IGNORECASE)
_RETURNS_ROWS = re.compile(rb"[\s(]*(SELECT|WITH|SHOW|DESC|DESCRIBE|EXISTS|EXPLAIN|CHECK)\b", re.IGNORECASE)


def _lz4_frames(data: bytes) -> bytes:
    """A body may hold several frames, one per block."""
    parts = []
    while data:
        frame = lz4.frame.LZ4FrameDecompressor()
        parts.append(frame.decompress(data))
        if not frame.eof:
            raise ValueError("the last LZ4 frame is cut")
        data = frame.unused_data or b""
    return b"".join(parts)


_DECODERS: Mapping[str, Callable[[bytes], bytes]] = {
    "lz4": _lz4_frames,
    "zstd": lambda data: bytes(cramjam.zstd.decompress(data)),
    "gzip": gzip.decompress,
    "deflate": zlib.decompress,
}
_ENCODERS: Mapping[str, Callable[[bytes], bytes]] = {
    "lz4": lz4.frame.compress,
    "zstd": lambda data: bytes(cramjam.zstd.compress(data)),
    "gzip": gzip.compress,
    "deflate": zlib.compress,
}


class ClickHouseFront(ThreadingHTTPServer):
    """The listening server; one thread per client connection."""

    daemon_threads = True
    request_queue_size = 128
    allow_reuse_address = True

    def __init__(self, engine: Engine, *, host: str = "127.0.0.1", port: int = 0) -> None:
        """Listens when it returns; port 0 chooses a free one. Raises OSError if the port is taken."""
        self.engine = engine
        super().__init__((host, port), _Handler)

    @property
    def url(self) -> str:
        """Where clients reach it."""
        host, port = self.server_address[:2]
        return f"http://{host!s}:{port}"


class _Handler(BaseHTTPRequestHandler):
    """Requests of one client connection, one after the other."""

    server: ClickHouseFront
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    wbufsize = -1

    def do_GET(self) -> None:
        self._serve()

    def do_POST(self) -> None:
        self._serve()

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002  # the name is inherited
        log.debug(format, *args)

    def _serve(self) -> None:
        url = urlsplit(self.path)
        try:
            body = self._read_body()
        except ConnectionError:
            # The client went away inside its request: nothing of it may be applied.
            self.close_connection = True
            return
        if url.path == "/ping" or (url.path == "/" and not url.query and not body):
            self._reply(200, b"Ok.\n")
        elif url.path != "/":
            self._reply(404, f"There is no handle {url.path}\n".encode())
        else:
            self._serve_statement(dict(parse_qsl(url.query, keep_blank_values=True)), body)

    def _serve_statement(self, parameters: dict[str, str], body: bytes) -> None:
        query_id = parameters.get("query_id") or str(uuid.uuid4())
        started = time.perf_counter_ns()
        try:
            statement = _statement_of(parameters, self._decoded(parameters, body))
            outcome = self.server.engine.execute(statement)
        except EngineError as error:
            headers = {"X-ClickHouse-Exception-Code": str(error.code), "X-ClickHouse-Query-Id": query_id}
            self._reply(_STATUS_OF_CODE.get(error.code, 500), f"{error}\n".encode(), headers)
            return
        headers = {
            "X-ClickHouse-Summary": _summary(outcome, time.perf_counter_ns() - started),
            "X-ClickHouse-Query-Id": query_id,
            "X-ClickHouse-Server-Display-Name": "pintail",
            "X-ClickHouse-Timezone": self.server.engine.timezone,
        }
        if outcome.body or _RETURNS_ROWS.match(statement.sql):
            named = _TRAILING_FORMAT.search(statement.sql)
            headers["X-ClickHouse-Format"] = named[1].decode() if named else statement.default_format
        reply = outcome.body
        if reply and parameters.get("enable_http_compression") == "1":
            accepted = (name.strip() for name in self.headers.get("Accept-Encoding", "").split(","))
            encoding = next((name for name in accepted if name in _ENCODERS), None)
            if encoding:
                reply = _ENCODERS[encoding](reply)
                headers["Content-Encoding"] = encoding
        self._reply(200, reply, headers)

    def _decoded(self, parameters: dict[str, str], body: bytes) -> bytes:
        """The body without its compression; form fields move into `parameters`."""
        encoding = self.headers.get("Content-Encoding", "identity")
        if parameters.get("decompress") == "1":
            raise EngineError("decompress=1 is not served here; use Content-Encoding", code=_NOT_IMPLEMENTED)
        if encoding != "identity":
            decode = _DECODERS.get(encoding)
            if decode is None:
                raise EngineError(f"unknown Content-Encoding {encoding!r}", code=_NOT_IMPLEMENTED)
            try:
                body = decode(body)
            except (ValueError, RuntimeError, EOFError, OSError, zlib.error, cramjam.DecompressionError) as error:
                raise EngineError(f"cannot decompress the body: {error}", code=_CANNOT_DECOMPRESS) from None
        content_type = self.headers.get("Content-Type", "")
        if not content_type.startswith("multipart/form-data"):
            return body
        form = BytesParser().parsebytes(b"Content-Type: " + content_type.encode() + b"\r\n\r\n" + body)
        for part in form.walk():
            if part.is_multipart():
                continue
            if part.get_filename():
                raise EngineError("external data is not served here", code=_NOT_IMPLEMENTED)
            name = part.get_param("name", header="Content-Disposition")
            value = part.get_payload(decode=True)
            assert isinstance(value, bytes)
            parameters[str(name)] = value.decode()
        return b""

    def _read_body(self) -> bytes:
        if "chunked" not in self.headers.get("Transfer-Encoding", ""):
            return self._read_exactly(int(self.headers.get("Content-Length") or 0))
        chunks: list[bytes] = []
        while True:
            line = self.rfile.readline()
            try:
                size = int(line.split(b";")[0], 16)
            except ValueError:
                raise ConnectionError("chunk without a size") from None
            if not size:
                while self.rfile.readline().strip():
                    pass
                return b"".join(chunks)
            chunks.append(self._read_exactly(size))
            self.rfile.readline()

    def _read_exactly(self, size: int) -> bytes:
        data = self.rfile.read(size)
        if len(data) != size:
            raise ConnectionError("the request was cut")
        return data

    def _reply(self, status: int, body: bytes, headers: Mapping[str, str] | None = None) -> None:
        try:
            self.send_response(status)
            for name, value in (headers or {}).items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)
            self.wfile.flush()
        except ConnectionError:
            # The client did not wait for its reply; the statement has been carried out all the same.
            self.close_connection = True


def _statement_of(parameters: Mapping[str, str], data: bytes) -> Statement:
    query = parameters.get("query", "").encode()
    return Statement(
        sql=query + b"\n" + data if query and data else query or data,
        default_format=parameters.get("default_format") or "TabSeparated",
        database=parameters.get("database") or None,
        settings={
            name: value
            for name, value in parameters.items()
            if name not in _NOT_SETTINGS and not name.startswith("param_")
        },
        parameters={
            name.removeprefix("param_"): value for name, value in parameters.items() if name.startswith("param_")
        },
        session=parameters.get("session_id") or None,
        session_seconds=float(parameters.get("session_timeout") or SESSION_SECONDS_DEFAULT),
        session_must_exist=parameters.get("session_check") == "1",
    )


def _summary(outcome: Outcome, elapsed_ns: int) -> str:
    counts = {
        "read_rows": outcome.rows_read,
        "read_bytes": outcome.bytes_read,
        "written_rows": outcome.rows_written,
        "written_bytes": outcome.bytes_written,
        "elapsed_ns": elapsed_ns,
    }
    return json.dumps({name: str(value) for name, value in counts.items()})


def main(arguments: list[str] | None = None) -> int:
    """Serve until SIGTERM or SIGINT."""
    parser = argparse.ArgumentParser(prog="clickhouse_front", description=__doc__)
    parser.add_argument("--path", type=Path, required=True, help="directory of the engine's data")
    parser.add_argument("--port", type=int, default=0, help="port to listen on; 0 chooses a free one")
    parser.add_argument("--host", default="127.0.0.1")
    options = parser.parse_args(arguments)
    # Blocked before the engine starts its threads, which inherit the mask: only sigwait below sees them.
    stop_signals = {signal.SIGTERM, signal.SIGINT}
    signal.pthread_sigmask(signal.SIG_BLOCK, stop_signals)
    try:
        engine = Engine(options.path)
        front = ClickHouseFront(engine, host=options.host, port=options.port)
    except (PintailError, OSError) as error:
        print(f"clickhouse_front: {error}", file=sys.stderr)  # noqa: T201
        return 1
    threading.Thread(target=front.serve_forever, name="accept", daemon=True).start()
    ready = {"url": front.url, "host": options.host, "port": front.server_address[1], "version": engine.version}
    print(json.dumps(ready), flush=True)  # noqa: T201
    signal.sigwait(stop_signals)
    front.shutdown()
    front.server_close()
    engine.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
