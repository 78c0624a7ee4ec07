"""Kafka through librdkafka, for requests and replies (ADR 22): it fetches and sends in C, on threads of its own, so
that a round trip takes less than half the time that it takes through aiokafka, and little of the interpreter's.

`RdKafkaProducer` sends at once. `RdKafkaLog` reads the partitions that it is told to, outside of any group, and
`RdKafkaTail` what comes to one partition from now on. Each belongs to one event loop, on which it delivers. Used by the
store worker for requests, replies and parts, and by the client.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Literal, NamedTuple

from confluent_kafka import Consumer, KafkaError, KafkaException, Message, Producer
from confluent_kafka import TopicPartition as KafkaTopicPartition

from streams.adapters.kafka_options import librdkafka_options
from streams.batches import RecordBatch, headers_of, size_of
from streams.config import Settings
from streams.errors import KafkaUnavailableError, PublishingError
from streams.finishing import in_thread
from streams.limits import MIB
from streams.ports import Watermarks
from streams.positions import TopicPartition
from streams.retry import Backoff, persisting, retrying

logger = logging.getLogger(__name__)

#: Of what is handed to the loop in one go; more would hold it up for longer than a few milliseconds.
_BATCH_RECORDS_MAX = 500
_BATCH_BYTES_MAX = MIB
#: How long a thread waits for something to happen before it looks whether it is still wanted.
_POLL_SECONDS = 0.1
#: Of what waits in a client, to be sent or to be taken.
_QUEUED_KIB_MAX = 64 * 1024
_HANDED_OVER_MAX = 4
#: Nobody waits longer for a reply.
_SEND_SECONDS_MAX = 30
_WATERMARK_SECONDS_MAX = 5.0
_LOOK_UP_SECONDS_MAX = 1.0
_START_SECONDS_MAX = 10.0
_FLUSH_SECONDS_MAX = 5.0
_RETRY_SECONDS_MAX = 5.0
_UNREADABLE = frozenset({KafkaError._BAD_MSG, KafkaError._BAD_COMPRESSION, KafkaError.INVALID_MSG})


class Sent(NamedTuple):
    """Where a record is in the log."""

    topic: str
    partition: int
    offset: int


class RdKafkaProducer:
    """Sends each record at once; those that are sent while the broker is busy travel together."""

    def __init__(
        self, settings: Settings, *, client_id: str, acks: Literal["1", "all"], record_bytes_max: int = MIB
    ) -> None:
        self._options = {
            **librdkafka_options(settings, client_id=client_id),
            "acks": acks,
            "enable.idempotence": acks == "all",
            "linger.ms": 0,
            "message.max.bytes": record_bytes_max,
            "message.timeout.ms": _SEND_SECONDS_MAX * 1_000,
            "queue.buffering.max.kbytes": _QUEUED_KIB_MAX,
            # As every Java client has it, so that a key's partition is the same for all.
            "partitioner": "murmur2_random",
            # A topic that is not there is no reason to wait for it for long.
            "topic.metadata.propagation.max.ms": 3_000,
        }
        self._stopping = threading.Event()
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Begins to connect, in the background. Call it on the loop that will send."""
        self._loop = asyncio.get_running_loop()
        self._producer = Producer(self._options, logger=logger)
        self._thread = threading.Thread(target=self._serve, name="kafka producer", daemon=True)
        self._thread.start()

    async def stop(self) -> None:
        """Sends what is buffered, as far as that takes no longer than a few seconds; the rest fails. Idempotent."""
        if self._thread is not None:
            thread, self._thread = self._thread, None
            self._stopping.set()
            await in_thread(thread.join)
            await in_thread(self._flush)

    def send(
        self,
        topic: str,
        *,
        value: bytes | None,
        key: bytes | None = None,
        partition: int | None = None,
        headers: Iterable[tuple[str, bytes]] = (),
    ) -> asyncio.Future[Sent]:
        """On its way when this returns. The future is done once the record is acknowledged; it raises
        PublishingError."""
        sent: asyncio.Future[Sent] = self._loop.create_future()

        def acknowledged(error: KafkaError | None, message: Message) -> None:
            with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits any more
                self._loop.call_soon_threadsafe(_settle, sent, topic, error, message)

        try:
            self._producer.produce(
                topic,
                value=value,
                key=key,
                partition=-1 if partition is None else partition,
                headers=list(headers),
                on_delivery=acknowledged,
            )
        except (KafkaException, BufferError) as error:
            sent.set_exception(_not_sent(topic, error))
        return sent

    def _serve(self) -> None:
        """Hands over acknowledgements."""
        while not self._stopping.is_set():
            self._producer.poll(_POLL_SECONDS)

    def _flush(self) -> None:
        self._producer.flush(_FLUSH_SECONDS_MAX)
        self._producer.purge()
        self._producer.flush(0)


def _settle(sent: asyncio.Future[Sent], topic: str, error: KafkaError | None, message: Message) -> None:
    if sent.done():  # given up
        return
    if error is not None:
        sent.set_exception(_not_sent(topic, error))
    else:
        sent.set_result(Sent(topic, message.partition(), message.offset()))


def _not_sent(topic: str, error: object) -> PublishingError:
    return PublishingError(
        f"the record for {topic} was not acknowledged: {error}",
        hint="it may be in the log all the same; check the topic and the broker, then send it again",
    )


@dataclass(frozen=True, eq=False)
class _Assignment:
    """What is to be read, from where. Another object is another assignment."""

    positions: Mapping[TopicPartition, int]


class _Fault(NamedTuple):
    """Instead of records."""

    topic_partition: TopicPartition
    error: KafkaError


class RdKafkaLog:
    """Implements streams.ports.PartitionLog. Delivers at once; what is on its way when reading stops is dropped.

    `group` names no group that it would join: librdkafka only asks the cluster who would coordinate it."""

    def __init__(
        self,
        settings: Settings,
        *,
        client_id: str,
        group: str,
        deliver: Callable[[RecordBatch], None],
        on_out_of_range: Callable[[TopicPartition], None],
        on_unreadable: Callable[[TopicPartition, str], None],
    ) -> None:
        self._options = {
            **librdkafka_options(settings, client_id=client_id),
            "group.id": group,
            "enable.auto.commit": False,
            "enable.auto.offset.store": False,
            # A position that Kafka does not have must be an error, never a jump.
            "auto.offset.reset": "error",
            "isolation.level": "read_committed",
            "check.crcs": True,
            "allow.auto.create.topics": False,
            "fetch.error.backoff.ms": 100,
            "queued.max.messages.kbytes": _QUEUED_KIB_MAX,
        }
        self._deliver = deliver
        self._on_out_of_range = on_out_of_range
        self._on_unreadable = on_unreadable
        self._stopping = threading.Event()
        self._thread: threading.Thread | None = None
        #: Hand-overs that the loop has not taken yet: a loop that is busy stops the reading.
        self._room = threading.Semaphore(_HANDED_OVER_MAX)
        #: Where the next batch of each partition that is read starts.
        self._positions: dict[TopicPartition, int] = {}
        self._wanted = _Assignment({})
        self._known_topics: set[str] = set()

    async def start(self) -> None:
        """Begins to connect, in the background."""
        self._loop = asyncio.get_running_loop()
        self._consumer = Consumer(self._options, logger=logger)
        # A second one, because each call to one that is polled waits for its poll to end.
        self._asker = Consumer(self._options, logger=logger)
        self._thread = threading.Thread(target=self._read, name="kafka reader", daemon=True)
        self._thread.start()

    async def stop(self) -> None:
        """Idempotent."""
        if self._thread is not None:
            thread, self._thread = self._thread, None
            self._wanted = _Assignment({})
            self._stopping.set()
            await in_thread(thread.join)
            await in_thread(self._asker.close)

    async def watermarks(self, topic_partitions: Collection[TopicPartition]) -> Mapping[TopicPartition, Watermarks]:
        """See streams.ports.PartitionLog; without the topics' ids. Raises KafkaUnavailableError."""
        return {each: await in_thread(self._watermarks_of, each) for each in topic_partitions}

    def _watermarks_of(self, topic_partition: TopicPartition) -> Watermarks:
        try:
            marks = self._asker.get_watermark_offsets(
                KafkaTopicPartition(*topic_partition), timeout=_WATERMARK_SECONDS_MAX
            )
        except (KafkaException, RuntimeError) as error:  # RuntimeError: it is closed
            marks, fault = None, error
        else:
            fault = None
        if marks is None:
            raise KafkaUnavailableError(
                f"Kafka does not say what {topic_partition} holds: {fault or 'no answer in time'}",
                hint="check the topic and the brokers",
            ) from fault
        return Watermarks(*marks)

    async def read_from(self, positions: Mapping[TopicPartition, int]) -> None:
        """See streams.ports.PartitionLog."""
        self._positions |= positions
        self._wanted = _Assignment(dict(self._positions))

    def stop_reading(self, topic_partitions: Collection[TopicPartition]) -> None:
        """See streams.ports.PartitionLog."""
        if self._positions.keys() & set(topic_partitions):
            self._positions = {each: at for each, at in self._positions.items() if each not in topic_partitions}
            self._wanted = _Assignment(dict(self._positions))

    def _read(self) -> None:
        """On its own thread. What it hands over belongs to the assignment under which it was polled."""
        assigned, positions = _Assignment({}), dict[TopicPartition, int]()
        while not self._stopping.is_set():
            try:
                if self._wanted is not assigned:
                    wanted = self._wanted
                    self._look_up({each.topic for each in wanted.positions})
                    self._consumer.assign([KafkaTopicPartition(*each, at) for each, at in wanted.positions.items()])
                    assigned, positions = wanted, dict(wanted.positions)
                if self._room.acquire(timeout=_POLL_SECONDS):
                    self._hand_over(assigned, positions)
            except Exception:  # the boundary of a thread that nobody waits for: what is wrong may pass
                if self._loop.is_closed():
                    break
                logger.exception("reading %s goes on in a moment", ", ".join(map(str, assigned.positions)))
                assigned = _Assignment({})  # whatever was polled and not handed over is read again
                self._stopping.wait(_RETRY_SECONDS_MAX)
        self._consumer.close()

    def _look_up(self, topics: set[str]) -> None:
        """librdkafka asks once a second who leads the partitions of topics that it does not know, and reads nothing of
        them until then; so it is asked first."""
        for topic in topics - self._known_topics:
            with contextlib.suppress(KafkaException):  # then it finds out by itself
                self._consumer.list_topics(topic, _LOOK_UP_SECONDS_MAX)
                self._known_topics.add(topic)

    def _hand_over(self, assigned: _Assignment, positions: dict[TopicPartition, int]) -> None:
        """Gives the loop what is there, or the room back."""
        is_handed_over = False
        try:
            if read := _read_of(self._polled(), positions):
                self._loop.call_soon_threadsafe(self._take, assigned, read)
                is_handed_over = True
        finally:
            if not is_handed_over:
                self._room.release()

    def _polled(self) -> list[Message]:
        """What is there, waiting a moment for the first of it."""
        messages: list[Message] = []
        size_bytes, seconds = 0, _POLL_SECONDS
        while len(messages) < _BATCH_RECORDS_MAX and size_bytes < _BATCH_BYTES_MAX:
            message = self._consumer.poll(seconds)
            if message is None:
                break
            messages.append(message)
            size_bytes += len(message.value() or b"")
            seconds = 0
        return messages

    def _take(self, assigned: _Assignment, read: list[RecordBatch | _Fault]) -> None:
        """On the loop."""
        self._room.release()
        for each in read:
            if assigned is not self._wanted:
                return  # the newer assignment reads it again
            if isinstance(each, _Fault):
                self._report(*each)
            else:
                self._positions[each.topic_partition] = each.next_offset
                self._deliver(each)

    def _report(self, topic_partition: TopicPartition, error: KafkaError) -> None:
        if error.code() == KafkaError._AUTO_OFFSET_RESET:
            self.stop_reading([topic_partition])
            self._on_out_of_range(topic_partition)
        elif error.code() in _UNREADABLE:
            self.stop_reading([topic_partition])  # nothing that comes behind it is taken
            self._on_unreadable(topic_partition, error.str())
        else:  # librdkafka goes on by itself
            logger.warning("reading %s: %s", topic_partition, error.str())


def _read_of(messages: list[Message], positions: dict[TopicPartition, int]) -> list[RecordBatch | _Fault]:
    """Batches, each starting where the one before it of its partition ended, which `positions` says and learns; a fault
    stands where it came."""
    read: list[RecordBatch | _Fault] = []
    by_partition: dict[TopicPartition, list[Message]] = {}

    def end_batches() -> None:
        for topic_partition, group in by_partition.items():
            batch = _batch_of(topic_partition, positions[topic_partition], group)
            positions[topic_partition] = batch.next_offset
            read.append(batch)
        by_partition.clear()

    for message in messages:
        topic_partition = TopicPartition(message.topic(), message.partition())
        if (error := message.error()) is not None:
            end_batches()
            read.append(_Fault(topic_partition, error))
        else:
            by_partition.setdefault(topic_partition, []).append(message)
    end_batches()
    return read


def _batch_of(topic_partition: TopicPartition, position: int, messages: list[Message]) -> RecordBatch:
    values = [message.value() for message in messages]
    keys = [message.key() for message in messages]
    return RecordBatch(
        topic=topic_partition.topic,
        partition=topic_partition.partition,
        first_offset=position,
        next_offset=messages[-1].offset() + 1,
        values=values,
        keys=keys,
        offsets=[message.offset() for message in messages],
        timestamps_ms=[message.timestamp()[1] for message in messages],
        headers={
            index: headers_of(headers)
            for index, message in enumerate(messages)
            if (headers := message.headers()) is not None
        },
        size_bytes=size_of(values, keys),
    )


class RdKafkaTail:
    """Delivers what comes to one partition from its start on, and nothing that was there before. What cannot be read is
    skipped: whoever waits for it has a deadline."""

    def __init__(
        self,
        settings: Settings,
        topic_partition: TopicPartition,
        *,
        client_id: str,
        group: str,
        deliver: Callable[[RecordBatch], None],
    ) -> None:
        self._topic_partition = topic_partition
        self._what = f"reading {topic_partition} from its end"
        self._log = RdKafkaLog(
            settings,
            client_id=client_id,
            group=group,
            deliver=deliver,
            on_out_of_range=lambda _: self._begin(),
            on_unreadable=lambda _, why: self._skip(why),
        )
        self._beginning: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Nothing that is written after this returns is missed. Raises KafkaUnavailableError."""
        await self._log.start()
        try:
            async with asyncio.timeout(_START_SECONDS_MAX):  # leaders of new partitions take a moment
                await retrying(self._seek_to_end, what=self._what, backoff=Backoff(first_seconds=0.05))
        except TimeoutError as error:
            raise KafkaUnavailableError(
                f"{self._topic_partition} cannot be read", hint="check the topic and the brokers"
            ) from error

    async def stop(self) -> None:
        """Idempotent."""
        if self._beginning is not None:
            self._beginning.cancel()
            await asyncio.wait([self._beginning])
        await self._log.stop()

    def _skip(self, why: str) -> None:
        logger.warning("%s: %s; going on at its end", self._topic_partition, why)
        self._begin()

    def _begin(self) -> None:
        if self._beginning is None or self._beginning.done():
            beginning = persisting(
                self._seek_to_end, what=self._what, backoff=Backoff(ceiling_seconds=_RETRY_SECONDS_MAX)
            )
            self._beginning = asyncio.create_task(beginning)

    async def _seek_to_end(self) -> None:
        marks = await self._log.watermarks([self._topic_partition])
        await self._log.read_from({self._topic_partition: marks[self._topic_partition].high})
