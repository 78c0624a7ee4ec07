"""A schema registry over HTTP that tests start and stop: Confluent's routes and error codes, schemas kept in memory."""

from __future__ import annotations

import base64
import json
import socket
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit


class RegistryServer:
    """Holds schemas whether it runs or not; while it does not, its port refuses connections."""

    def __init__(self) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port: int = probe.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        #: id -> what GET /schemas/ids/<id> answers.
        self.schemas: dict[int, dict[str, Any]] = {}
        #: (subject, version) -> what GET /subjects/<subject>/versions/<version> answers.
        self.versions: dict[tuple[str, int], dict[str, Any]] = {}
        #: Every path that was asked for.
        self.asked: list[str] = []
        #: Answers everything with this (status, body) instead.
        self.answer_all: tuple[int, bytes] | None = None
        #: Requests wait while it is closed.
        self.gate = threading.Event()
        self.gate.set()
        #: "user:password" that requests must carry.
        self.credentials = ""
        self._server: ThreadingHTTPServer | None = None
        self._thread: threading.Thread | None = None

    def register(self, schema: Any, *, schema_id: int | None = None, **extra: Any) -> int:
        """Adds a schema; returns its id."""
        number = schema_id if schema_id is not None else len(self.schemas) + 1
        self.schemas[number] = {"schema": schema if isinstance(schema, str) else json.dumps(schema), **extra}
        return number

    def start(self) -> None:
        """Listens on the port, from when this returns."""
        registry = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                status, body = registry.answer(self.path, self.headers.get("Authorization", ""))
                self.send_response(status)
                self.send_header("Content-Length", str(len(body)))
                self.send_header("Content-Type", "application/vnd.schemaregistry.v1+json")
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, format: str, *args: Any) -> None:  # noqa: A002  # the name is http.server's
                """Quietly."""

        ThreadingHTTPServer.allow_reuse_address = True
        self._server = ThreadingHTTPServer(("127.0.0.1", self.port), Handler)
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Refuses connections, from when this returns. Idempotent."""
        if self._server is not None and self._thread is not None:
            self._server.shutdown()
            self._thread.join()
            self._server.server_close()
            self._server = None

    def answer(self, target: str, authorization: str) -> tuple[int, bytes]:
        """Status and body."""
        self.asked.append(target)
        assert self.gate.wait(30), "the gate was never opened"
        if self.answer_all is not None:
            return self.answer_all
        if self.credentials:
            expected = "Basic " + base64.b64encode(self.credentials.encode()).decode()
            if authorization != expected:
                return _answer(401, {"error_code": 401, "message": "Unauthorized"})
        match [unquote(part) for part in urlsplit(target).path.split("/")[1:]]:
            case ["schemas", "ids", number]:
                found = self.schemas.get(int(number))
                return _answer(200, found) if found else _answer(404, {"error_code": 40403, "message": "not found"})
            case ["subjects", subject, "versions", version]:
                found = self.versions.get((subject, int(version)))
                return _answer(200, found) if found else _answer(404, {"error_code": 40402, "message": "not found"})
        return _answer(404, {"error_code": 404, "message": "HTTP 404 Not Found"})


def _answer(status: int, document: object) -> tuple[int, bytes]:
    return status, json.dumps(document).encode()
