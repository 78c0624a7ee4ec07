"""Several workers in one process, each with the partitions of a store of its own, and a query service that asks the
others without Kafka. For tests of what they answer together."""

from __future__ import annotations

import time
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import orjson

from schemas.catalog import Catalog
from schemas.messages import Answer, ArrowAnswer, QueryRequest, Refusal, read_reply, serialise_request
from streams.adapters.duckdb_store import DuckDBStore
from streams.config import Settings
from streams.errors import QueryRefusedError
from streams.processes.answering import IncomingRequest, QueryService, Reply


class FleetState:
    """ServingState of one worker."""

    def __init__(self, partitions: Collection[int], partitions_total: int) -> None:
        self.partitions_total = partitions_total
        self.epochs = dict.fromkeys(partitions, 1)

    def serving(self) -> Mapping[int, int]:
        return dict(self.epochs)

    async def wait_until_applied(self, partition: int, topic: str, offset: int) -> None:
        del partition, topic, offset


def stores_of(folder: Path, catalog: Catalog, *, workers: int, partitions: int) -> list[DuckDBStore]:
    """The stores of a fleet, empty, all their partitions served."""
    stores = [DuckDBStore(folder / str(worker), catalog, threads=1) for worker in range(workers)]
    for partition in range(partitions):
        stores[partition % workers].open_partition(partition)
    for worker, store in enumerate(stores):
        store.publish_scopes(range(worker, partitions, workers))
    return stores


class Fleet:
    """Worker n owns every partition p with p = n (mod workers)."""

    def __init__(self, stores: Sequence[DuckDBStore], catalog: Catalog, *, partitions: int) -> None:
        self.settings = Settings()
        self.asked: list[QueryRequest] = []
        self.stores = stores
        self.states = [FleetState(range(worker, partitions, len(stores)), partitions) for worker in range(len(stores))]
        self.services = [
            QueryService(store, catalog, state, self.settings, ask=self._ask)
            for store, state in zip(stores, self.states, strict=True)
        ]

    async def close(self) -> None:
        for service in self.services:
            await service.close()

    async def ask(self, sql: str, *, partition: int = 0, **fields: Any) -> Answer | ArrowAnswer | Refusal:
        """Asks the owner of `partition`."""
        request = {"id": "whole", "sql": sql, "reply_to": self.settings.reply_topic, "deadline_ms": 60_000, **fields}
        return await self.reply(orjson.dumps(request), partition)

    async def _ask(self, request: QueryRequest) -> ArrowAnswer:
        self.asked.append(request)
        assert request.partition is not None
        asked = request.model_copy(update={"reply_to": self.settings.part_topic})
        reply = await self.reply(serialise_request(asked), request.partition)
        if isinstance(reply, Refusal):
            raise QueryRefusedError(reply.message, code=reply.code, hint=reply.hint, retriable=reply.retriable)
        assert isinstance(reply, ArrowAnswer)
        return reply

    async def reply(self, value: bytes, partition: int) -> Answer | ArrowAnswer | Refusal:
        service = self.services[partition % len(self.services)]
        reply = await service.answer(IncomingRequest(value, None, (), partition, 0, int(time.time() * 1000)))
        assert isinstance(reply, Reply)
        return read_reply(reply.value, reply.headers)
