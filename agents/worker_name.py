"""One process per worker name (ADR 11): what keeps two that were started under one name from harming each other.

On one data directory a lock file decides: the second process does not start. On two, the group gives the name to
whoever joined last (KIP-345). The older process may be a zombie that was stopped and goes on, or a mistake; left to
itself it would join again under its name, fence the newer one, be fenced by that, and so on. So before it joins again
it asks whether it has been replaced; then it ends at once, as after a `kill -9`, and leaves a note. A process that
finds the note joins only once nobody is in the group under its name, so that whatever restarts it does no harm.

Called by agents/__main__.py, agents/app.py and agents/group_watch.py.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from aiokafka.errors import KafkaError
from aiokafka.protocol.api import Request, RequestStruct
from aiokafka.protocol.group import HeartbeatResponse_v1
from aiokafka.protocol.types import Int32, Schema, String

from streams.adapters.duckdb_file import FileLock
from streams.adapters.kafka_groups import describe_group
from streams.config import Settings
from streams.errors import ConfigurationError, StoreLockedError, WorkerNameTakenError

logger = logging.getLogger(__name__)

#: FENCED_INSTANCE_ID: another member has joined under the same group.instance.id.
_FENCED = 82


def hold_name(settings: Settings, kind: str) -> None:
    """Keeps the name for this process on this data directory until the process ends, however it ends.

    Raises WorkerNameTakenError that names the process which holds it."""
    path = settings.data_dir / f"{kind}-{settings.worker}.lock"
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        FileLock(path, signed=True)
    except StoreLockedError:
        raise WorkerNameTakenError(
            f"{kind} worker {settings.worker!r} runs on this data directory already, as process {path.read_text()}",
            hint=f"stop that process (kill -9 if it hangs), or give this one a PINTAIL_WORKER of its own; {path}",
        ) from None


async def check_name(settings: Settings, group: str) -> None:
    """Before joining: a process that was fenced may go on only when its name is free.

    Raises WorkerNameTakenError that says where the one is that has it, and ConfigurationError without Kafka."""
    note = _note(settings, group)
    if not note.exists():
        return
    try:
        described = await describe_group(settings, group)
    except KafkaError as error:
        raise ConfigurationError(f"Kafka at {settings.kafka}: {error!r}", hint="check PINTAIL_KAFKA") from error
    holders = [member.host for member in described.members if member.client_id == client_id(settings, group)]
    if holders:
        raise name_taken(settings.worker, group, f"a process on {holders[0]}")
    note.unlink()


def note_fenced(settings: Settings, group: str) -> None:
    """For `check_name` of the next process on this data directory."""
    _note(settings, group).touch()


def client_id(settings: Settings, group: str) -> str:
    """By which the group's description shows a worker."""
    return f"{group}-{settings.worker}"


def name_taken(worker: str, group: str, by: str) -> WorkerNameTakenError:
    """The error of the older process."""
    return WorkerNameTakenError(
        f"worker {worker!r} has been replaced in group {group} by {by} that joined later under the same name",
        hint="nothing is lost: that one goes on. If both are to run, give this one a PINTAIL_WORKER of its own; "
        "if this one is to go on, stop the other and start this one again",
    )


async def is_replaced(coordinator: Any, member_id: str) -> bool:
    """Asks the group whether another process has joined under this worker's name since `member_id` was given out.
    No, if the broker knows no such heartbeat. Raises KafkaError."""
    await coordinator.ensure_coordinator_known()
    heartbeat = _StaticHeartbeat(
        coordinator.group_id, coordinator.generation, member_id, coordinator._group_instance_id
    )
    try:
        answer = await coordinator._send_req(heartbeat)
    except NotImplementedError:  # aiokafka's word for a version that a broker does not speak: before Kafka 2.3
        return False
    return bool(answer.error_code == _FENCED)


def _note(settings: Settings, group: str) -> Path:
    return settings.data_dir / f"{client_id(settings, group)}.fenced"


class _StaticHeartbeatStruct(RequestStruct):  # type: ignore[misc]
    API_KEY = 12
    API_VERSION = 3
    RESPONSE_TYPE = HeartbeatResponse_v1
    SCHEMA = Schema(
        ("group", String("utf-8")),
        ("generation_id", Int32),
        ("member_id", String("utf-8")),
        ("group_instance_id", String("utf-8")),
    )


class _StaticHeartbeat(Request[_StaticHeartbeatStruct]):  # type: ignore[misc]
    """A heartbeat that names the static member, which aiokafka's does not: only to this one a broker answers that the
    member has been fenced."""

    API_KEY = 12

    def __init__(self, group: str, generation: int, member_id: str, group_instance_id: str) -> None:
        self._values = (group, generation, member_id, group_instance_id)

    def build(self, request_struct_class: type[_StaticHeartbeatStruct]) -> _StaticHeartbeatStruct:
        """See aiokafka.protocol.api.Request."""
        return request_struct_class(*self._values)
