"""When events became visible to a query, seen by asking all the time.

A probe is a query over all tables that returns no row; its answer says which offsets it reflects. Probes start on a
schedule of their own, whether or not earlier ones are answered. An event counts as visible when the first answer that
reflects it is in the asker's hands: an upper bound, which includes the query's way there and back.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple

from schemas.table import TableDefinition
from streams.client import AsyncClient
from streams.errors import QueryRefusedError, RequestTimeoutError

PROBE_SECONDS = 0.02
_PROBE_DEADLINE_MS = 20_000
_IN_FLIGHT_MAX = 50


class Seen(NamedTuple):
    """An answer: when it was there, and topic -> partition -> next_offset that it reflects."""

    at: float
    offsets: Mapping[str, Mapping[int, int]]


class VisibilityProbe:
    """Asks from `run` on, until it is told that it is enough."""

    def __init__(self, client: AsyncClient, tables: Sequence[TableDefinition]) -> None:
        self._client = client
        self._sql = f"SELECT 1 FROM {', '.join(table.name for table in tables)} WHERE false"
        self.seen: list[Seen] = []
        self.refused = 0

    async def run(self, is_enough: Callable[[Mapping[str, Mapping[int, int]]], bool], *, seconds_max: float) -> None:
        """Returns once `is_enough` says so of the newest offsets, or when the time is up."""
        begun, asking = time.monotonic(), set[asyncio.Task[None]]()
        next_at = begun
        while time.monotonic() - begun < seconds_max:
            if self.seen and is_enough(self.seen[-1].offsets):
                break
            if len(asking) < _IN_FLIGHT_MAX:
                task = asyncio.create_task(self._ask())
                asking.add(task)
                task.add_done_callback(asking.discard)
            next_at += PROBE_SECONDS
            await asyncio.sleep(max(0.0, next_at - time.monotonic()))
        await asyncio.gather(*asking)

    async def _ask(self) -> None:
        try:
            answer = await self._client.query(self._sql, deadline_ms=_PROBE_DEADLINE_MS)
        except (QueryRefusedError, RequestTimeoutError):
            self.refused += 1
        else:
            self.seen.append(Seen(time.monotonic(), answer.offsets))


def visible_at(
    seen: Sequence[Seen], topic: str, partition: int, arrivals: Iterable[tuple[int, int]]
) -> list[tuple[int, float]]:
    """(number of the event, when it was visible) of a partition's events (offset, number), in the order of offsets.

    Events that no answer reflects are left out.
    """
    visible: list[tuple[int, float]] = []
    answers = iter(sorted(seen, key=lambda each: each.at))
    reflected, at = 0, 0.0
    for offset, number in arrivals:
        while reflected <= offset:
            answer = next(answers, None)
            if answer is None:
                return visible
            reflected, at = answer.offsets.get(topic, {}).get(partition, 0), answer.at
        visible.append((number, at))
    return visible
