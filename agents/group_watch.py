"""Notices that a consumer has silently dropped out of its group.

aiokafka parks its group task until somebody picks up its error, and Faust never does; and when that task ends, nobody
is told at all. Either leaves a member that believes to own its partitions and is never asked again. So every second the
parked error is picked up, upon which the member joins again, and signs of life are looked for: a heartbeat that
succeeded, a generation that was joined. Without any, while aiokafka knows no reason (it looks for the coordinator while
that is away), the worker ends with GroupSilentError: whatever restarts it brings it back as a static member.

Before the member joins again it is made sure that no other process has taken its name meanwhile: that one would be
fenced. Then the worker ends with WorkerNameTakenError (agents/worker_name.py).

Called by agents/transport.py, on the consumer's thread.
"""

from __future__ import annotations

import asyncio
import logging
import os
import threading
import time
from collections.abc import Callable
from typing import Any

from aiokafka.errors import KafkaError

from agents.worker_name import is_replaced, name_taken
from streams import telemetry
from streams.errors import GroupSilentError

logger = logging.getLogger(__name__)

CHECK_SECONDS = 1.0
#: Longer than a session time-out and than a join, which waits for the slowest member's revoke. Checks are counted, not
#: time: a process that was stopped for an hour is not silent when it wakes up.
SILENT_CHECKS_MAX = 60
#: Time to stop in order after that.
ORDERLY_END_SECONDS_MAX = 10.0


class GroupWatch:
    """Watches one aiokafka GroupCoordinator. It replaces the heartbeat by one that is counted, and joining by what asks
    first. `confirm` is told when the group last knew the member."""

    def __init__(self, coordinator: Any, confirm: Callable[[float], None] = lambda _: None) -> None:
        self._coordinator = coordinator
        #: As which the group knew this worker last; aiokafka forgets it before it joins anew.
        self._member_id: str = coordinator.member_id
        self._replaced = False
        self._heartbeats = 0
        self._seen: tuple[int, int] = (0, -1)
        self._silent_checks = 0
        send_heartbeat = coordinator._do_heartbeat

        async def counted() -> bool:
            sent_at = time.monotonic()
            is_alive: bool = await send_heartbeat()
            if is_alive:
                self._heartbeats += 1
                confirm(sent_at)
            return is_alive

        coordinator._do_heartbeat = counted
        join = coordinator._do_rejoin_group

        async def join_unless_replaced(subscription: Any) -> bool:
            if self._member_id and await is_replaced(coordinator, self._member_id):
                self._replaced = True
                await asyncio.Event().wait()  # the next check ends the worker
            has_joined: bool = await join(subscription)
            self._member_id = coordinator.member_id or self._member_id
            return has_joined

        coordinator._do_rejoin_group = join_unless_replaced

    def check(self) -> None:
        """To be called every CHECK_SECONDS. Raises GroupSilentError and WorkerNameTakenError."""
        coordinator = self._coordinator
        if self._replaced:
            raise name_taken(coordinator._group_instance_id, coordinator.group_id, "a process")
        if coordinator._coordination_task.done():
            raise GroupSilentError(f"the group task of {coordinator.group_id} has ended", hint=_HINT)
        try:
            coordinator.check_errors()
        except KafkaError as error:
            logger.error("consumer group: %r; the member joins again", error)
        signs = (self._heartbeats, coordinator.generation)
        is_looking = coordinator.coordinator_id is None
        self._silent_checks = 0 if is_looking or signs != self._seen else self._silent_checks + 1
        self._seen = signs
        telemetry.GROUP_SILENCE_SECONDS.set(self._silent_checks * CHECK_SECONDS)
        if self._silent_checks >= SILENT_CHECKS_MAX:
            raise GroupSilentError(
                f"no heartbeat and no join of {coordinator.group_id} for {self._silent_checks * CHECK_SECONDS:.0f} s",
                hint=_HINT,
            )


def end_for_sure(seconds: float = ORDERLY_END_SECONDS_MAX) -> None:
    """Ends the process with a failure if it has not ended in order by then: to stop an app whose consumer is broken may
    take for ever, and whatever is durable outlives any end."""
    killer = threading.Timer(seconds, os._exit, [1])
    killer.daemon = True
    killer.start()


_HINT = "the worker ends, so that it is started again; if it repeats, look at the brokers' log for this group"
