"""`pintail status`: what workers report, in one table; what does not answer is said."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import Any

import pytest
from rich.console import Console

from streams.cli.status import addresses_of, as_json, reports_of, table_of
from streams.config import Settings
from streams.errors import ConfigurationError

REPORT: dict[str, Any] = {
    "worker": "store-7",
    "ready": False,
    "partitions": {
        "0": {
            "state": "serving",
            "epoch": 4,
            "next_offsets": {"b": 2, "a": 10},
            "lag": 3,
            "recovered": {"rung": "snapshot", "version": 12, "seconds": 0.1},
            "snapshot": {"version": 13, "next_offsets": {}},
        },
        "1": {"state": "failed", "epoch": 2, "next_offsets": {}, "lag": 0, "failure": "log gap in a[1] [0, 5)"},
        "2": {"state": "replaying", "epoch": 2, "next_offsets": {}, "lag": 0, "progress": {"ratio": 0.42}},
    },
    "standbys": {
        "3": {"state": "standby", "next_offsets": {"a": 8}, "lag": 5},
        "4": {"state": "restoring", "next_offsets": {}, "lag": None, "failure": "no Redis"},
    },
}


class Answering(BaseHTTPRequestHandler):
    body = b""

    def do_GET(self) -> None:
        self.send_response(503)
        self.end_headers()
        self.wfile.write(self.body)

    def log_message(self, *arguments: Any) -> None:
        del arguments


@pytest.fixture
def worker() -> Iterator[str]:
    with HTTPServer(("127.0.0.1", 0), Answering) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


def shown(addresses: dict[str, str]) -> str:
    console = Console(width=200)
    with console.capture() as captured:
        console.print(table_of(reports_of(addresses)))
    return captured.get()


def test_every_partition_has_a_line_and_every_failure_is_said_in_full(
    worker: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Answering, "body", json.dumps(REPORT).encode())
    text = shown({worker: ""})
    first = next(line for line in text.splitlines() if "serving" in line)
    assert first.split() == ["store-7", "0", "serving", "snapshot", "12", "4", "a", "10,", "b", "2", "3", "13"]
    assert "replaying 42%" in text
    assert "store-7 1: log gap in a[1] [0, 5)" in text
    assert [line.split() for line in text.splitlines() if "standby" in line] == [
        ["store-7", "3", "standby", "a", "8", "5"]
    ]
    assert "store-7 4: no Redis" in text
    report = as_json(reports_of({worker: ""}))
    assert report["ready"] is False
    assert report["workers"][0]["partitions"]["0"]["lag"] == 3
    assert report["workers"][0]["standbys"]["3"]["lag"] == 5


@pytest.mark.parametrize("body", [b"hello", b"[]", b'{"ready": true}'])
def test_what_is_no_worker_is_said_to_be_none(worker: str, body: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Answering, "body", body)
    assert "is no worker of Pintail" in shown({worker: "store-0"})


def test_a_worker_that_does_not_answer_is_shown_and_not_ready() -> None:
    assert "does not answer" in shown({"127.0.0.1:1": "store-0"})
    assert as_json(reports_of({"127.0.0.1:1": "store-0"}))["ready"] is False


def test_addresses_are_those_given_or_that_of_the_settings(tmp_path: Any) -> None:
    settings = Settings(data_dir=tmp_path, metrics_port=8000)
    assert list(addresses_of(settings, ["a:1", "b:2"])) == ["a:1", "b:2"]
    assert addresses_of(settings, []) == {"127.0.0.1:8000": "store-0"}
    with pytest.raises(ConfigurationError, match="no worker is known"):
        addresses_of(Settings(data_dir=tmp_path), [])
    with pytest.raises(ConfigurationError, match="no address"):
        addresses_of(settings, ["localhost"])
