"""Retries with exponential back-off and jitter, in one place."""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import TypeVar

from aiokafka.errors import KafkaError

from streams.errors import PintailError

logger = logging.getLogger(__name__)
Result = TypeVar("Result")

_DOUBLINGS_MAX = 64


@dataclass
class Backoff:
    """Delays that double from `first_seconds` to `ceiling_seconds`, each shortened by a random part of up to a half."""

    first_seconds: float = 0.1
    ceiling_seconds: float = 30.0
    failures: int = 0

    def next_delay_seconds(self) -> float:
        """The delay after one more failure."""
        # The exponent is bounded as well: hours of failures would leave the range of floating point.
        delay = min(self.ceiling_seconds, self.first_seconds * 2.0 ** min(self.failures, _DOUBLINGS_MAX))
        self.failures += 1
        return delay * random.uniform(0.5, 1.0)  # noqa: S311  # jitter, not a secret

    def reset(self) -> None:
        """The next delay is the first one again."""
        self.failures = 0


async def retrying(action: Callable[[], Awaitable[Result]], *, what: str, backoff: Backoff) -> Result:
    """Repeats `action` while it fails in a way that may pass; raises what will not. Cancel it to give up.

    Every Kafka error is repeated, also one that an operator has to correct first (a missing permission, say): giving up
    would lose what `action` was to write.
    """
    while True:
        try:
            return await action()
        except (KafkaError, PintailError, ConnectionError) as error:
            if isinstance(error, PintailError) and not error.retriable:
                raise
            delay = backoff.next_delay_seconds()
            logger.warning("%s failed, again in %.1f s: %r", what, delay, error)
            await asyncio.sleep(delay)


async def persisting(action: Callable[[], Awaitable[Result]], *, what: str, backoff: Backoff) -> Result:
    """Repeats `action` whatever it raises: for tasks of their own, whose early end nobody would notice. Cancel it to
    give up."""
    while True:
        try:
            return await action()
        except Exception as error:  # noqa: BLE001  # the boundary of a task that nobody waits for
            delay = backoff.next_delay_seconds()
            logger.warning("%s failed, again in %.1f s: %s", what, delay, in_words(error))
            await asyncio.sleep(delay)


def in_words(error: BaseException) -> str:
    """A failure for a log or a status page: operating errors speak for themselves, others need their type. Keep this
    text, not the error: its traceback would keep every batch that its frames hold."""
    return str(error) if isinstance(error, PintailError) else f"{type(error).__name__}: {error}".removesuffix(": ")
