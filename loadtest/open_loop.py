"""An open-loop sender: every event has a moment at which it is due, and is sent then or as soon after as possible.

Latencies count from the due moment, so a system that stalls the sender is charged for every event that had to wait (no
coordinated omission). The sender is a process of its own: who asks must not delay who writes.
"""

from __future__ import annotations

import math
import multiprocessing
import threading
import time
from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from multiprocessing.connection import Connection
from typing import NamedTuple

from confluent_kafka import KafkaError, Message, Producer

from loadtest.preload import producer_options
from loadtest.publisher import PublishingError

_TICK_SECONDS = 0.002
_POLL_EVERY = 1_000


class Event(NamedTuple):
    """One record to send. Without a partition, the key chooses one."""

    topic: str
    key: bytes | None
    value: bytes | None
    partition: int = -1


class Phase(NamedTuple):
    """So many events per second for so long."""

    seconds: float
    rate: float


class Schedule:
    """When each event is due, in seconds after the start. Event n of a phase is due n / rate after its beginning."""

    def __init__(self, phases: Sequence[Phase]) -> None:
        self._phases = [phase for phase in phases if phase.seconds * phase.rate >= 1]
        self._begins = [0.0, *accumulate(phase.seconds for phase in self._phases)]
        self._firsts = [0, *accumulate(int(phase.seconds * phase.rate) for phase in self._phases)]

    @property
    def events(self) -> int:
        """How many in all."""
        return self._firsts[-1]

    @property
    def seconds(self) -> float:
        """How long the phases take."""
        return self._begins[-1]

    def due_at(self, number: int) -> float:
        """When event `number` is due."""
        assert 0 <= number < self.events
        phase = bisect_right(self._firsts, number) - 1
        return self._begins[phase] + (number - self._firsts[phase]) / self._phases[phase].rate

    def due(self, seconds: float) -> int:
        """How many events are due by then."""
        phase = bisect_right(self._begins, seconds) - 1
        if phase < 0:
            return 0
        if phase >= len(self._phases):
            return self.events
        within = math.floor((seconds - self._begins[phase]) * self._phases[phase].rate + 1e-6) + 1
        return min(self._firsts[phase] + within, self._firsts[phase + 1])


def stretched(phases: Sequence[Phase], *, scale: float = 1.0, seconds: float | None = None) -> tuple[Phase, ...]:
    """The phases with `scale` times the rates, in `seconds` altogether."""
    factor = 1.0 if seconds is None else seconds / sum(phase.seconds for phase in phases)
    return tuple(Phase(phase.seconds * factor, phase.rate * scale) for phase in phases)


@dataclass(frozen=True)
class Sent:
    """What a sender says at its end."""

    events: int
    #: How much later than due the latest event was handed to the producer.
    late_ms_max: float


class OpenLoopSender:
    """Sends `maker(number)` for every event of the phases, in a process of its own. `maker` can be imported by name."""

    def __init__(
        self,
        bootstrap_servers: str,
        maker: Callable[[int], Event],
        phases: Sequence[Phase],
    ) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_send, args=(bootstrap_servers, maker, tuple(phases), theirs))
        self._process.start()
        assert self._process.pid is not None
        self.pid = self._process.pid
        theirs.close()
        self._receive()  # it is connected and waits

    def start(self, moment: float) -> None:
        """`moment` (time.monotonic, which all processes share) is when event 0 is due."""
        self._pipe.send(moment)

    @property
    def is_over(self) -> bool:
        """True once everything is acknowledged, or it failed."""
        return self._pipe.poll() or not self._process.is_alive()

    def result(self) -> Sent:
        """Waits for the end. Raises PublishingError."""
        sent = self._receive()
        self._process.join()
        assert isinstance(sent, Sent)
        return sent

    def stop(self) -> None:
        """Ends it wherever it is. Idempotent."""
        self._process.kill()
        self._process.join()

    def _receive(self) -> object:
        try:
            said: object = self._pipe.recv()
        except EOFError:
            said = "the sender ended early"
        if isinstance(said, str) and said:
            raise PublishingError(f"the sender failed: {said}", hint="check that the broker runs")
        return said


def _send(bootstrap_servers: str, maker: Callable[[int], Event], phases: Sequence[Phase], pipe: Connection) -> None:
    """The sender's process: says "" when it is ready, then waits for its start, then says what it Sent."""
    faults: list[str] = []

    def delivered(error: KafkaError | None, _: Message) -> None:
        if error is not None:
            faults.append(error.str())

    producer = Producer(producer_options(bootstrap_servers) | {"delivery.report.only.error": True})
    schedule, pause = Schedule(phases), threading.Event()
    first = maker(0)
    producer.list_topics(first.topic, timeout=30)
    pipe.send("")
    started: float = pipe.recv()
    number, late_max = 0, 0.0
    while number < schedule.events and not faults:
        now = time.monotonic() - started
        due = schedule.due(now)
        if number < due:
            late_max = max(late_max, now - schedule.due_at(number))
        for each in range(number, min(due, number + _POLL_EVERY)):
            topic, key, value, partition = maker(each)
            while True:
                try:
                    producer.produce(topic, value, key, partition, on_delivery=delivered)
                    break
                except BufferError:  # the broker is behind; the wait counts, since the event was due before it
                    producer.poll(0.05)
            number = each + 1
        producer.poll(0)
        if number >= due:
            pause.wait(_TICK_SECONDS)
    unsent = producer.flush(60)
    if faults or unsent:
        pipe.send(faults[0] if faults else f"{unsent} events were not acknowledged")
    else:
        pipe.send(Sent(number, late_max * 1000))
