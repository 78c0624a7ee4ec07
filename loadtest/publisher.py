"""Publishes write events to Kafka as any upstream service would: keyed, compressed, idempotent, acknowledged by all.

Remembers the offset of the last record of every partition, which is what `at_least` of a query takes: ask with it and
the answer reflects everything that was published. Partitions are chosen by murmur2, as Kafka's own clients do. Used by
the demo and the load tests, from one thread.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable
from types import TracebackType
from typing import NamedTuple, Self

from confluent_kafka import KafkaError, Message, Producer

from schemas.errors import PintailError

#: A record that Kafka has not acknowledged by then has failed.
DELIVERY_SECONDS_MAX = 60
LINGER_MS = 5
_QUEUE_RECORDS_MAX = 200_000
#: How often delivery reports are picked up, in records.
_POLL_EVERY = 500


class PublishingError(PintailError):
    """Kafka did not acknowledge a record."""


class Published(NamedTuple):
    """Where one record is in the log."""

    topic: str
    partition: int
    offset: int


class Publisher:
    """A producer and its positions; a context manager. After `publish` records are on their way until `flush`."""

    def __init__(self, bootstrap_servers: str, *, linger_ms: int = LINGER_MS) -> None:
        self.acknowledged = 0
        #: topic -> partition -> offset of the last record that Kafka has acknowledged.
        self.last_offsets: defaultdict[str, dict[int, int]] = defaultdict(dict)
        self._newest: Message | None = None
        self._failure: KafkaError | None = None
        self._producer = Producer(
            {
                "bootstrap.servers": bootstrap_servers,
                "partitioner": "murmur2_random",
                "compression.type": "lz4",
                "acks": "all",
                "enable.idempotence": True,
                "delivery.timeout.ms": DELIVERY_SECONDS_MAX * 1000,
                "linger.ms": linger_ms,
                "log_level": 3,
                "batch.size": 256 * 1024,
                "queue.buffering.max.messages": _QUEUE_RECORDS_MAX,
            }
        )

    def close(self) -> None:
        """Sends what is still queued and disconnects. Idempotent."""
        self._producer.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def publish(
        self, events: Iterable[tuple[str, bytes, bytes | None]], progress: Callable[[int], None] = lambda _: None
    ) -> None:
        """Sends (topic, key, value) records; `progress` is told how many are acknowledged. Raises PublishingError."""
        for number, (topic, key, value) in enumerate(events):
            while True:
                try:
                    self._producer.produce(topic, key=key, value=value, on_delivery=self._delivered)
                    break
                except BufferError:  # the queue is full: wait until Kafka has taken something
                    self._poll(0.1)
            if number % _POLL_EVERY == 0:
                self._poll(0)
                progress(self.acknowledged)
        progress(self.acknowledged)

    def flush(self, progress: Callable[[int], None] = lambda _: None) -> None:
        """Returns once every record is acknowledged. Raises PublishingError."""
        while self._producer.flush(0.1):
            self._raise_on_failure()
            progress(self.acknowledged)
        self._raise_on_failure()
        progress(self.acknowledged)

    def publish_one(self, topic: str, key: bytes, value: bytes | None) -> Published:
        """Sends one record and waits for it; None as the value is a tombstone."""
        self.publish([(topic, key, value)])
        self.flush()
        assert self._newest is not None, "a record that did not fail was acknowledged"
        return Published(self._newest.topic(), self._newest.partition(), self._newest.offset())

    def _poll(self, seconds: float) -> None:
        self._producer.poll(seconds)
        self._raise_on_failure()

    def _raise_on_failure(self) -> None:
        if self._failure is not None:
            raise PublishingError(f"a record was not taken: {self._failure.str()}", hint="check that the broker runs")

    def _delivered(self, error: KafkaError | None, record: Message) -> None:
        if error is not None:
            self._failure = self._failure or error
            return
        self.acknowledged += 1
        self._newest = record
        self.last_offsets[record.topic()][record.partition()] = record.offset()
