"""Waiting for a condition with a deadline, for tests that watch other processes."""

from __future__ import annotations

import http.client
import json
import threading
import time
from collections.abc import Callable
from typing import Any, TypeVar

Result = TypeVar("Result")
_PAUSE = threading.Event()


def wait_for(condition: Callable[[], Result | None], what: str, *, seconds: float = 60.0) -> Result:
    """The first truthy result of `condition`. AssertionError that names `what` after the deadline."""
    deadline = time.monotonic() + seconds
    while True:
        result = condition()
        if result:
            return result
        assert time.monotonic() < deadline, f"not within {seconds:.0f} s: {what}"
        _PAUSE.wait(0.05)


def worker_report(port: int) -> dict[str, Any]:
    """What the worker's /ready says; empty while it does not answer."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=2)
    try:
        connection.request("GET", "/ready")
        report: dict[str, Any] = json.loads(connection.getresponse().read())
    except (OSError, http.client.HTTPException, ValueError):
        return {}
    else:
        return report
    finally:
        connection.close()
