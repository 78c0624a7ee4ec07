"""Any order of puts, publishes, retirements and waiting: no version ever lacks a block, and nothing stays for ever.

A model test over both repositories. Time is the model's: in memory it is the clock, in Redis the time that each key has
left is cut by what has passed.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Iterator
from functools import partial
from typing import Any, TypeVar

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule, run_state_machine_as_test

from streams.adapters.memory_snapshots import MemorySnapshotRepository
from streams.adapters.redis_snapshots import RedisSnapshotRepository
from streams.errors import SnapshotCorruptError, SnapshotFencedError
from streams.ports_snapshots import SnapshotRepository
from tests.redis_server import RedisServer

Result = TypeVar("Result")
#: Much longer than a run takes, so that real time does not count.
GRACE_SECONDS = 100_000
names = st.frozensets(st.sampled_from("abcdefgh"), min_size=1)


class MemoryWorld:
    """A repository in memory and its clock."""

    def __init__(self) -> None:
        self.now = 0.0
        self._memory = MemorySnapshotRepository(block_grace_seconds=GRACE_SECONDS, clock=lambda: self.now)
        self.repository: SnapshotRepository = self._memory

    def pass_time(self, seconds: int) -> None:
        self.now += seconds

    def damage(self, name: str) -> None:
        self._memory._partitions[0].blocks[name].sealed = b"damaged"


class RedisWorld:
    """An empty database of a real server, whose keys age when told to."""

    def __init__(self, server: RedisServer) -> None:
        self._server = server
        with server.client() as client:
            client.flushall()
        self.repository: SnapshotRepository = RedisSnapshotRepository(
            server.url, application="model", block_grace_seconds=GRACE_SECONDS
        )

    def pass_time(self, seconds: int) -> None:
        with self._server.client() as client:
            for key in client.keys("*"):
                if (left := client.pttl(key)) >= 0:
                    client.pexpire(key, left - 1000 * seconds)

    def damage(self, name: str) -> None:
        with self._server.client() as client:
            client.hset(f"{{model:0}}:block:{name}", "0", b"damaged")


class Collection(RuleBasedStateMachine):
    """The model knows the versions kept, what each needs, and when each mortal block may go."""

    def __init__(self, world: MemoryWorld | RedisWorld) -> None:
        super().__init__()
        self.world = world
        self.repository = world.repository
        self.runner = asyncio.Runner()
        self.now = 0
        self.kept: dict[int, frozenset[str]] = {}
        self.newest = 0
        self.epoch = 0
        #: Blocks that must still be there at the given time, whether a version needs them or not.
        self.promised: dict[str, int] = {}

    def run(self, call: Coroutine[Any, Any, Result]) -> Result:
        return self.runner.run(call)

    def teardown(self) -> None:
        self.run(self.repository.close())
        self.runner.close()

    def needed(self) -> frozenset[str]:
        return frozenset[str]().union(*self.kept.values())

    @rule(blocks=names)
    def put(self, blocks: frozenset[str]) -> None:
        self.run(self.repository.put_blocks(0, {name: name.encode() for name in blocks}))
        self.promised |= dict.fromkeys(blocks, self.now + GRACE_SECONDS)

    @rule(blocks=names)
    def publish(self, blocks: frozenset[str]) -> None:
        missing = self.run(self.repository.missing_blocks(0, blocks))
        call = self.repository.publish(0, version=self.newest + 1, epoch=self.epoch, manifest=b"m", block_names=blocks)
        if missing:
            with pytest.raises(SnapshotCorruptError) as refusal:
                self.run(call)
            assert refusal.value.blocks == missing
        else:
            self.run(call)
            self.newest += 1
            self.kept[self.newest] = blocks

    @rule(blocks=names)
    def publish_as_a_zombie(self, blocks: frozenset[str]) -> None:
        self.epoch = self.run(self.repository.claim_epoch(0, at_least=1))
        with pytest.raises(SnapshotFencedError):
            self.run(
                self.repository.publish(
                    0, version=self.newest + 1, epoch=self.epoch - 1, manifest=b"z", block_names=blocks
                )
            )

    @rule(data=st.data())
    def retire(self, data: st.DataObject) -> None:
        """Any versions, as a zombie would name them: some are gone, the newest is among them now and then."""
        versions = data.draw(st.sets(st.integers(1, self.newest + 1)))
        before = self.needed()
        self.run(self.repository.retire(0, versions))
        self.kept = {v: blocks for v, blocks in self.kept.items() if v == self.newest or v not in versions}
        self.promised |= dict.fromkeys(before - self.needed(), self.now + GRACE_SECONDS)

    @rule(steps=st.integers(1, 20))
    def wait(self, steps: int) -> None:
        seconds = steps * GRACE_SECONDS // 10
        self.now += seconds
        self.world.pass_time(seconds)

    @invariant()
    def every_kept_version_has_every_block(self) -> None:
        assert self.run(self.repository.versions(0)) == tuple(sorted(self.kept, reverse=True))
        assert self.run(self.repository.load_blocks(0, self.needed())) == {n: n.encode() for n in self.needed()}

    @invariant()
    def nothing_goes_before_its_time_and_everything_goes_after(self) -> None:
        promised = {name for name, until in self.promised.items() if until > self.now}
        stored = frozenset("abcdefgh") - self.run(self.repository.missing_blocks(0, "abcdefgh"))
        assert stored == self.needed() | promised


@pytest.fixture
def server() -> Iterator[RedisServer]:
    with RedisServer() as running:
        yield running


def check(make_world: Callable[[], MemoryWorld | RedisWorld], *, examples: int) -> None:
    class InItsWorld(Collection):
        def __init__(self) -> None:
            super().__init__(make_world())

    machine = settings(
        max_examples=examples, stateful_step_count=25, deadline=None, suppress_health_check=[HealthCheck.too_slow]
    )
    run_state_machine_as_test(InItsWorld, settings=machine)


@pytest.mark.invariant(4, 8, place="checkpoint")
@pytest.mark.invariant(4, place="rebalance")
def test_no_order_of_steps_takes_a_block_from_a_version_in_memory() -> None:
    check(MemoryWorld, examples=60)


@pytest.mark.invariant(4, 8, place="checkpoint")
@pytest.mark.invariant(4, place="rebalance")
def test_no_order_of_steps_takes_a_block_from_a_version_in_redis(server: RedisServer) -> None:
    check(partial(RedisWorld, server), examples=30)
