"""Slots for queries, given in turns: a caller who asks a thousand at once waits for itself, not the others for it.

Free slots go round the callers who wait, one each; of one caller's requests the oldest is first. For one event loop.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict, deque


class FairSlots:
    """`acquire(caller)` waits for a slot, `release()` gives one back."""

    def __init__(self, slots: int) -> None:
        self._free = slots
        #: Callers in the order of their turns -> their waiting requests, oldest first. No queue is empty.
        self._waiting: OrderedDict[str, deque[asyncio.Future[None]]] = OrderedDict()

    async def acquire(self, caller: str) -> None:
        """Returns with a slot; one that is cancelled has none."""
        if self._free:
            self._free -= 1
            return
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.setdefault(caller, deque()).append(turn)
        try:
            await turn
        except asyncio.CancelledError:
            if turn.done() and not turn.cancelled():  # it was given the slot in the moment in which it was cancelled
                self.release()
            else:
                self._leave(caller, turn)
            raise

    def release(self) -> None:
        """The caller whose turn it is gets the slot, and is the last in line from then on."""
        while self._waiting:
            caller, queue = self._waiting.popitem(last=False)
            turn = queue.popleft()
            if queue:
                self._waiting[caller] = queue
            if not turn.done():  # else its request was cancelled and has not come round to leave
                turn.set_result(None)
                return
        self._free += 1

    def _leave(self, caller: str, turn: asyncio.Future[None]) -> None:
        queue = self._waiting.get(caller, deque())
        if turn in queue:
            queue.remove(turn)
            if not queue:
                del self._waiting[caller]
