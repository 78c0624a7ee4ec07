"""A rolling restart of all store workers while 50 clients ask: nobody sees an error (invariant 9, D11)."""

from __future__ import annotations

import asyncio
from pathlib import Path

from streams.client import AsyncClient
from tests.conftest import Servers
from tests.system import System, running_system

TABLES = {
    "accounts": """
        CREATE TABLE accounts (id VARCHAR, balance BIGINT, PRIMARY KEY (id))
        WITH (topic = '{prefix}.accounts', partitions = 4)
    """,
}
KEYS = 40
CLIENTS = 50
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
            await asyncio.to_thread(roll, system)
            rolled.set()
            answered = await asyncio.gather(*asking)
            assert min(answered) >= 2, "each client was answered before and after"


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
