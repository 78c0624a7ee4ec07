"""Notices that a consumer has silently dropped out of its group.

aiokafka parks its group task until somebody picks up its error, and Faust never does; and when that task ends, nobody
is told at all. Either leaves a member that believes to own its partitions and is never asked again. So every second the
parked error is picked up, upon which the member joins again, and signs of life are looked for: a heartbeat that
succeeded, a generation that was joined. Without any, while aiokafka knows no reason (it looks for the coordinator while
that is away), the worker ends with GroupSilentError: whatever restarts it brings it back as a static member.

Called by agents/transport.py, on the consumer's thread.
"""

from __future__ import annotations

import logging
import os
import threading
from typing import Any

from aiokafka.errors import KafkaError

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
    """Watches one aiokafka GroupCoordinator, of which it replaces the heartbeat by one that is counted."""

    def __init__(self, coordinator: Any) -> None:
        self._coordinator = coordinator
        self._heartbeats = 0
        self._seen: tuple[int, int] = (0, -1)
        self._silent_checks = 0
        send_heartbeat = coordinator._do_heartbeat

        async def counted() -> bool:
            is_alive: bool = await send_heartbeat()
            self._heartbeats += is_alive
            return is_alive

        coordinator._do_heartbeat = counted

    def check(self) -> None:
        """To be called every CHECK_SECONDS. Raises GroupSilentError."""
        coordinator = self._coordinator
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
