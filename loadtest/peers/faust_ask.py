"""`python -m loadtest.peers.faust_ask`: plain Faust's way to read state from outside, `agent.ask()`, for comparison.

One process serves: an agent looks a key up in a dictionary and yields what it finds (kinder to Faust than a Table,
which would also keep a changelog). Another one asks, one after the other and then many at once, and says as its last
line what it measured.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import subprocess
import sys
import time
from itertools import count
from pathlib import Path
from typing import Any, NoReturn

import faust
import orjson

from loadtest.latencies import percentiles
from loadtest.preload import create_topics

ROWS = 10_000
_WARM_UP = 20
_REQUESTS = "faust-ask-requests"
_PARTITIONS = 8


def ask_app(kafka: str, folder: Path, name: str) -> tuple[faust.App, Any]:
    """The same app on both sides: one runs it, the other asks its agent."""
    folder.mkdir(parents=True, exist_ok=True)
    app = faust.App(
        "faust-ask",
        broker=f"kafka://{kafka}",
        store="memory://",
        datadir=str(folder / name),
        web_enabled=False,
        topic_disable_leader=True,
        topic_partitions=_PARTITIONS,
        reply_create_topic=True,
        reply_to=f"faust-ask-{name}",
        producer_linger=0,
    )
    rows = {str(number): {"id": number, "amount": number * 7} for number in range(ROWS)}

    @app.agent(app.topic(_REQUESTS, partitions=_PARTITIONS))  # type: ignore[untyped-decorator]
    async def lookup(keys: Any) -> Any:
        async for key in keys:
            yield rows[key]

    return app, lookup


def main() -> int:
    """Serves, or asks a process that does."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--kafka", required=True)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--samples", type=int, default=200)
    parser.add_argument("--in-flight", type=int, default=1_000)
    parser.add_argument("--serve", action="store_true")
    options = parser.parse_args()
    if options.serve:
        asyncio.run(_serve(options))
        return 0
    # Before the server subscribes: Faust would not notice for minutes that its topic has come into being.
    create_topics(options.kafka, {_REQUESTS: _PARTITIONS})
    command = [sys.executable, "-m", "loadtest.peers.faust_ask", "--kafka", options.kafka]
    server = subprocess.Popen([*command, "--folder", str(options.folder), "--serve"])
    try:
        asyncio.run(_ask(options, server))
    finally:
        server.kill()
        server.wait()


async def _serve(options: argparse.Namespace) -> None:
    app, _ = ask_app(options.kafka, options.folder, "server")
    await app.start()
    await asyncio.Event().wait()


async def _ask(options: argparse.Namespace, server: subprocess.Popen[bytes]) -> NoReturn:
    app, lookup = ask_app(options.kafka, options.folder, "client")
    await app.start_client()
    numbers = count()

    async def ask() -> float:
        key = str(next(numbers) % ROWS)
        started = time.perf_counter()
        async with asyncio.timeout(60):
            found = await lookup.ask(key, key=key)
        assert found["id"] == int(key)
        return (time.perf_counter() - started) * 1000

    taken = [await ask() for _ in range(_WARM_UP + options.samples)][_WARM_UP:]
    started = time.perf_counter()
    await asyncio.gather(*(ask() for _ in range(options.in_flight)))
    seconds = time.perf_counter() - started
    result = {"lookup_ms": percentiles(taken), "lookups_per_second": round(options.in_flight / seconds)}
    print(orjson.dumps(result).decode(), flush=True)
    server.kill()
    os._exit(0)  # a client of Faust does not always come to its end by itself


if __name__ == "__main__":
    sys.exit(main())
