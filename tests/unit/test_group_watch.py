"""A consumer that drops out of its group without a word ends its worker; one that only waits does not."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from types import SimpleNamespace
from typing import Any

import pytest
from aiokafka.consumer.group_coordinator import GroupCoordinator
from aiokafka.errors import KafkaError

from agents.assignor import CONFIRMED_CHECK_SECONDS, Membership
from agents.group_watch import SILENT_CHECKS_MAX, GroupWatch
from streams.errors import GroupSilentError, WorkerNameTakenError


class Coordinator:
    """What GroupWatch sees of aiokafka's GroupCoordinator."""

    def __init__(self) -> None:
        self.group_id = "pintail-store"
        self.generation = 7
        self.coordinator_id: int | None = 0
        self.member_id = "store-0-first"
        #: Under the worker's name, as the group knows it.
        self.member_known = "store-0-first"
        self.joins = 0
        self.answers = True
        self.errors: list[Exception] = []
        self._group_instance_id = "store-0"
        self._coordination_task = asyncio.create_task(asyncio.Event().wait())

    async def _do_heartbeat(self) -> bool:
        return self.answers

    async def _do_rejoin_group(self, subscription: object) -> bool:
        del subscription
        self.joins += 1
        self.member_id = self.member_known = f"store-0-joined-{self.joins}"
        return True

    async def ensure_coordinator_known(self) -> None:
        pass

    async def _send_req(self, heartbeat: Any) -> Any:
        *_, member_id, group_instance_id = heartbeat.prepare({12: (0, 4)}).__dict__.values()
        assert group_instance_id == self._group_instance_id
        return SimpleNamespace(error_code=0 if member_id == self.member_known else 82)

    def check_errors(self) -> None:
        if self.errors:
            raise self.errors.pop()


@pytest.fixture
async def coordinator() -> AsyncIterator[Coordinator]:
    coordinator = Coordinator()
    yield coordinator
    coordinator._coordination_task.cancel()


def keep_silent(watch: GroupWatch, checks: int) -> None:
    for _ in range(checks):
        watch.check()


async def test_silence_ends_the_worker_and_names_the_group(coordinator: Coordinator) -> None:
    watch = GroupWatch(coordinator)
    keep_silent(watch, SILENT_CHECKS_MAX)
    with pytest.raises(GroupSilentError, match="pintail-store"):
        watch.check()


async def test_heartbeats_that_succeed_are_signs_of_life_and_others_are_not(coordinator: Coordinator) -> None:
    watch = GroupWatch(coordinator)
    keep_silent(watch, SILENT_CHECKS_MAX)
    assert await coordinator._do_heartbeat()
    keep_silent(watch, SILENT_CHECKS_MAX)
    coordinator.answers = False
    assert not await coordinator._do_heartbeat()
    with pytest.raises(GroupSilentError):
        watch.check()


async def test_a_generation_that_was_joined_is_a_sign_of_life(coordinator: Coordinator) -> None:
    watch = GroupWatch(coordinator)
    for generation in range(3):
        coordinator.generation = generation
        keep_silent(watch, SILENT_CHECKS_MAX)


async def test_while_aiokafka_looks_for_the_coordinator_nobody_is_silent(coordinator: Coordinator) -> None:
    watch = GroupWatch(coordinator)
    coordinator.coordinator_id = None
    keep_silent(watch, 3 * SILENT_CHECKS_MAX)


async def test_a_parked_error_is_picked_up_so_that_the_member_joins_again(
    coordinator: Coordinator, caplog: pytest.LogCaptureFixture
) -> None:
    coordinator.errors.append(KafkaError("no permission"))
    GroupWatch(coordinator).check()
    assert coordinator.errors == []
    assert "no permission" in caplog.text


async def test_a_group_task_that_has_ended_ends_the_worker_at_once(coordinator: Coordinator) -> None:
    watch = GroupWatch(coordinator)
    coordinator._coordination_task.cancel()
    await asyncio.wait({coordinator._coordination_task})
    with pytest.raises(GroupSilentError, match="has ended"):
        watch.check()


async def test_a_member_that_was_forgotten_joins_again(coordinator: Coordinator) -> None:
    watch = GroupWatch(coordinator)
    for _ in range(2):
        coordinator.member_id = ""
        assert await coordinator._do_rejoin_group(None)
        watch.check()
    assert coordinator.joins == 2


async def test_a_member_whose_name_another_process_has_does_not_join_again_and_ends_the_worker(
    coordinator: Coordinator,
) -> None:
    watch = GroupWatch(coordinator)
    coordinator.member_id, coordinator.member_known = "", "store-0-other"
    joining = asyncio.create_task(coordinator._do_rejoin_group(None))
    for _ in range(10):
        await asyncio.sleep(0)
    with pytest.raises(WorkerNameTakenError, match="'store-0' has been replaced in group pintail-store"):
        watch.check()
    joining.cancel()
    assert coordinator.joins == 0


async def test_a_worker_that_was_stopped_waits_until_its_group_has_known_it_again(coordinator: Coordinator) -> None:
    membership = Membership("store-0")
    GroupWatch(coordinator, membership.confirm)
    await membership.confirmed(10)
    membership.confirm(time.monotonic() - 11)
    waiting = asyncio.create_task(membership.confirmed(10))
    coordinator.answers = False
    await coordinator._do_heartbeat()
    done, _ = await asyncio.wait({waiting}, timeout=2 * CONFIRMED_CHECK_SECONDS)
    assert not done
    coordinator.answers = True
    await coordinator._do_heartbeat()
    await waiting


async def test_a_worker_that_was_stopped_while_it_joined_waits_for_a_heartbeat(
    coordinator: Coordinator, monkeypatch: pytest.MonkeyPatch
) -> None:
    a_minute_ago = time.monotonic() - 60
    monkeypatch.setattr("agents.assignor.time", SimpleNamespace(monotonic=lambda: a_minute_ago))
    membership = Membership("store-0")
    membership.subscription_data()
    monkeypatch.undo()  # the group has answered, and the process was stopped until now
    membership.accept(b"{}")
    waiting = asyncio.create_task(membership.confirmed(10))
    done, _ = await asyncio.wait({waiting}, timeout=2 * CONFIRMED_CHECK_SECONDS)
    assert not done
    GroupWatch(coordinator, membership.confirm)
    await coordinator._do_heartbeat()
    await waiting


async def test_a_worker_that_has_just_joined_need_not_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    a_minute_ago = time.monotonic() - 60
    monkeypatch.setattr("agents.assignor.time", SimpleNamespace(monotonic=lambda: a_minute_ago))
    membership = Membership("store-0")
    monkeypatch.undo()
    membership.subscription_data()
    membership.accept(b"{}")
    await membership.confirmed(10)


def test_aiokafka_has_what_is_watched() -> None:
    coordinator: Any = GroupCoordinator.__new__(GroupCoordinator)
    assert callable(coordinator._do_heartbeat)
    assert callable(coordinator.check_errors)
    assert callable(coordinator._do_rejoin_group)
    assert callable(coordinator._send_req)
    fields = set(GroupCoordinator.__init__.__code__.co_names)
    assert {"_coordination_task", "coordinator_id", "generation", "group_id", "member_id"} <= fields
    assert "_group_instance_id" in fields


def test_a_worker_that_hangs_while_it_stops_ends_all_the_same() -> None:
    hanging = (
        "from threading import Event; from agents.group_watch import end_for_sure; end_for_sure(0.1); Event().wait()"
    )
    assert subprocess.run([sys.executable, "-c", hanging], timeout=60, check=False).returncode == 1
