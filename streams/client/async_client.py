"""The asyncio client: asks over the query topic, waits on one partition of the reply topic.

Any number of requests may be in flight; replies find their request by id. The reply partition is read from its end,
and its position is known before the first request is sent, so no reply can be missed. Retriable refusals are asked
again until the deadline, each time under a new id, so that a late reply is never taken for a newer one's.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
import uuid
from collections.abc import AsyncGenerator, Iterator, Mapping, Sequence
from types import TracebackType
from typing import Any, Literal, Self

import orjson
from aiokafka.admin import AIOKafkaAdminClient
from aiokafka.errors import KafkaError

from schemas.chunks import ChunkCollector, ChunkError
from schemas.messages import Answer as JsonAnswer
from schemas.messages import (
    AnswerLimits,
    ArrowAnswer,
    QueryRequest,
    Refusal,
    RefusalCode,
    RequestError,
    checked_request,
    read_reply,
    serialise_cancellation,
    serialise_request,
)
from streams.adapters.kafka_librdkafka import RdKafkaProducer, RdKafkaTail, Sent
from streams.adapters.kafka_options import kafka_client_options
from streams.adapters.kafka_partitioner import partition_of
from streams.adapters.kafka_topics import QUERY_RETENTION_MS, REPLY_PARTITIONS, TopicSpecification, ensure_topics
from streams.batches import RecordBatch
from streams.client.answer import Answer
from streams.client.subscription import Change, Pushes, changes
from streams.client.written import AtLeast, Written, positions_of
from streams.config import Settings, load_settings
from streams.errors import (
    ConfigurationError,
    KafkaUnavailableError,
    PublishingError,
    QueryRefusedError,
    RequestTimeoutError,
)
from streams.limits import (
    QUERY_DEADLINE_MS_DEFAULT,
    QUERY_DEADLINE_MS_MAX,
    QUERY_REQUEST_BYTES_MAX,
    SUBSCRIPTION_EVERY_MS_DEFAULT,
    SUBSCRIPTION_LEASE_MS_DEFAULT,
    SUBSCRIPTION_LEASE_MS_MAX,
)
from streams.positions import TopicPartition
from streams.retry import Backoff

log = logging.getLogger(__name__)

Params = Sequence[Any] | Mapping[str, Any]
_Reply = JsonAnswer | ArrowAnswer | Refusal

_FIRST_PAUSE_SECONDS = 0.02
_LONGEST_PAUSE_SECONDS = 0.5
_METADATA_SECONDS_MAX = 3
#: The worker gets the budget less this part of it, so that its refusal is back before the client gives up.
_WAY_BACK_FRACTION = 0.1
_WAY_BACK_MS_MAX = 100


class AsyncClient:
    """Asks queries. Make one with `await AsyncClient.connect()` and share it; close it, or use it as a context."""

    def __init__(self, settings: Settings, *, query_partitions: int, reply_partition: int) -> None:
        self._settings = settings
        self._query_partitions = query_partitions
        self._reply_partition = reply_partition
        self._name = f"{settings.application}-clients"
        self._producer = RdKafkaProducer(settings, client_id=self._name, acks="1")
        self._replies = RdKafkaTail(
            settings,
            TopicPartition(settings.reply_topic, reply_partition),
            client_id=self._name,
            group=self._name,
            deliver=self._deliver,
        )
        self._caller = uuid.uuid4().hex
        self._publisher: RdKafkaProducer | None = None
        self._waiting: dict[str, asyncio.Future[_Reply]] = {}
        self._chunks: dict[str, ChunkCollector] = {}
        #: Of each subscription, by its id.
        self._pushes: dict[str, Pushes] = {}
        self._is_closed = False

    @classmethod
    async def connect(cls, settings: Settings | None = None) -> Self:
        """Connects to the Kafka of `settings`; without them, to that of the environment or the local stack.

        Raises ConfigurationError when Kafka cannot be reached or no worker has created the query topic.
        """
        if settings is None:
            settings = await asyncio.to_thread(load_settings)
        partitions = await _partition_counts(settings)
        client = cls(
            settings,
            query_partitions=partitions[settings.query_topic],
            reply_partition=random.randrange(partitions[settings.reply_topic]),  # noqa: S311
        )
        client._producer.start()
        try:
            await client._replies.start()
        except BaseException as error:
            await client.close()
            if isinstance(error, KafkaUnavailableError):
                raise _unreachable(settings, error) from error
            raise
        return client

    async def close(self) -> None:
        """Disconnects; requests in flight and subscriptions end with RequestTimeoutError. Idempotent."""
        self._is_closed = True
        for future in self._waiting.values():
            if not future.done():
                future.set_exception(closed())
        for pushes in self._pushes.values():
            pushes.fail(closed())
        await asyncio.gather(
            self._replies.stop(), self._producer.stop(), *([self._publisher.stop()] if self._publisher else [])
        )

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def query(
        self,
        sql: str,
        params: Params | None = None,
        *,
        key: str | None = None,
        deadline_ms: int = QUERY_DEADLINE_MS_DEFAULT,
        at_least: AtLeast | None = None,
        format: Literal["json", "arrow"] = "json",  # noqa: A002  # the protocol's word
        limits: AnswerLimits | None = None,
        chunked: bool = False,
        consistency: Literal["partition", "snapshot"] = "partition",
    ) -> Answer:
        """The answer to one query.

        `params` is a sequence for ? and $1, a mapping for $name. `key` asks only the partition that owns it.
        `at_least` (what `publish` returned, or topic -> partition -> offset of a record) makes the answer reflect
        those records. `chunked` takes an answer of any number of rows, up to the worker's `query_chunked_bytes_max`.
        `consistency="snapshot"` shows all partitions as of one point, if one worker has them.
        Raises QueryRefusedError, at once for what no worker would accept, or RequestTimeoutError if nothing came before
        the deadline.
        """
        _check_budget(deadline_ms)
        template = self._template(
            sql,
            params,
            at_least,
            key=key,
            format=format,
            limits=limits or AnswerLimits(),
            chunked=chunked,
            consistency=consistency,
        )
        deadline = _now() + deadline_ms / 1000
        backoff = Backoff(first_seconds=_FIRST_PAUSE_SECONDS, ceiling_seconds=_LONGEST_PAUSE_SECONDS)
        refused: QueryRefusedError | None = None
        while True:
            try:
                reply = await self._ask(template, deadline)
            except RequestTimeoutError as late:
                raise refused or late from None  # an earlier refusal says more than the clock
            if not isinstance(reply, Refusal):
                return Answer.of(reply)
            refused = QueryRefusedError.of(reply)
            wait = max(backoff.next_delay_seconds(), (refused.retry_after_ms or 0) / 1000)
            if not refused.retriable or _now() + wait >= deadline:
                raise refused
            await asyncio.sleep(wait)

    def subscribe(
        self,
        sql: str,
        params: Params | None = None,
        *,
        key: str | None = None,
        partition: int | None = None,
        every_ms: int = SUBSCRIPTION_EVERY_MS_DEFAULT,
        lease_ms: int = SUBSCRIPTION_LEASE_MS_DEFAULT,
        deadline_ms: int = QUERY_DEADLINE_MS_DEFAULT,
        at_least: AtLeast | None = None,
    ) -> AsyncGenerator[Change, None]:
        """`async for change in client.subscribe(...)`: the rows now, and again whenever they have changed, at most once
        in `every_ms`.

        `key` or `partition` reads one partition; without them, all, if one worker has them. The subscription goes on
        at the next owner when its partition moves, and ends with the loop, or when nobody comes for a change in
        `lease_ms`. Raises QueryRefusedError, or RequestTimeoutError when no worker answers for `deadline_ms`.
        """
        _check_budget(deadline_ms)
        lease_ms = min(lease_ms, SUBSCRIPTION_LEASE_MS_MAX)
        template = self._template(
            sql,
            params,
            at_least,
            key=key,
            partition=partition,
            deadline_ms=deadline_ms,
            subscribe=True,
            every_ms=every_ms,
            lease_ms=lease_ms,
        )
        return changes(
            _Line(self, self._query_partition_of(template)),
            template,
            every_ms=every_ms,
            lease_ms=lease_ms,
            deadline_ms=deadline_ms,
        )

    async def publish(self, topic: str, value: Mapping[str, Any] | bytes | None, *, key: str | None = None) -> Written:
        """Writes one record to a table's topic, acknowledged by all replicas: a JSON object, bytes in the table's
        format, or None to delete the row of `key`. Raises PublishingError.

        What it returns is an `at_least` for queries."""
        encoded = orjson.dumps(value, default=str) if isinstance(value, Mapping) else value
        if self._publisher is None:  # for records that must not be lost
            self._publisher = RdKafkaProducer(self._settings, client_id=self._name, acks="all")
            self._publisher.start()
        return Written(*await self._publisher.send(topic, value=encoded, key=None if key is None else key.encode()))

    def _template(self, sql: str, params: Params | None, at_least: AtLeast | None, **fields: Any) -> QueryRequest:
        """What each request has but its own id and what is left of the budget. Raises QueryRefusedError."""
        return _request(
            id="template",
            sql=sql,
            params=dict(params) if isinstance(params, Mapping) else list(params or ()),
            caller=self._caller,
            reply_to=self._settings.reply_topic,
            reply_partition=self._reply_partition,
            at_least=positions_of(at_least),
            **fields,
        )

    async def _ask(self, template: QueryRequest, deadline: float) -> _Reply:
        """One request, one reply. Raises RequestTimeoutError."""
        if self._is_closed:
            raise closed()
        remaining_ms = (deadline - _now()) * 1000
        budget_ms = remaining_ms - min(remaining_ms * _WAY_BACK_FRACTION, _WAY_BACK_MS_MAX)
        request = template.model_copy(update={"id": uuid.uuid4().hex, "deadline_ms": int(budget_ms)})
        partition = self._query_partition_of(request)
        future: asyncio.Future[_Reply] = asyncio.get_running_loop().create_future()
        self._waiting[request.id] = future
        try:
            async with asyncio.timeout_at(deadline):
                sent = self._send(request, partition)
                sent.add_done_callback(lambda sent: self._failed_to_send(future, sent))
                return await future
        except TimeoutError:
            raise RequestTimeoutError(
                f"no reply from partition {partition} of {self._settings.query_topic} before the deadline",
                hint="check that a store worker runs (`pintail worker store`), or give a longer deadline",
            ) from None
        except asyncio.CancelledError:
            self._cancel(request, partition)
            raise
        except PublishingError as error:
            raise _unsent(error, self._settings) from error
        finally:
            del self._waiting[request.id]
            self._chunks.pop(request.id, None)

    def _query_partition_of(self, request: QueryRequest) -> int:
        """Where the request goes: any partition will do unless it names one."""
        if request.key is not None:
            return partition_of(request.key.encode(), self._query_partitions)
        if request.partition is not None:
            return min(request.partition, self._query_partitions - 1)  # a worker refuses what does not exist
        return random.randrange(self._query_partitions)  # noqa: S311

    def _send(self, request: QueryRequest, partition: int) -> asyncio.Future[Sent]:
        """On its way when this returns."""
        key = None if request.key is None else request.key.encode()
        return self._producer.send(
            self._settings.query_topic, value=serialise_request(request), key=key, partition=partition
        )

    def _cancel(self, request: QueryRequest, partition: int) -> None:
        """The worker need not go on. Whether it hears of it in time is not waited for."""
        sending = self._producer.send(
            self._settings.query_topic, value=serialise_cancellation(request), partition=partition
        )
        sending.add_done_callback(_failure_of)

    @staticmethod
    def _failed_to_send(future: asyncio.Future[_Reply], sent: asyncio.Future[Sent]) -> None:
        error = _failure_of(sent)
        if error is not None and not future.done():
            future.set_exception(error)

    def _deliver(self, batch: RecordBatch) -> None:
        """Hands replies to their requests. Replies to others on the same partition are recognised by their key
        alone."""
        for index, key in enumerate(batch.keys):
            request_id = (key or b"").decode("utf-8", "replace")
            if (pushes := self._pushes.get(request_id)) is not None:
                pushes.put(batch.values[index] or b"")
                continue
            future = self._waiting.get(request_id)
            if future is None or future.done():
                continue
            headers = batch.headers.get(index, ())
            try:
                chunks = self._chunks.setdefault(request_id, ChunkCollector())
                value = chunks.add(batch.values[index] or b"", headers)
                if value is not None:
                    future.set_result(read_reply(value, headers))
            except (RequestError, ChunkError) as error:
                log.warning("%s[%d]@%d: %s", batch.topic, batch.partition, batch.offsets[index], error)


def _failure_of(sent: asyncio.Future[Sent]) -> BaseException | None:
    return None if sent.cancelled() else sent.exception()


class _Line:
    """streams.client.subscription.Line to one partition of the query topic."""

    def __init__(self, client: AsyncClient, partition: int) -> None:
        self._client = client
        self._partition = partition

    @contextlib.contextmanager
    def pushes_of(self, request: QueryRequest) -> Iterator[Pushes]:
        """See Line."""
        if self._client._is_closed:
            raise closed()
        pushes = self._client._pushes[request.id] = Pushes()
        try:
            yield pushes
        finally:
            del self._client._pushes[request.id]
            self._client._cancel(request, self._partition)

    async def send(self, request: QueryRequest) -> None:
        """See Line."""
        self._client._send(request, self._partition).add_done_callback(_failure_of)  # silence says it too


def closed() -> RequestTimeoutError:
    """For who waits when the client is closed, or asks after that."""
    return RequestTimeoutError("the client was closed", hint="keep it open while you wait")


def _unsent(error: PublishingError, settings: Settings) -> RequestTimeoutError:
    return RequestTimeoutError(
        f"the request could not be sent: {error.message}",
        hint=f"check that the broker runs and has the topic {settings.query_topic}, which a store worker creates, and"
        " PINTAIL_KAFKA and PINTAIL_APPLICATION",
    )


def _request(**fields: Any) -> QueryRequest:
    """The request, refused here in the words in which a worker would refuse it, or for what Kafka would not take."""
    try:
        request = checked_request(fields)
        size = len(serialise_request(request))
        if size > QUERY_REQUEST_BYTES_MAX:
            raise RequestError(
                f"a request of {size} bytes, which is more than the {QUERY_REQUEST_BYTES_MAX} it may have"
            )
        return request
    except RequestError as error:
        raise QueryRefusedError(
            str(error),
            code=RefusalCode.NOT_A_REQUEST,
            hint="correct what the message names; docs/wire-protocol.md describes a request",
        ) from None


def _check_budget(deadline_ms: int) -> None:
    if deadline_ms <= 0:
        raise QueryRefusedError(
            f"the budget of {deadline_ms} ms was spent before the request was sent",
            code=RefusalCode.DEADLINE_EXCEEDED,
            hint="give a positive deadline_ms",
        )
    if deadline_ms > QUERY_DEADLINE_MS_MAX:
        raise QueryRefusedError(
            f"deadline_ms: {deadline_ms} is more than the {QUERY_DEADLINE_MS_MAX} ms that a request may take",
            code=RefusalCode.NOT_A_REQUEST,
            hint=f"give at most {QUERY_DEADLINE_MS_MAX}",
        )


async def _partition_counts(settings: Settings) -> dict[str, int]:
    """Partitions of the query and the reply topic. Creates the reply topic if it is missing, never the query topic."""
    admin = AIOKafkaAdminClient(**kafka_client_options(settings))
    topics = {settings.query_topic, settings.reply_topic}
    counts: dict[str, int] = {}
    try:
        await admin.start()
        # A broker learns of a topic, and then of its partitions, a moment after it was created.
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_METADATA_SECONDS_MAX):
                while counts.keys() != topics or not all(counts.values()):
                    existing = topics.intersection(await admin.list_topics())
                    if existing == {settings.query_topic}:
                        await _create_reply_topic(settings)
                    described = await admin.describe_topics(sorted(existing)) if existing else []
                    counts = {topic["topic"]: len(topic["partitions"]) for topic in described}
                    await asyncio.sleep(_FIRST_PAUSE_SECONDS)
        if not counts.get(settings.query_topic):
            raise ConfigurationError(
                f"Kafka at {settings.kafka} has no topic {settings.query_topic!r}: no store worker has run there yet",
                hint="start one (`pintail worker store`), or check PINTAIL_KAFKA and PINTAIL_APPLICATION",
            )
        if not counts.get(settings.reply_topic):
            raise ConfigurationError(
                f"Kafka at {settings.kafka} names no partitions of {settings.reply_topic!r}",
                hint="check that the broker is healthy, then try again",
            )
        return counts
    except KafkaError as error:
        raise _unreachable(settings, error) from error
    finally:
        await admin.close()


async def _create_reply_topic(settings: Settings) -> None:
    retention = {"retention.ms": str(QUERY_RETENTION_MS)}
    await ensure_topics(
        [TopicSpecification(settings.reply_topic, REPLY_PARTITIONS, exact=False, configuration=retention)], settings
    )


def _unreachable(settings: Settings, error: KafkaError | KafkaUnavailableError) -> ConfigurationError:
    return ConfigurationError(
        f"Kafka at {settings.kafka}: {error!r}", hint="check PINTAIL_KAFKA and that the broker runs (`pintail dev`)"
    )


def _now() -> float:
    return asyncio.get_running_loop().time()
