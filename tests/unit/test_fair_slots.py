"""Slots go round the callers, and none is lost."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from streams.processes.fair_slots import FairSlots


async def settled() -> None:
    """Lets every task that can go on go on."""
    for _ in range(5):
        await asyncio.sleep(0)


def waiting(slots: FairSlots, order: list[str]) -> Callable[[str], asyncio.Task[None]]:
    async def wait(name: str) -> None:
        await slots.acquire(name[0])
        order.append(name)

    return lambda name: asyncio.create_task(wait(name))


async def test_a_caller_with_many_requests_does_not_hold_up_the_others() -> None:
    slots, order = FairSlots(1), list[str]()
    wait = waiting(slots, order)
    tasks = [wait(name) for name in ("a1", "a2", "a3", "a4", "b1", "c1", "b2")]
    await settled()
    for _ in tasks:
        slots.release()
        await settled()
    assert order == ["a1", "a2", "b1", "c1", "a3", "b2", "a4"]


async def test_who_gives_up_takes_no_slot_and_no_turn() -> None:
    slots, order = FairSlots(1), list[str]()
    wait = waiting(slots, order)
    first, second, third = wait("a1"), wait("b1"), wait("c1")
    await settled()
    second.cancel()
    await settled()
    slots.release()
    await settled()
    assert order == ["a1", "c1"]
    assert first.done()
    assert third.done()


async def test_a_slot_goes_past_one_who_is_cancelled_and_has_not_left_yet() -> None:
    slots, order = FairSlots(1), list[str]()
    wait = waiting(slots, order)
    tasks = [wait(name) for name in ("a1", "b1", "b2", "c1")]
    await settled()
    tasks[1].cancel()
    slots.release()
    await settled()
    assert order == ["a1", "c1"]
    tasks[2].cancel()
    slots.release()
    await settled()
    await slots.acquire("d")  # it is free again


async def test_a_slot_given_to_one_who_leaves_in_that_moment_goes_on() -> None:
    slots, order = FairSlots(1), list[str]()
    wait = waiting(slots, order)
    tasks = [wait(name) for name in ("a1", "b1", "c1")]
    await settled()
    slots.release()
    tasks[1].cancel()
    await settled()
    assert order == ["a1", "c1"]
    slots.release()
    await slots.acquire("d")  # it is free again
