"""The blocking client: the asyncio client on an event loop in a thread of its own. Safe to share between threads."""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import threading
from collections.abc import AsyncGenerator, Coroutine, Generator, Mapping
from types import TracebackType
from typing import Any, Literal, Self, TypeVar

from schemas.messages import AnswerLimits
from streams.client.answer import Answer
from streams.client.async_client import AsyncClient, Params, closed
from streams.client.subscription import Change
from streams.client.written import AtLeast, Written
from streams.config import Settings
from streams.errors import RequestTimeoutError
from streams.limits import (
    QUERY_DEADLINE_MS_DEFAULT,
    SUBSCRIPTION_EVERY_MS_DEFAULT,
    SUBSCRIPTION_LEASE_MS_DEFAULT,
)

T = TypeVar("T")


class _LoopThread:
    """An event loop that runs in the background until it is stopped."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="pintail-client", daemon=True)
        self._thread.start()
        self._stopping = threading.Lock()
        self._is_stopped = False

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        """Raises RequestTimeoutError if the loop is stopped before the work is done."""
        with self._stopping:
            if self._is_stopped:
                work.close()
                raise closed()
            future = asyncio.run_coroutine_threadsafe(work, self._loop)
        try:
            return future.result()
        except concurrent.futures.CancelledError:
            raise closed() from None
        except BaseException:
            future.cancel()  # Ctrl-C must not leave the request running
            raise

    def stop(self) -> None:
        """Ends what runs, so that nobody waits for it."""
        with self._stopping:
            self._is_stopped = True
            ending = asyncio.run_coroutine_threadsafe(self._end_all(), self._loop)
        ending.result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    async def _end_all(self) -> None:
        running = asyncio.all_tasks() - {asyncio.current_task()}
        for task in running:
            task.cancel()
        await asyncio.gather(*running, return_exceptions=True)
        await self._loop.shutdown_asyncgens()


class Client:
    """Asks queries and waits. `with Client.connect() as client: client.query("SELECT ...")`."""

    def __init__(self, thread: _LoopThread, client: AsyncClient) -> None:
        self._thread = thread
        self._client = client
        self._closed = False

    @classmethod
    def connect(cls, settings: Settings | None = None) -> Self:
        """See AsyncClient.connect."""
        thread = _LoopThread()
        try:
            return cls(thread, thread.run(AsyncClient.connect(settings)))
        except BaseException:
            thread.stop()
            raise

    def close(self) -> None:
        """Disconnects; whoever waits for an answer or a change gets a RequestTimeoutError. Idempotent."""
        if not self._closed:
            self._closed = True
            self._thread.run(self._client.close())
            self._thread.stop()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def query(
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
        """See AsyncClient.query."""
        return self._thread.run(
            self._client.query(
                sql,
                params,
                key=key,
                deadline_ms=deadline_ms,
                at_least=at_least,
                format=format,
                limits=limits,
                chunked=chunked,
                consistency=consistency,
            )
        )

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
    ) -> Generator[Change, None, None]:
        """`for change in client.subscribe(...)`; close it to end the subscription before its lease does. See
        AsyncClient.subscribe."""
        changes = self._client.subscribe(
            sql,
            params,
            key=key,
            partition=partition,
            every_ms=every_ms,
            lease_ms=lease_ms,
            deadline_ms=deadline_ms,
            at_least=at_least,
        )
        return self._each(changes)

    def _each(self, changes: AsyncGenerator[Change, None]) -> Generator[Change, None, None]:
        taking: set[asyncio.Task[Any]] = set()

        async def coming() -> Change | None:
            task = asyncio.current_task()
            assert task is not None
            taking.add(task)
            task.add_done_callback(taking.discard)
            return await anext(changes, None)

        async def end() -> None:
            if taking:  # what Ctrl-C interrupted is cancelled, and ends before the rest can
                await asyncio.wait(taking)
            await changes.aclose()

        try:
            while (change := self._thread.run(coming())) is not None:
                yield change
        finally:
            with contextlib.suppress(RequestTimeoutError):  # the client was closed, and the subscription with it
                self._thread.run(end())

    def publish(self, topic: str, value: Mapping[str, Any] | bytes | None, *, key: str | None = None) -> Written:
        """See AsyncClient.publish."""
        return self._thread.run(self._client.publish(topic, value, key=key))
