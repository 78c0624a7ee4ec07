"""A rolling restart of all store workers while 50 clients ask: nobody sees an error (invariant 9, D11)."""

from __future__ import annotations

import asyncio
from collections import Counter
from contextlib import aclosing
from pathlib import Path
from typing import Any

from streams.client import AsyncClient
from tests.conftest import Servers
from tests.system import System, running_system

TABLES = {
    "accounts": """
        CREATE TABLE accounts (id VARCHAR, balance BIGINT, PRIMARY KEY (id))
        WITH (topic = '{prefix}.accounts', partitions = 4)
    """,
    "notes": """
        CREATE TABLE notes (id BIGINT, text VARCHAR, PRIMARY KEY (id))
        WITH (topic = '{prefix}.notes', partitions = 4)
    """,
}
KEYS = 40
CLIENTS = 50
LAST = "the last note"
WORKERS = ("store-0", "store-1")


async def test_no_request_fails_while_all_workers_are_rolled(tmp_path: Path, servers: Servers) -> None:
    with running_system(tmp_path, TABLES, **servers, store_workers=len(WORKERS)) as system:
        async with await AsyncClient.connect(system.settings) as client:
            topic = f"{system.settings.application}.accounts"
            written = [
                await client.publish(topic, {"id": f"key-{number}", "balance": number}, key=f"key-{number}")
                for number in range(KEYS)
            ]
            whole = await client.query(
                "SELECT count(*), sum(balance) FROM accounts", at_least=written, deadline_ms=60_000
            )
            assert whole.rows == [(KEYS, sum(range(KEYS)))]

            rolled = asyncio.Event()
            asking = [asyncio.create_task(ask(client, number, rolled)) for number in range(CLIENTS)]
            following = [asyncio.create_task(follow(client, key)) for key in ("1", "2", "3")]
            writing = asyncio.create_task(write_notes(client, f"{system.settings.application}.notes", rolled))
            await asyncio.to_thread(roll, system)
            rolled.set()
            answered = await asyncio.gather(*asking)
            assert min(answered) >= 2, "each client was answered before and after"
            await writing
            for key, rows in zip(("1", "2", "3"), await asyncio.gather(*following), strict=True):
                plain = await client.query("SELECT id, text FROM notes", key=key, deadline_ms=60_000)
                assert sorted(rows) == sorted(plain.rows), "a subscription went on where its partition went"


def roll(system: System) -> None:
    """Stops and starts one worker after the other, each as an update would."""
    for worker in WORKERS:
        system.stack.stop_process(worker)
        system.stack.start_process(worker)
        system.stack.wait_until_ready(worker)


async def ask(client: AsyncClient, number: int, rolled: asyncio.Event) -> int:
    """Asks until all are rolled, and once more; every other client for the whole state."""
    answered, is_last = 0, False
    while not is_last:
        is_last = rolled.is_set()
        if number % 2:
            answer = await client.query("SELECT count(*), sum(balance) FROM accounts", deadline_ms=60_000)
            assert answer.rows == [(KEYS, sum(range(KEYS)))]
        else:
            key = f"key-{number % KEYS}"
            answer = await client.query(
                "SELECT balance FROM accounts WHERE id = $1", [key], key=key, deadline_ms=60_000
            )
            assert answer.rows == [(number % KEYS,)]
        answered += 1
        await asyncio.sleep(0.05)
    return answered


async def write_notes(client: AsyncClient, topic: str, rolled: asyncio.Event) -> None:
    """Changes three rows again and again until all workers are rolled; then writes the last state of each."""
    number = 0
    while not rolled.is_set():
        number += 1
        await client.publish(topic, {"id": number % 3 + 1, "text": f"note {number}"}, key=str(number % 3 + 1))
        await asyncio.sleep(0.02)
    for key in ("1", "2", "3"):
        await client.publish(topic, {"id": int(key), "text": LAST}, key=key)


async def follow(client: AsyncClient, key: str) -> list[tuple[Any, ...]]:
    """Keeps rows by what a subscription says is added and removed, until the last state is there."""
    rows: Counter[tuple[Any, ...]] = Counter()
    subscription = client.subscribe(
        "SELECT id, text FROM notes", key=key, every_ms=100, lease_ms=6_000, deadline_ms=60_000
    )
    async with aclosing(subscription) as changes:
        async for change in changes:
            rows = rows + Counter(change.added) - Counter(change.removed)
            assert rows == Counter(change.answer.rows)
            if (int(key), LAST) in rows and all(text == LAST for _, text in rows):
                break
    return list(rows.elements())
