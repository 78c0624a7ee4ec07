"""Calls that have ended when their `await` ends, also when it is cancelled.

A cancelled `asyncio.to_thread` leaves its thread running: it would write into a descriptor that is closed by then, or
open a file that nobody is going to close. Whatever touches files or a partition's lifetime goes through here instead,
which is what lets a revoked partition be let go of completely (invariant 5).
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Sequence
from contextvars import copy_context
from functools import partial
from typing import Any, TypeVar

Result = TypeVar("Result")


async def in_thread(action: Callable[..., Result], *arguments: Any) -> Result:
    """Runs a blocking call in a thread that does not outlive the `await`: cancelled, it first waits for the call."""
    context = copy_context()
    call = asyncio.get_running_loop().run_in_executor(None, partial(context.run, action, *arguments))
    await ended([call])
    return call.result()


async def all_ended(calls: Sequence[Coroutine[Any, Any, None]]) -> None:
    """Runs the calls side by side to their ends, also when cancelled; then raises the first failure, if any."""
    tasks = [asyncio.create_task(call) for call in calls]
    await ended(tasks)
    for task in tasks:
        task.result()


async def ended(futures: Sequence[asyncio.Future[Any]]) -> None:
    """Waits for all, whatever becomes of them; a cancellation is held back until then."""
    is_cancelled = False
    while pending := [future for future in futures if not future.done()]:
        try:
            await asyncio.wait(pending)
        except asyncio.CancelledError:
            is_cancelled = True
    for future in futures:
        if not future.cancelled():
            future.exception()  # retrieved, so that a second failure is not reported as one that nobody saw
    if is_cancelled:
        raise asyncio.CancelledError
