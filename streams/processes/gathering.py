"""The whole state from one request: the worker that received it asks the others, and puts the answer together.

A part is an ordinary request for one partition, with a statement that the split made; it goes to that partition of the
query topic, and so to its owner, whoever that is by then. Its reply comes on the topic of parts, in Arrow. Every
partition contributes once: its owner by a part, or this worker from its own, in one transaction over all of them. A
part that is refused refuses the whole, in the owner's words and as retriable as it was.

Called by `answering`; the store worker feeds `PartExchange.deliver` with what it reads of the topic of parts.
"""

from __future__ import annotations

import asyncio
import logging
import uuid
from collections.abc import Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import pyarrow as pa

from schemas.messages import (
    AnswerFormat,
    AnswerLimits,
    ArrowAnswer,
    QueryRequest,
    Refusal,
    RefusalCode,
    RequestError,
    read_reply,
    serialise_cancellation,
    serialise_request,
)
from streams.adapters.duckdb_merge import Plan, too_much_to_gather
from streams.adapters.duckdb_queries import AnswerBody
from streams.batches import Headers, RecordBatch
from streams.config import Settings
from streams.errors import QueryRefusedError
from streams.limits import QUERY_GATHERED_BYTES_MAX, QUERY_PART_BYTES_MAX

log = logging.getLogger(__name__)

#: An owner gets what is left of the budget less this part of it, so that its refusal is back in time.
_WAY_BACK_FRACTION = 0.1
_WAY_BACK_MS_MAX = 50


#: The contribution of the partition that the request names. Raises QueryRefusedError.
AskForPart = Callable[[QueryRequest], Coroutine[Any, Any, ArrowAnswer]]


class Sending(Protocol):
    """How a record leaves; `KafkaReplies.send` is the implementation."""

    async def __call__(
        self, topic: str, *, value: bytes, key: bytes | None, partition: int | None, headers: Headers
    ) -> None:
        """Never raises: what does not arrive is covered by the deadline."""
        ...


class PartExchange:
    """Asks the owners of partitions; replies find their question by its id. For one event loop."""

    def __init__(self, send: Sending, settings: Settings, *, reply_partition: int) -> None:
        self._send = send
        self._settings = settings
        self._reply_partition = reply_partition
        self._waiting: dict[bytes, asyncio.Future[tuple[bytes, Headers]]] = {}
        self._cancelling: set[asyncio.Future[None]] = set()

    async def ask(self, request: QueryRequest) -> ArrowAnswer:
        """The contribution of `request.partition`; the caller bounds the wait. Raises QueryRefusedError."""
        asked = request.model_copy(
            update={
                "id": uuid.uuid4().hex,
                "reply_to": self._settings.part_topic,
                "reply_partition": self._reply_partition,
            }
        )
        key = asked.id.encode()
        self._waiting[key] = asyncio.get_running_loop().create_future()
        try:
            await self._send_to_owner(asked, serialise_request(asked))
            value, headers = await self._waiting[key]
        except asyncio.CancelledError:
            self._cancel(asked)
            raise
        finally:
            del self._waiting[key]
        try:
            reply = read_reply(value, headers)
        except RequestError as error:
            reply = Refusal(id=asked.id, code=RefusalCode.INTERNAL, message=str(error))
        if isinstance(reply, ArrowAnswer):
            return reply
        assert isinstance(reply, Refusal), "a part is asked for in Arrow"
        raise QueryRefusedError.of(reply, f"partition {asked.partition}: ")

    def _cancel(self, asked: QueryRequest) -> None:
        """Nobody waits for this part any more: its owner need not go on."""
        sending = asyncio.create_task(self._send_to_owner(asked, serialise_cancellation(asked)))
        self._cancelling.add(sending)
        sending.add_done_callback(self._cancelling.discard)

    async def _send_to_owner(self, asked: QueryRequest, value: bytes) -> None:
        topic = self._settings.query_topic
        await self._send(topic, value=value, key=None, partition=asked.partition, headers=())

    def deliver(self, batch: RecordBatch) -> None:
        """Hands replies to those who wait for them. Others' on the same partition are recognised by their key."""
        for index, (key, value) in enumerate(zip(batch.keys, batch.values, strict=True)):
            future = self._waiting.get(key or b"")
            if future is not None and not future.done():
                future.set_result((value or b"", batch.headers.get(index, ())))


@dataclass(frozen=True)
class Gathered:
    """What all partitions contributed."""

    #: Of each part of the plan, one table per owner.
    contributions: list[list[pa.Table]]
    offsets: dict[str, dict[str, int]]
    epochs: dict[int, int]


async def gather(
    plan: Plan,
    request: QueryRequest,
    *,
    own: Mapping[int, int],
    partitions_total: int,
    deadline: float,
    ask: AskForPart,
    run: Callable[[QueryRequest], Coroutine[Any, Any, AnswerBody]],
) -> Gathered:
    """Asks `ask` for the partitions of others, and `run` for those of `own` (partition -> epoch).

    `deadline` is in event loop time; the caller enforces it. Raises the first QueryRefusedError.
    """
    others = [partition for partition in range(partitions_total) if partition not in own]
    asked: list[asyncio.Task[ArrowAnswer]] = []
    ran: list[asyncio.Task[AnswerBody]] = []
    parts = [
        QueryRequest(
            id=request.id,
            sql=sql,
            params=params,
            caller=request.caller,
            format=AnswerFormat.ARROW,
            limits=AnswerLimits(bytes=QUERY_PART_BYTES_MAX),
        )
        for sql, params in plan.questions()
    ]
    try:
        async with asyncio.TaskGroup() as group:
            for part in parts:
                asked += [group.create_task(ask(_part_of(part, partition, request, deadline))) for partition in others]
                ran.append(group.create_task(run(part)))
    except* QueryRefusedError as refusals:
        raise _as_one(refusals, plan) from None
    return _together(parts, others, [task.result() for task in asked], [task.result() for task in ran], plan, own)


def _part_of(part: QueryRequest, partition: int, whole: QueryRequest, deadline: float) -> QueryRequest:
    """The part as one partition is asked for it."""
    remaining_ms = (deadline - asyncio.get_running_loop().time()) * 1000
    budget_ms = int(remaining_ms - min(remaining_ms * _WAY_BACK_FRACTION, _WAY_BACK_MS_MAX))
    at_least = {
        topic: {partition: positions[partition]}
        for topic, positions in whole.at_least.items()
        if partition in positions
    }
    return part.model_copy(update={"partition": partition, "deadline_ms": max(1, budget_ms), "at_least": at_least})


def _together(
    parts: Sequence[QueryRequest],
    others: Sequence[int],
    asked: Sequence[ArrowAnswer],
    ran: Sequence[AnswerBody],
    plan: Plan,
    own: Mapping[int, int],
) -> Gathered:
    epochs = dict(own)
    offsets: dict[str, dict[str, int]] = {}
    contributions: list[list[pa.Table]] = []
    for number in range(len(parts)):
        answers = asked[number * len(others) : (number + 1) * len(others)]
        schema, batches = ran[number].arrow or (pa.schema([]), [])
        contributions.append([pa.Table.from_batches(batches, schema), *(answer.table for answer in answers)])
        for stated in (ran[number].offsets, *(answer.head.offsets for answer in answers)):
            for topic, positions in stated.items():
                offsets.setdefault(topic, {}).update(positions)
        for answer in answers:
            epochs |= {int(partition): epoch for partition, epoch in answer.head.epoch.items()}
    if sum(table.nbytes for tables in contributions for table in tables) > QUERY_GATHERED_BYTES_MAX:
        raise too_much_to_gather(plan, QUERY_GATHERED_BYTES_MAX)
    in_order = {
        topic: dict(sorted(positions.items(), key=lambda item: int(item[0]))) for topic, positions in offsets.items()
    }
    return Gathered(contributions, in_order, dict(sorted(epochs.items())))


def _as_one(refusals: ExceptionGroup[QueryRefusedError], plan: Plan) -> QueryRefusedError:
    """Of several refusals, one that asking again does not mend, if there is one."""
    errors = [error for error in refusals.exceptions if isinstance(error, QueryRefusedError)]
    worst = min(errors, key=lambda error: error.retriable)
    if worst.code == RefusalCode.TOO_MANY_BYTES:
        return too_much_to_gather(plan, QUERY_PART_BYTES_MAX)
    return worst
