"""Answering: one record of the query topic in, exactly one reply or one dead letter out (invariant 9). What is read
again after a crash is answered again (`agents.open_requests`).

Only partitions that are SERVING on this worker answer, and each answer states the offsets and epochs it reflects
(invariant 3). The steps of `QueryService.answer` are the order of the checks: who could be told, is it a request, is
there time, may these partitions answer, are the wanted records applied, is a slot free, run, is the assignment still
the same. What other workers hold is gathered (`gathering`). The caller is the query agent, which owns Kafka; DuckDB is
behind `DuckDBQueries` and `DuckDBMerger`.
"""

from __future__ import annotations

import asyncio
import logging
import math
import re
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

from schemas.catalog import Catalog
from schemas.chunks import chunks_of
from schemas.messages import (
    FORMAT_HEADER,
    ID_CHARS_MAX,
    STATUS_HEADER,
    AnswerFormat,
    AnswerHead,
    AnswerTiming,
    Consistency,
    QueryRequest,
    Refusal,
    RefusalCode,
    RequestEnvelope,
    RequestError,
    read_envelope,
    serialise_refusal,
)
from streams import telemetry
from streams.adapters.duckdb_merge import DuckDBMerger, Plan
from streams.adapters.duckdb_queries import AnswerBody, DuckDBQueries, FetchLimits, Interruptible, QueryCursors
from streams.adapters.duckdb_refusals import not_serving, too_many_bytes
from streams.adapters.kafka_partitioner import partition_of
from streams.batches import Headers
from streams.config import Settings
from streams.errors import QueryRefusedError, StoreError
from streams.limits import (
    QUERY_CHUNK_BYTES_MAX,
    QUERY_DEADLINE_MS_DEFAULT,
    QUERY_DEADLINE_MS_MAX,
    QUERY_IN_FLIGHT_MAX,
    QUERY_PART_BYTES_MAX,
    REFUSAL_QUOTE_CHARS_MAX,
    REFUSAL_TEXT_CHARS_MAX,
)
from streams.ports import DeadLetter, ParkReason, ServingState
from streams.positions import TopicPartition
from streams.processes.fair_slots import FairSlots
from streams.processes.gathering import AskForPart, gather

log = logging.getLogger(__name__)

_LEGAL_TOPIC = re.compile(r"[A-Za-z0-9._-]{1,249}")
_HOW_TO_ASK = (
    'send one JSON object, such as {"id": "1", "sql": "SELECT 1", "reply_to": "my-replies"}; '
    "docs/wire-protocol.md describes it and has its JSON Schema"
)
#: How often a query that outlives its deadline is interrupted again: an interrupt between two statements is lost.
_INTERRUPT_INTERVAL_SECONDS = 0.02
#: Reply topic, its partition and the request's id: under these a request can be cancelled.
Asker = tuple[str | None, int | None, str | None]
_ROWS_UNLIMITED = 2**62
_INCONSISTENTLY = "leave out consistency: `offsets` says which point of each the answer shows"


@dataclass(frozen=True)
class IncomingRequest:
    """A record of the query topic."""

    value: bytes | None
    key: bytes | None
    headers: Headers
    partition: int
    offset: int
    timestamp_ms: int


@dataclass(frozen=True)
class Reply:
    """What the asker gets. `partition` is None where the partitioner decides, by the key."""

    topic: str
    partition: int | None
    key: bytes
    value: bytes
    headers: Headers
    #: Of an asker who takes several records.
    record_bytes_max: int | None = None
    #: Of an answer to one who subscribes: what the value is made of, its rows one by one.
    head: AnswerHead | None = None
    rows: Sequence[bytes] = ()

    @property
    def is_answer(self) -> bool:
        """Whether it is no refusal."""
        return (STATUS_HEADER, b"ok") in self.headers

    def records(self) -> list[tuple[bytes, Headers]]:
        """What to send, in this order."""
        if self.record_bytes_max is None:
            return [(self.value, self.headers)]
        chunks = chunks_of(self.value, bytes_max=self.record_bytes_max)
        return [(value, (*self.headers, *more)) for value, more in chunks]


@dataclass
class _Accepted:
    """A valid request on its way through the steps."""

    request: QueryRequest
    incoming: IncomingRequest
    queued_ms: float
    #: Event loop time at which its steps began, and at which its budget is spent.
    started: float
    deadline: float
    asked_partition: int | None
    #: Who takes turns with others.
    caller: str
    #: Whether the asker is another worker, which puts an answer together.
    is_part: bool
    #: What it is waiting for, in words for a deadline that strikes.
    doing: str = "checking"


class QueryService:
    """Answers requests. One per worker; `answer` may be called concurrently from one event loop."""

    def __init__(
        self,
        store: QueryCursors,
        catalog: Catalog,
        state: ServingState,
        settings: Settings,
        *,
        ask: AskForPart,
        now_ms: Callable[[], float] = lambda: time.time() * 1000,
    ) -> None:
        self._catalog = catalog
        self._state = state
        self._settings = settings
        self._now_ms = now_ms
        self._queries = DuckDBQueries(store, catalog)
        self._merger = DuckDBMerger(catalog)
        self._ask = ask
        self._threads = ThreadPoolExecutor(settings.query_concurrency_max, thread_name_prefix="query")
        self._slots = FairSlots(settings.query_concurrency_max)
        #: What can be cancelled: reply topic, its partition and the request's id -> the task that answers it.
        self._asking: dict[Asker, asyncio.Task[Any]] = {}
        self._cancelled: set[Asker] = set()
        self._in_flight = 0
        self._running: dict[asyncio.Future[AnswerBody], Interruptible] = {}
        self._interrupting: set[asyncio.Task[None]] = set()
        self._execution_seconds_mean = 0.005

    async def answer(self, incoming: IncomingRequest) -> Reply | DeadLetter | None:
        """The one outcome of a request; None for a record that cancels one. Never raises because of what it contains
        (invariant 10)."""
        envelope = read_envelope(incoming.value, incoming.headers)
        if envelope.cancels is not None:
            self._cancel((envelope.reply_to, envelope.reply_partition, envelope.cancels))
            return None
        if envelope.reply_to is None:
            nowhere = "nowhere to reply: neither the field nor the header reply_to is set"
            return self._dead_letter(incoming, f"{envelope.fault}, and {nowhere}" if envelope.fault else nowhere)
        if fault := self._reply_topic_fault(envelope.reply_to):
            return self._dead_letter(incoming, f"{RefusalCode.BAD_REPLY_TO}: {_quoted(envelope.reply_to)} {fault}")
        with telemetry.QUERY_SECONDS.time():
            return await self._answer_or_refuse(envelope, incoming)

    @property
    def running_count(self) -> int:
        """Queries that hold a slot now."""
        return len(self._running)

    async def release(self, partitions: Collection[int]) -> None:
        """Ends the queries that read these partitions, so that their files can be detached; the askers are refused.

        The partitions are no longer SERVING when this is called, so no new query can begin on them.
        """
        ending = [
            _interrupt_until_done(query, running)
            for running, query in self._running.items()
            if not query.scope.isdisjoint(partitions)
        ]
        await asyncio.gather(*ending)

    async def close(self) -> None:
        """Ends what runs; the caller has stopped handing in requests."""
        await asyncio.gather(*(_interrupt_until_done(query, running) for running, query in self._running.items()))
        self._threads.shutdown(wait=False, cancel_futures=True)
        self._merger.close()

    # -- the steps ---------------------------------------------------------------------------------------------------

    async def _answer_or_refuse(self, envelope: RequestEnvelope, incoming: IncomingRequest) -> Reply:
        asker = (envelope.reply_to, envelope.reply_partition, envelope.id)
        task = asyncio.current_task()
        assert task is not None
        self._asking[asker] = task
        try:
            reply = await self._answer(envelope, incoming)
        except QueryRefusedError as refused:
            return refusal_reply(envelope, refused)
        except asyncio.CancelledError:
            if asker not in self._cancelled:
                raise
            task.uncancel()
            return refusal_reply(envelope, _cancelled())
        except Exception:  # last line of invariants 9 and 10: the asker is told, the operator gets the traceback
            log.exception("request %s failed", envelope.id)
            return refusal_reply(envelope, failed())
        finally:
            self._cancelled.discard(asker)
            if self._asking.get(asker) is task:
                del self._asking[asker]
        telemetry.QUERIES.labels("ok").inc()
        return reply

    def _cancel(self, asker: Asker) -> None:
        """Ends a request that is not answered yet; its asker gets a refusal. What is not there needs no end."""
        if task := self._asking.get(asker):
            self._cancelled.add(asker)
            task.cancel()

    async def _answer(self, envelope: RequestEnvelope, incoming: IncomingRequest) -> Reply:
        accepted = self._accept(envelope, incoming)
        if self._in_flight >= QUERY_IN_FLIGHT_MAX:
            raise self._overloaded()
        self._in_flight += 1
        try:
            async with asyncio.timeout_at(accepted.deadline):
                scope = self._scope(accepted)
                await self._wait_until_applied(accepted, scope)
                if accepted.asked_partition is None and len(scope) < self._state.partitions_total:
                    self._check_may_gather(accepted, scope)
                    return await self._gathered(envelope, accepted)
                accepted.doing = "waiting for a free query slot"
                await self._slots.acquire(accepted.caller)
                waited_ms = (_loop_time() - accepted.started) * 1000
                epochs = self._scope_of_slot(accepted)
                accepted.doing = "running the query"
                try:
                    body = await self._run(self._prepared(accepted, epochs))
                except QueryRefusedError:
                    self._check_still_serving(accepted, epochs)  # losing its partitions may be why it failed
                    raise
                self._check_still_serving(accepted, epochs)
        except TimeoutError:
            raise _deadline_exceeded(accepted) from None
        finally:
            self._in_flight -= 1
        return self._reply(envelope, accepted, body, epochs, waited_ms)

    def _check_may_gather(self, accepted: _Accepted, scope: Mapping[int, int]) -> None:
        """Refuses, to be asked again, what one worker has to answer: a partition may be on its way to this one."""
        request, total = accepted.request, self._state.partitions_total
        if request.consistency is Consistency.SNAPSHOT:
            raise _of_one_worker("a snapshot shows", len(scope), total, _INCONSISTENTLY)
        if request.subscribe:
            raise _of_one_worker("a subscription reads", len(scope), total, "ask the query at intervals")

    async def _gathered(self, envelope: RequestEnvelope, accepted: _Accepted) -> Reply:
        """The answer to which other workers contribute what their partitions hold."""
        request, own = accepted.request, self._scope(accepted)
        waited_ms = (_loop_time() - accepted.started) * 1000
        accepted.doing = "gathering what other workers hold"
        plan = await asyncio.get_running_loop().run_in_executor(self._threads, self._plan, request)
        try:
            gathered = await gather(
                plan,
                request.model_copy(update={"caller": accepted.caller}),
                own=own,
                partitions_total=self._state.partitions_total,
                deadline=accepted.deadline,
                ask=self._ask,
                run=lambda part: self._in_slot(
                    accepted.caller,
                    self._queries.prepare(
                        part,
                        partition=None,
                        scope=frozenset(own),
                        limits=FetchLimits(_ROWS_UNLIMITED, QUERY_PART_BYTES_MAX),
                    ),
                ),
            )
        except QueryRefusedError:
            self._check_still_serving(accepted, own)  # losing its partitions may be why it failed
            raise
        self._check_still_serving(accepted, own)
        accepted.doing = "putting the answer together"
        merge = self._merger.merge(
            plan, gathered.contributions, answer_format=request.format, limits=self._limits(accepted)
        )
        body = await self._in_slot(accepted.caller, merge)
        executed_ms = (_loop_time() - accepted.started) * 1000 - waited_ms
        whole = replace(body, offsets=gathered.offsets, executed_ms=executed_ms)
        return self._reply(envelope, accepted, whole, gathered.epochs, waited_ms)

    def _plan(self, request: QueryRequest) -> Plan:
        """On a thread: to check and to plan takes DuckDB milliseconds, in which the loop has others to answer."""
        return self._merger.plan(request, self._queries.check(request))

    def _accept(self, envelope: RequestEnvelope, incoming: IncomingRequest) -> _Accepted:
        """Validates the request and starts its clock."""
        try:
            request = envelope.request()
        except RequestError as error:
            raise QueryRefusedError(str(error), code=RefusalCode.NOT_A_REQUEST, hint=_HOW_TO_ASK) from None
        from_worker = envelope.reply_to == self._settings.part_topic
        if from_worker and request.subscribe:
            raise QueryRefusedError(
                f"{self._settings.part_topic} is for what workers ask one another, and they do not subscribe",
                code=RefusalCode.NOT_ALLOWED,
                hint="give a reply_to of your own",
            )
        asked_ms = QUERY_DEADLINE_MS_DEFAULT if request.deadline_ms is None else request.deadline_ms
        if asked_ms > QUERY_DEADLINE_MS_MAX:
            raise QueryRefusedError(
                f"deadline_ms: {asked_ms} is more than the {QUERY_DEADLINE_MS_MAX} ms that a request may take",
                code=RefusalCode.NOT_A_REQUEST,
                hint=f"give at most {QUERY_DEADLINE_MS_MAX}",
            )
        # A timestamp from a clock ahead of this one must not lengthen the budget.
        queued_ms = max(0.0, self._now_ms() - incoming.timestamp_ms)
        remaining_ms = asked_ms - queued_ms
        if remaining_ms <= 0:
            raise QueryRefusedError(
                f"the budget of {asked_ms} ms was spent {-remaining_ms:.0f} ms before the worker saw the request",
                code=RefusalCode.DEADLINE_EXCEEDED,
                hint="give a positive deadline_ms; it counts from the record's Kafka timestamp, so clocks must agree",
            )
        now = _loop_time()
        return _Accepted(
            request,
            incoming,
            queued_ms,
            started=now,
            deadline=now + remaining_ms / 1000,
            asked_partition=self._asked_partition(request),
            caller=caller_of(envelope, request),
            is_part=from_worker and request.format is AnswerFormat.ARROW and request.partition is not None,
        )

    def _asked_partition(self, request: QueryRequest) -> int | None:
        """The only partition that is asked; None for all."""
        total = self._state.partitions_total
        owning = None if request.key is None else partition_of(request.key.encode(), total)
        if request.partition is None:
            return owning
        if request.partition >= total or owning not in (None, request.partition):
            fault = f"of 0 to {total - 1}" if request.partition >= total else f"to which the key belongs ({owning})"
            raise QueryRefusedError(
                f"partition: {request.partition} is not the one {fault}",
                code=RefusalCode.NOT_A_REQUEST,
                hint="leave out `partition` to ask all of them, or the one of `key`",
            )
        return request.partition

    def _scope(self, accepted: _Accepted) -> dict[int, int]:
        """The partitions that are read here -> their epochs: the one that is asked, or all of this worker. Refuses if
        it is not SERVING here."""
        serving, arrived_at = self._state.serving(), accepted.incoming.partition
        asked = accepted.asked_partition
        if asked is not None and asked in serving:
            return {asked: serving[asked]}
        if asked is None and arrived_at in serving:
            return dict(sorted(serving.items()))
        if asked in (None, arrived_at) or arrived_at not in serving:
            raise not_serving(f"partition {arrived_at} is recovering on this worker")
        key = accepted.request.key
        raise QueryRefusedError(
            f"{'' if key is None else f'key {_quoted(key)} belongs to '}partition {asked}"
            f"{', which' if key is not None else ''} is not served by this worker",
            code=RefusalCode.WRONG_PARTITION,
            hint=f"send the request to partition {asked} of {self._settings.query_topic}",
            retriable=True,
        )

    async def _wait_until_applied(self, accepted: _Accepted, scope: Mapping[int, int]) -> None:
        """Read your writes. Positions in partitions that the answer does not read are met trivially."""
        for topic, positions in accepted.request.at_least.items():
            if topic not in self._catalog.by_topic:
                raise QueryRefusedError(
                    f"at_least names topic {_quoted(topic)}, which belongs to no table",
                    code=RefusalCode.UNKNOWN_TABLE,
                    hint=f"topics of tables: {', '.join(self._catalog.topics)}",
                )
            for partition, offset in positions.items():
                if partition not in scope:
                    continue
                accepted.doing = f"waiting until the record at offset {offset} of {topic}[{partition}] is applied"
                try:
                    await self._state.wait_until_applied(partition, topic, offset)
                except StoreError as error:
                    raise not_serving(error.message) from error

    def _check_still_serving(self, accepted: _Accepted, epochs: Mapping[int, int]) -> None:
        """Refuses an answer from partitions that moved, or moved away and back, while the query ran (invariant 5)."""
        if self._scope(accepted) != epochs:
            raise not_serving("a partition was assigned anew while the query ran")

    def _scope_of_slot(self, accepted: _Accepted) -> dict[int, int]:
        """The scope as it is once the slot is there; gives the slot back if that refuses."""
        try:
            return self._scope(accepted)
        except QueryRefusedError:
            self._slots.release()
            raise

    def _prepared(self, accepted: _Accepted, scope: Mapping[int, int]) -> Interruptible:
        return self._queries.prepare(
            accepted.request,
            partition=accepted.asked_partition,
            scope=frozenset(scope),
            limits=self._limits(accepted),
        )

    def _limits(self, accepted: _Accepted) -> FetchLimits:
        """The smaller of what the asker and the worker allow. A part has a limit of its own."""
        limits, settings = accepted.request.limits, self._settings
        rows_max, bytes_max = settings.query_rows_max, settings.query_answer_bytes_max
        if accepted.is_part:
            rows_max, bytes_max = _ROWS_UNLIMITED, QUERY_PART_BYTES_MAX
        elif accepted.request.chunked:
            rows_max, bytes_max = _ROWS_UNLIMITED, settings.query_chunked_bytes_max
        return FetchLimits(
            _smaller(limits.rows, rows_max),
            _smaller(limits.bytes, bytes_max),
            row_by_row=accepted.request.subscribe,
        )

    async def _in_slot(self, caller: str, query: Interruptible) -> AnswerBody:
        await self._slots.acquire(caller)
        return await self._run(query)

    async def _run(self, query: Interruptible) -> AnswerBody:
        """Runs in the slot the caller acquired, which is free again when the thread is: not at the deadline."""
        running = asyncio.get_running_loop().run_in_executor(self._threads, query.run)
        self._running[running] = query
        running.add_done_callback(self._free_slot(started=_loop_time()))
        try:
            return await asyncio.shield(running)
        except asyncio.CancelledError:
            interrupting = asyncio.create_task(_interrupt_until_done(query, running))
            self._interrupting.add(interrupting)
            interrupting.add_done_callback(self._interrupting.discard)
            raise

    def _free_slot(self, *, started: float) -> Callable[[asyncio.Future[AnswerBody]], None]:
        def free(running: asyncio.Future[AnswerBody]) -> None:
            self._slots.release()
            del self._running[running]
            self._execution_seconds_mean += 0.1 * (_loop_time() - started - self._execution_seconds_mean)

        return free

    # -- the outcomes ------------------------------------------------------------------------------------------------

    def _reply(
        self,
        envelope: RequestEnvelope,
        accepted: _Accepted,
        body: AnswerBody,
        epochs: Mapping[int, int],
        waited_ms: float,
    ) -> Reply:
        request = accepted.request
        head = AnswerHead(
            id=request.id,
            columns=body.columns,
            offsets=body.offsets,
            epoch={str(partition): epoch for partition, epoch in epochs.items()},
            timing=AnswerTiming(
                queued_ms=round(accepted.queued_ms, 3),
                waited_ms=round(waited_ms, 3),
                executed_ms=round(body.executed_ms, 3),
            ),
        )
        value = body.serialise(head, compressed=accepted.is_part or request.chunked)
        bytes_max = self._limits(accepted).bytes_max
        if len(value) > bytes_max:
            raise too_many_bytes(bytes_max)
        reply = _to_asker(envelope, value, request.format, "ok")
        if request.subscribe:
            return replace(reply, head=head, rows=body.rows_json)
        return replace(reply, record_bytes_max=QUERY_CHUNK_BYTES_MAX) if request.chunked else reply

    def _overloaded(self) -> QueryRefusedError:
        wait_ms = self._in_flight * self._execution_seconds_mean * 1000 / self._settings.query_concurrency_max
        retry_after_ms = max(10, math.ceil(wait_ms))
        return QueryRefusedError(
            f"{QUERY_IN_FLIGHT_MAX} requests are in flight on this worker",
            code=RefusalCode.OVERLOADED,
            hint=f"ask again in about {retry_after_ms} ms",
            retriable=True,
            retry_after_ms=retry_after_ms,
        )

    def _reply_topic_fault(self, topic: str) -> str | None:
        """Why replies must not be produced to this topic; None if they may."""
        if not _LEGAL_TOPIC.fullmatch(topic) or topic in (".", ".."):
            return "is not a legal topic name"
        if topic in self._catalog.by_topic:
            return "is the topic of a table"
        if topic.endswith(".dead-letters"):
            return "is a dead-letter topic"
        if topic.startswith("__"):
            return "is internal to Kafka"
        own = topic == self._settings.application or topic.startswith(
            (f"{self._settings.application}.", f"{self._settings.application}-")
        )
        if own and topic not in (self._settings.reply_topic, self._settings.part_topic):
            return "is one of Pintail's own topics"
        return None

    def _dead_letter(self, incoming: IncomingRequest, detail: str) -> DeadLetter:
        return DeadLetter(
            source=TopicPartition(self._settings.query_topic, incoming.partition),
            offset=incoming.offset,
            timestamp_ms=incoming.timestamp_ms,
            key=incoming.key,
            value=incoming.value,
            reason=ParkReason.NOT_A_REQUEST,
            detail=detail,
            dead_letter_topic=self._settings.query_dead_letter_topic,
        )


async def _interrupt_until_done(query: Interruptible, running: asyncio.Future[AnswerBody]) -> None:
    """Frees the slot of a query whose asker has had the refusal; what the query still yields is dropped."""
    while not running.done():
        query.interrupt()
        await asyncio.wait([running], timeout=_INTERRUPT_INTERVAL_SECONDS)
    if not running.cancelled():
        running.exception()


def caller_of(envelope: RequestEnvelope, request: QueryRequest) -> str:
    """Who takes turns with others."""
    return request.caller or f"{envelope.reply_to} {envelope.reply_partition}"[:ID_CHARS_MAX]


def refusal_reply(envelope: RequestEnvelope, error: QueryRefusedError) -> Reply:
    """A refusal to whoever sent the request."""
    telemetry.QUERIES.labels(error.code).inc()
    refusal = Refusal(
        id=envelope.id,
        code=RefusalCode(error.code),
        message=_cut(error.message, REFUSAL_TEXT_CHARS_MAX),
        hint=_cut(error.hint, REFUSAL_TEXT_CHARS_MAX),
        retriable=error.retriable,
        retry_after_ms=error.retry_after_ms,
    )
    return _to_asker(envelope, serialise_refusal(refusal), AnswerFormat.JSON, "refused")


def failed() -> QueryRefusedError:
    """For an exception that nobody foresaw: the operator gets the traceback, the asker this."""
    return QueryRefusedError(
        "the worker failed on this request",
        code=RefusalCode.INTERNAL,
        hint="the worker's log has the details; please report it",
    )


def _to_asker(envelope: RequestEnvelope, value: bytes, answer_format: AnswerFormat, status: str) -> Reply:
    assert envelope.reply_to is not None
    return Reply(
        topic=envelope.reply_to,
        partition=envelope.reply_partition,
        key=(envelope.id or "").encode(),
        value=value,
        headers=((FORMAT_HEADER, answer_format.encode()), (STATUS_HEADER, status.encode())),
    )


def _cancelled() -> QueryRefusedError:
    return QueryRefusedError(
        "the request was cancelled", code=RefusalCode.CANCELLED, hint="its asker sent a record that ends it"
    )


def _deadline_exceeded(accepted: _Accepted) -> QueryRefusedError:
    return QueryRefusedError(
        f"the deadline passed while {accepted.doing}",
        code=RefusalCode.DEADLINE_EXCEEDED,
        hint="give a longer deadline_ms, or ask for less",
    )


def _of_one_worker(what: str, here: int, total: int, otherwise: str) -> QueryRefusedError:
    return QueryRefusedError(
        f"{what} the partitions of one worker, and this one serves {here} of {total}",
        code=RefusalCode.NOT_SERVING,
        hint=f"give a key or a partition, or {otherwise}",
        retriable=True,
    )


def _quoted(text: str) -> str:
    """A text of the asker's, for a message."""
    return repr(_cut(text, REFUSAL_QUOTE_CHARS_MAX))


def _cut(text: str, chars_max: int) -> str:
    """At most so many characters; says how many are left out."""
    return text if len(text) <= chars_max else f"{text[:chars_max]} ... ({len(text) - chars_max} more characters)"


def _smaller(asked: int | None, allowed: int) -> int:
    return allowed if asked is None else min(asked, allowed)


def _loop_time() -> float:
    return asyncio.get_running_loop().time()
