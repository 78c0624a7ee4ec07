"""Subscriptions: a query whose answer is pushed anew when rows change, as long as its caller renews the lease.

Each push is the outcome of an ordinary request: the query is answered again once a position that the last answer
reflects has moved, or the lease was renewed, and `every_ms` has passed. So it takes its turn in the same queue, under
the same limits and checks, as if its caller asked again; only what changed is sent. A subscription lives on the worker
that began it and ends there with one refusal that says why. Nothing of it is stored: the caller's next renewal, which
is the same request once more, begins it where the partition is by then.

The query agent hands in each request; what is no subscription goes on to `QueryService.answer`.
"""

from __future__ import annotations

import asyncio
import logging
import sys
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import orjson

from schemas.deltas import Delta
from schemas.messages import (
    AnswerHead,
    PushKind,
    QueryRequest,
    RefusalCode,
    RequestEnvelope,
    RequestError,
    read_envelope,
)
from streams import telemetry
from streams.adapters.duckdb_refusals import not_serving
from streams.config import Settings
from streams.errors import QueryRefusedError, StoreError
from streams.finishing import in_thread
from streams.limits import (
    SUBSCRIPTION_EVERY_MS_DEFAULT,
    SUBSCRIPTION_LEASE_MS_DEFAULT,
    SUBSCRIPTION_LEASE_MS_MAX,
)
from streams.ports import DeadLetter, ServingState
from streams.processes.answering import Asker, IncomingRequest, Reply, caller_of, failed, refusal_reply
from streams.processes.gathering import Sending

log = logging.getLogger(__name__)

Outcome = Reply | DeadLetter | None


@dataclass
class _Subscription:
    """One that is kept up to date."""

    asker: Asker
    envelope: RequestEnvelope
    incoming: IncomingRequest
    caller: str
    every_seconds: float
    #: Event loop time at which the lease ends.
    expires: float
    #: Whether the order of the rows may mean something.
    ordered: bool
    renewed: asyncio.Event = field(default_factory=asyncio.Event)
    #: What the caller holds: the rows, each as its JSON.
    rows: Sequence[bytes] = ()
    #: The memory that they take.
    rows_bytes: int = 0
    #: Columns and epoch of the answer that they are of.
    shape: Any = None
    #: topic -> partition -> next_offset of the newest answer.
    offsets: dict[str, dict[str, int]] = field(default_factory=dict)
    sequence: int = -1
    #: Event loop time of the newest answer.
    looked: float = 0.0
    task: asyncio.Task[None] | None = None
    #: Why it is ended from outside.
    ended: QueryRefusedError | None = None


class Subscriptions:
    """All of one worker. For one event loop."""

    def __init__(
        self,
        answer: Callable[[IncomingRequest], Awaitable[Outcome]],
        state: ServingState,
        settings: Settings,
        *,
        send: Sending,
        now_ms: Callable[[], float] = lambda: time.time() * 1000,
    ) -> None:
        self._answer = answer
        self._state = state
        self._settings = settings
        self._send = send
        self._now_ms = now_ms
        self._kept: dict[Asker, _Subscription] = {}
        self._tasks: set[asyncio.Task[None]] = set()

    async def answer(self, incoming: IncomingRequest) -> Outcome:
        """The one outcome of a request; None for a record that renews or cancels, and for one that subscribes, once its
        first push is sent."""
        envelope = read_envelope(incoming.value, incoming.headers)
        if envelope.cancels is not None:
            subscription = self._kept.get((envelope.reply_to, envelope.reply_partition, envelope.cancels))
            if subscription is not None:
                await self._end(subscription, _cancelled())
                if subscription.task is not None:
                    return None
        if not envelope.subscribes:
            return await self._answer(incoming)
        try:
            request = envelope.request()
        except RequestError:
            return await self._answer(incoming)  # which says what is wrong
        asker = (envelope.reply_to, envelope.reply_partition, envelope.id)
        if (known := self._kept.get(asker)) is not None:
            known.expires = _loop_time() + _lease_seconds(request)
            known.renewed.set()
            return None
        try:
            return await self._begin(asker, envelope, request, incoming)
        except QueryRefusedError as refused:
            return refusal_reply(envelope, refused)
        except Exception:  # as in QueryService: the asker is told (invariants 9 and 10)
            log.exception("subscription %s failed", envelope.id)
            return refusal_reply(envelope, failed())

    async def close(self) -> None:
        """Ends all, and waits until each has said so; the caller has stopped handing in requests."""
        await asyncio.gather(
            *(self._end(subscription, not_serving("the worker stops")) for subscription in self._kept.values())
        )
        await asyncio.gather(*self._tasks, return_exceptions=True)

    # -- the life of one ---------------------------------------------------------------------------------------------

    async def _begin(
        self, asker: Asker, envelope: RequestEnvelope, request: QueryRequest, incoming: IncomingRequest
    ) -> Outcome:
        caller = caller_of(envelope, request)
        self._check_room(caller)
        every_ms = max(request.every_ms or SUBSCRIPTION_EVERY_MS_DEFAULT, self._settings.subscription_every_ms_min)
        subscription = self._kept[asker] = _Subscription(
            asker,
            envelope,
            incoming,
            caller,
            every_seconds=every_ms / 1000,
            expires=_loop_time() + _lease_seconds(request),
            ordered="order" in request.sql.lower(),  # a statement that sorts has the word
        )
        try:
            outcome = await self._answer(incoming)
            if not isinstance(outcome, Reply) or not outcome.is_answer:
                return outcome
            push = await self._push_of(subscription, outcome)
            assert push is not None, "the first one"
            await self._deliver(push)
            if subscription.ended is not None:
                raise subscription.ended
            subscription.task = asyncio.create_task(self._keep(subscription))
            self._tasks.add(subscription.task)
            subscription.task.add_done_callback(self._tasks.discard)
        finally:
            if subscription.task is None:
                del self._kept[asker]
        telemetry.SUBSCRIPTIONS.inc()
        return None

    async def _keep(self, subscription: _Subscription) -> None:
        """Pushes until it ends by itself; then says why."""
        try:
            final = await self._push_on(subscription)
        except QueryRefusedError as refused:
            final = refusal_reply(subscription.envelope, refused)
        except Exception:  # the boundary of one subscription (invariant 10)
            log.exception("subscription %s failed", subscription.envelope.id)
            final = refusal_reply(subscription.envelope, failed())
        self._forget(subscription)  # first, so that a renewal that comes meanwhile begins it anew
        await self._deliver(final)

    async def _end(self, subscription: _Subscription, why: QueryRefusedError) -> None:
        """Ends it from outside, and says why; one whose first push is not sent yet ends after it, and one that ended
        by itself has said why."""
        subscription.ended = why
        if self._kept.get(subscription.asker) is not subscription:
            return
        if (task := subscription.task) is not None:
            self._forget(subscription)
            task.cancel()
            await asyncio.wait([task])
            await self._deliver(refusal_reply(subscription.envelope, why))

    def _forget(self, subscription: _Subscription) -> None:
        del self._kept[subscription.asker]
        telemetry.SUBSCRIPTIONS.dec()

    async def _push_on(self, subscription: _Subscription) -> Reply:
        """Returns the refusal of an answer; raises QueryRefusedError for every other end."""
        while True:
            await self._until_due(subscription)
            was_renewed = subscription.renewed.is_set()
            subscription.renewed.clear()
            outcome = await self._answer(replace(subscription.incoming, timestamp_ms=int(self._now_ms())))
            assert isinstance(outcome, Reply), "its request was answered before"
            if not outcome.is_answer:
                return outcome
            if (push := await self._push_of(subscription, outcome, even_unchanged=was_renewed)) is not None:
                await self._deliver(push)

    async def _until_due(self, subscription: _Subscription) -> None:
        """Returns when it is time to look again. Raises QueryRefusedError when it is over."""
        moves = [
            asyncio.create_task(self._state.wait_until_applied(int(partition), topic, next_offset))
            for topic, positions in subscription.offsets.items()
            for partition, next_offset in positions.items()
        ]
        renewed = asyncio.create_task(subscription.renewed.wait())
        try:
            seconds = max(0.0, subscription.expires - _loop_time())
            done, _ = await asyncio.wait([*moves, renewed], timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
            if not done:
                raise _lease_expired()
            for move in done.intersection(moves):
                move.result()
        except StoreError as error:
            raise not_serving(error.message) from error
        finally:
            for task in (*moves, renewed):
                task.cancel()
            await asyncio.gather(*moves, renewed, return_exceptions=True)
        await asyncio.sleep(subscription.looked + subscription.every_seconds - _loop_time())
        if subscription.expires <= _loop_time():
            raise _lease_expired()

    async def _push_of(
        self, subscription: _Subscription, answer: Reply, *, even_unchanged: bool = True
    ) -> Reply | None:
        """What tells the caller of this answer; None if nothing changed. Raises QueryRefusedError."""
        head, new = answer.head, answer.rows
        assert head is not None, "it is for one who subscribes"
        subscription.offsets, subscription.looked = head.offsets, _loop_time()
        shape = head.columns, head.epoch
        old = subscription.rows if shape == subscription.shape else None
        step = await in_thread(_step, head, old, new, subscription.ordered, subscription.sequence + 1)
        if not (step.is_change or even_unchanged):
            return None
        self._check_bytes(subscription, step.rows_bytes)
        subscription.shape, subscription.rows, subscription.rows_bytes = shape, step.rows, step.rows_bytes
        subscription.sequence += 1
        telemetry.PUSHES.labels(step.kind).inc()
        return replace(answer, value=step.value)

    async def _deliver(self, reply: Reply) -> None:
        for value, headers in reply.records():
            await self._send(reply.topic, value=value, key=reply.key, partition=reply.partition, headers=headers)

    def _check_room(self, caller: str) -> None:
        """Raises QueryRefusedError for one subscription too many."""
        of_caller = sum(each.caller == caller for each in self._kept.values())
        if of_caller >= self._settings.subscriptions_per_caller_max:
            raise _no_room(f"this caller has {of_caller} subscriptions on this worker", "end some of them")
        if len(self._kept) >= self._settings.subscriptions_max:
            raise _no_room(f"this worker has {len(self._kept)} subscriptions", "ask again later, or query at intervals")

    def _check_bytes(self, subscription: _Subscription, rows_bytes: int) -> None:
        """Raises QueryRefusedError if there is no room for the rows that a subscription has from now on."""
        others_bytes = sum(each.rows_bytes for each in self._kept.values()) - subscription.rows_bytes
        if others_bytes + rows_bytes > self._settings.subscriptions_bytes_max:
            raise _no_room(
                f"the rows of this subscription take {rows_bytes} bytes, those of the others on this worker"
                f" {others_bytes}, and all have {self._settings.subscriptions_bytes_max}",
                "subscribe to fewer rows, ask again later, or query at intervals",
            )


@dataclass(frozen=True)
class _Step:
    """From the rows that the caller holds to those of an answer."""

    kind: PushKind
    value: bytes
    #: What the caller holds then, and the memory that it takes.
    rows: Sequence[bytes]
    rows_bytes: int
    is_change: bool


def _step(head: AnswerHead, old: Sequence[bytes] | None, new: Sequence[bytes], ordered: bool, sequence: int) -> _Step:
    """The smaller of a whole answer and a delta. `old` is None if there can be none. On a thread: with many rows it
    takes milliseconds, in which the loop has others to answer."""
    rows_bytes = sum(map(sys.getsizeof, new))
    whole = _push(head, new, sequence, PushKind.FULL, Delta((), ()))
    change = None if old is None else Delta.between(old, new, ordered=ordered)
    if change is None:
        return _Step(PushKind.FULL, whole, new, rows_bytes, is_change=True)
    delta, rows = change
    small = _push(head, [rows[place] for place in delta.inserted], sequence, PushKind.DELTA, delta)
    is_change = bool(delta.removed or delta.inserted)
    if len(small) < len(whole):
        return _Step(PushKind.DELTA, small, rows, rows_bytes, is_change)
    return _Step(PushKind.FULL, whole, new, rows_bytes, is_change)


def _push(head: AnswerHead, rows: Sequence[bytes], sequence: int, kind: PushKind, delta: Delta) -> bytes:
    """`rows` are the encoder's and stay as they are: a parser would round numbers."""
    return orjson.dumps(
        {
            **head.model_dump(mode="json"),
            "rows": [orjson.Fragment(row) for row in rows],
            "sequence": sequence,
            "kind": kind,
            "removed": delta.removed,
            "inserted": delta.inserted,
        }
    )


def _lease_seconds(request: QueryRequest) -> float:
    return min(request.lease_ms or SUBSCRIPTION_LEASE_MS_DEFAULT, SUBSCRIPTION_LEASE_MS_MAX) / 1000


def _lease_expired() -> QueryRefusedError:
    return QueryRefusedError(
        "the subscription was not renewed in time",
        code=RefusalCode.LEASE_EXPIRED,
        hint="send its request again, under the same id, within lease_ms; or subscribe anew",
        retriable=True,
    )


def _cancelled() -> QueryRefusedError:
    return QueryRefusedError(
        "the subscription was cancelled", code=RefusalCode.CANCELLED, hint="its caller sent a record that ends it"
    )


def _no_room(message: str, hint: str) -> QueryRefusedError:
    return QueryRefusedError(message, code=RefusalCode.OVERLOADED, hint=hint, retriable=True, retry_after_ms=1_000)


def _loop_time() -> float:
    return asyncio.get_running_loop().time()
