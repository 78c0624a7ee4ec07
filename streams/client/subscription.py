"""A subscription as its caller sees it: the rows as they are now, again whenever they have changed.

The worker's lease is renewed while the caller waits for the next change; one who does not come for more loses it, and
subscribes anew by coming. So does the client for the caller whenever a push was lost, the partition moved, or the
worker fell silent; the rows that it gets then are compared with those that it had, and no change is missed. Used by
both clients.
"""

from __future__ import annotations

import asyncio
import math
import random
import uuid
from collections.abc import AsyncGenerator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol

from schemas.deltas import Delta, DeltaError, split
from schemas.messages import Push, PushKind, QueryRequest, Refusal, RefusalCode, RequestError, read_push
from streams.client.answer import Answer
from streams.errors import QueryRefusedError, RequestTimeoutError

_PAUSE_SECONDS = 0.1
#: Renewals in the time of a lease: one that is lost does not end it.
_RENEWALS_PER_LEASE = 3
#: Pushes that wait for a caller who does not come; each has at most the bytes of an answer.
_WAITING_PUSHES_MAX = 100


@dataclass(frozen=True)
class Change:
    """What a subscription gives: `answer` holds all rows as they are now. The first change has them all in `added`.

    A row that has changed is in `removed` as it was and in `added` as it is."""

    answer: Answer
    added: Sequence[tuple[Any, ...]]
    removed: Sequence[tuple[Any, ...]]


class Pushes:
    """What came for a subscription and is not taken yet."""

    def __init__(self) -> None:
        self._waiting: asyncio.Queue[bytes | RequestTimeoutError] = asyncio.Queue()

    def put(self, value: bytes) -> None:
        """Of too many that wait none is kept, and the subscription begins anew."""
        if self._waiting.qsize() >= _WAITING_PUSHES_MAX:
            while not self._waiting.empty():
                self._waiting.get_nowait()
            value = b""  # no push: as if one had been lost
        self._waiting.put_nowait(value)

    def fail(self, error: RequestTimeoutError) -> None:
        """Ends the subscription with this error, once what waits is taken."""
        self._waiting.put_nowait(error)

    async def next(self, *, until: float) -> Push | None:
        """The next push; None if there is none in time. Raises QueryRefusedError for the end of the subscription, or
        what it failed with."""
        if self._waiting.empty():
            try:
                async with asyncio.timeout_at(until):
                    value = await self._waiting.get()
            except TimeoutError:
                return None
        else:
            value = self._waiting.get_nowait()
        if not isinstance(value, bytes):
            raise value
        try:
            reply = read_push(value)
        except RequestError:
            raise _LostError from None
        if isinstance(reply, Refusal):
            raise QueryRefusedError.of(reply)
        return reply


class Line(Protocol):
    """How requests leave and pushes come; AsyncClient has one."""

    def pushes_of(self, request: QueryRequest) -> AbstractContextManager[Pushes]:
        """What comes under the request's id, while the context lasts; then the subscription is cancelled. Raises
        RequestTimeoutError if the line is closed."""
        ...

    async def send(self, request: QueryRequest) -> None:
        """Whether it arrives is seen by the pushes that follow."""
        ...


class _LostError(Exception):
    """A subscription that has to begin anew: a push is missing, or nothing comes any more."""


async def changes(
    line: Line, template: QueryRequest, *, every_ms: int, lease_ms: int, deadline_ms: int
) -> AsyncGenerator[Change, None]:
    """Without end. Raises QueryRefusedError for what subscribing anew does not mend within the deadline, and
    RequestTimeoutError when no worker is heard of for that long."""
    held = _Held()
    silence_seconds_max = (every_ms + deadline_ms) / 1000
    renewal_seconds = lease_ms / 1000 / _RENEWALS_PER_LEASE
    deadline = _now() + deadline_ms / 1000
    while True:
        asked = template.model_copy(update={"id": uuid.uuid4().hex})
        refused: QueryRefusedError | None = None
        try:
            with line.pushes_of(asked) as pushes:
                await line.send(asked)
                renewal, expected = _now() + renewal_seconds, deadline
                while True:
                    push = await pushes.next(until=min(renewal, expected))
                    if push is not None:
                        change = held.changed_by(push)
                        deadline = expected = math.inf
                        if change is not None:
                            yield change
                    elif _now() >= expected:
                        raise _LostError
                    else:  # the worker answers a renewal with a push
                        await line.send(asked)
                        renewal = _now() + renewal_seconds
                        expected = min(expected, _now() + silence_seconds_max)
        except QueryRefusedError as error:
            # A request that waited in the topic while its partition had no owner is too late; the next one is not.
            if not (error.retriable or error.code == RefusalCode.DEADLINE_EXCEEDED):
                raise
            refused = error
        except _LostError:
            pass
        deadline = min(deadline, _now() + deadline_ms / 1000)
        pause = _PAUSE_SECONDS * random.uniform(0.5, 1)  # noqa: S311
        if refused is not None and refused.retry_after_ms is not None:
            pause = max(pause, refused.retry_after_ms / 1000)
        if _now() + pause >= deadline:
            raise refused or _silent()
        await asyncio.sleep(pause)


class _Held:
    """The rows that the caller has."""

    def __init__(self) -> None:
        self._rows: list[tuple[Any, ...]] = []
        self._newest: Push | None = None

    def changed_by(self, push: Push) -> Change | None:
        """What the caller is told; None for a push without a change. Raises _LostError."""
        old, newest = self._rows, self._newest
        incoming = [tuple(row) for row in push.rows]
        if push.kind is PushKind.FULL:
            rows = incoming
            # Not the rows, which may hold dictionaries; to these True is another value than 1.
            keys, new_keys = [repr(row) for row in old], [repr(row) for row in rows]
            is_change = keys != new_keys
            added = [rows[place] for place in split(new_keys, keys)[1]]
            removed = [old[place] for place in split(keys, new_keys)[1]]
        else:
            if newest is None or not _follows(newest, push):
                raise _LostError
            try:
                rows = Delta(tuple(push.removed), tuple(push.inserted)).applied(old, incoming)
            except DeltaError:
                raise _LostError from None
            added, removed = incoming, [old[place] for place in push.removed]
            is_change = bool(added or removed)
        self._rows, self._newest = rows, push
        if newest is not None and not is_change:
            return None
        return Change(Answer.of(push.model_copy(update={"rows": rows})), added, removed)


def _follows(older: Push, newer: Push) -> bool:
    """Whether they are of one subscription, and nothing was lost between them."""
    return (newer.id, newer.epoch, newer.sequence) == (older.id, older.epoch, older.sequence + 1)


def _silent() -> RequestTimeoutError:
    return RequestTimeoutError(
        "no worker kept the subscription up to date before the deadline",
        hint="check that a store worker runs (`pintail worker store`), or give a longer deadline",
    )


def _now() -> float:
    return asyncio.get_running_loop().time()
