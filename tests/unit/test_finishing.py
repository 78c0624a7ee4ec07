"""Calls that have ended when their await ends, also when it is cancelled."""

from __future__ import annotations

import asyncio
import threading

import pytest

from streams.finishing import all_ended, in_thread

SECONDS_MAX = 20


async def test_a_cancelled_call_has_ended_before_the_cancellation_arrives() -> None:
    began, may_end, ended = threading.Event(), threading.Event(), threading.Event()

    def work() -> None:
        began.set()
        assert may_end.wait(SECONDS_MAX)
        ended.set()

    calling = asyncio.create_task(in_thread(work))
    await asyncio.to_thread(began.wait, SECONDS_MAX)
    calling.cancel()
    await asyncio.sleep(0)
    calling.cancel()
    await asyncio.sleep(0)
    assert not calling.done()
    may_end.set()
    with pytest.raises(asyncio.CancelledError):
        await calling
    assert ended.is_set()


async def test_a_call_gives_its_result_and_its_failure() -> None:
    assert await in_thread(divmod, 7, 2) == (3, 1)
    with pytest.raises(ZeroDivisionError):
        await in_thread(divmod, 7, 0)


async def test_all_calls_end_before_the_failure_of_one_is_raised() -> None:
    may_end, ended = asyncio.Event(), []

    async def fails() -> None:
        raise KeyError("first")

    async def takes_long() -> None:
        await may_end.wait()
        ended.append(True)

    calling = asyncio.create_task(all_ended([fails(), takes_long()]))
    await asyncio.sleep(0)
    calling.cancel()
    may_end.set()
    with pytest.raises(asyncio.CancelledError):
        await calling
    assert ended == [True]
    with pytest.raises(KeyError):
        await all_ended([fails(), takes_long()])
    assert ended == [True, True]
