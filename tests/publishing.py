"""A thread that writes numbers while workers and servers fail."""

from __future__ import annotations

import json
import threading

from confluent_kafka import KafkaError, Message, Producer


class NumberPublisher(threading.Thread):
    """Writes ascending numbers, each to every partition of a topic, until told to stop; with `poison` also that, to a
    partition in turn for every tenth number."""

    def __init__(
        self,
        bootstrap: str,
        topic: str,
        *,
        partitions: int,
        first: int = 0,
        pause_seconds: float,
        poison: bytes | None = None,
    ) -> None:
        super().__init__(name="publisher", daemon=True)
        # Idempotent: an outage of the broker must not double records in the log itself.
        self._producer = Producer({"bootstrap.servers": bootstrap, "enable.idempotence": True, "linger.ms": 5})
        self._topic = topic
        self._partitions = partitions
        self._pause_seconds = pause_seconds
        self._poison = poison
        self._enough = threading.Event()
        #: The next number.
        self.next = first
        #: Of the newest number in each partition, once `finish` has returned.
        self.last_offsets: dict[int, int] = {}

    def run(self) -> None:
        """See the class."""
        while not self._enough.wait(self._pause_seconds):
            value = json.dumps({"number": self.next})
            for partition in range(self._partitions):
                self._producer.produce(self._topic, value, partition=partition, on_delivery=self._on_delivery)
            if self._poison is not None and self.next % 10 == 0:
                self._producer.produce(self._topic, self._poison, partition=self.next // 10 % self._partitions)
            self.next += 1
            self._producer.poll(0)
        assert self._producer.flush(60) == 0

    def _on_delivery(self, error: KafkaError | None, message: Message) -> None:
        assert error is None, error
        self.last_offsets[int(message.partition())] = int(message.offset())

    def finish(self) -> None:
        """Stops; returns when every record is in the log."""
        self._enough.set()
        self.join()
