"""When events became visible to a query, seen by asking all the time.

A probe is a query over all tables that returns no row; its answer says which offsets it reflects. Probes start
every 20 ms, or less often where they would cost the worker more than a part of a core: over many tables or columns, to
plan one takes DuckDB as long as to store hundreds of events. An event counts as visible when the first answer that
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
_IN_FLIGHT_MAX = 4
#: A probe starts no sooner than this many times its cost after the one before it.
_COST_SHARE = 5


class Seen(NamedTuple):
    """An answer: when it was there, and topic -> partition -> next_offset that it reflects."""

    at: float
    offsets: Mapping[str, Mapping[int, int]]
    #: What the query itself took, there and back.
    round_trip_ms: float = 0.0
    #: Of this, in the worker's DuckDB.
    executed_ms: float = 0.0


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
            next_at = max(next_at + self._interval_seconds(), time.monotonic())
            await asyncio.sleep(max(0.0, next_at - time.monotonic()))
        await asyncio.gather(*asking)

    def _interval_seconds(self) -> float:
        cost = self.seen[-1].executed_ms / 1000 if self.seen else 0.0
        return max(PROBE_SECONDS, _COST_SHARE * cost)

    async def _ask(self) -> None:
        asked = time.monotonic()
        try:
            answer = await self._client.query(self._sql, deadline_ms=_PROBE_DEADLINE_MS)
        except (QueryRefusedError, RequestTimeoutError):
            self.refused += 1
        else:
            now = time.monotonic()
            self.seen.append(Seen(now, answer.offsets, (now - asked) * 1000, answer.timing.executed_ms))


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
