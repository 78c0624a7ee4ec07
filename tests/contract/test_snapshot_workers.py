"""Several workers snapshot and restore one partition at once, crash, return as zombies, and meet damage: whatever the
order, no version ever lacks a block that nobody damaged, and every version is what its worker captured.

A model test of the real Snapshotter and SnapshotRestore over both repositories. Each call of the repository waits until
the model lets it go on, so that a run is a sequence of calls of different workers, and crashes come between any two.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, TypeVar, cast

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule, run_state_machine_as_test

from streams.adapters.duckdb_file import BLOCK_BYTES, HEADERS_BYTES
from streams.adapters.duckdb_partition import FrozenFile, PartitionStore
from streams.errors import SnapshotCorruptError, SnapshotFencedError, SnapshotNotFoundError
from streams.ports_snapshots import SnapshotRepository
from streams.processes.recovery import SnapshotRestore
from streams.processes.snapshotting import SnapshotInfo, Snapshotter
from tests.contract.test_snapshot_collection import GRACE_SECONDS, MemoryWorld, RedisWorld
from tests.redis_server import RedisServer
from tests.snapshot_stores import CODEC

Result = TypeVar("Result")
P = 0
WORKERS = range(3)
READERS = range(2)


class StepByStep:
    """The repository as one worker sees it: every call waits for its turn."""

    def __init__(self, repository: SnapshotRepository) -> None:
        self.turn: asyncio.Future[None] | None = None
        self._repository = repository

    def __getattr__(self, name: str) -> Callable[..., Coroutine[Any, Any, Any]]:
        call = getattr(self._repository, name)

        async def when_it_is_time(*arguments: Any, **options: Any) -> Any:
            self.turn = asyncio.get_running_loop().create_future()
            try:
                await self.turn
            finally:
                self.turn = None
            return await call(*arguments, **options)

        return when_it_is_time


class FileOfLetters:
    """Stands for a PartitionStore: a file in memory, each of whose blocks is one letter many times."""

    partition = P

    def __init__(self, frozen: dict[int, bytes]) -> None:
        self.letters = ""
        self.changes = 0
        #: The number of the change -> the file that was captured then, of all workers.
        self._frozen = frozen

    def next_offsets(self) -> dict[str, int]:
        return {"letters": self.changes} if self.changes else {}

    @contextmanager
    def frozen(self, *, hashed: bool = False) -> Iterator[FrozenFile]:
        assert not hashed
        content = bytes(HEADERS_BYTES) + b"".join(letter.encode() * BLOCK_BYTES for letter in self.letters)
        self._frozen[self.changes] = content
        fd = os.memfd_create("letters")
        try:
            os.write(fd, content)
            yield FrozenFile(Path("letters"), fd, len(content), self.next_offsets(), {})
        finally:
            os.close(fd)


class Actor:
    """A process that uses the repository: what it is doing, and whether it waits for its turn."""

    def __init__(self, repository: SnapshotRepository) -> None:
        self.port = StepByStep(repository)
        self.repository = cast("SnapshotRepository", self.port)
        self.task: asyncio.Task[Any] | None = None

    @property
    def is_idle(self) -> bool:
        return self.task is None or self.task.done()

    @property
    def is_still(self) -> bool:
        return self.is_idle or self.port.turn is not None


class Worker(Actor):
    def __init__(self, repository: SnapshotRepository, frozen: dict[int, bytes]) -> None:
        super().__init__(repository)
        self.epoch = 0
        self.store = FileOfLetters(frozen)
        self.snapshotter = Snapshotter(self.repository, CODEC, versions_kept=2)

    async def snapshot(self) -> SnapshotInfo | None:
        return await self.snapshotter.take(cast("PartitionStore", self.store), self.epoch)


class SeveralWorkers(RuleBasedStateMachine):
    """The model knows what was captured, and which stored blocks it has damaged itself."""

    def __init__(self, world: MemoryWorld | RedisWorld) -> None:
        super().__init__()
        self.world = world
        self.repository = world.repository
        self.runner = asyncio.Runner()
        self.frozen: dict[int, bytes] = {}
        self.workers = [Worker(self.repository, self.frozen) for _ in WORKERS]
        self.readers = [Actor(self.repository) for _ in READERS]
        self.changes = 0
        self.newest = 0
        self.epoch = 0
        #: Blocks that were damaged, and that nobody is known to have stored anew.
        self.damaged: set[str] = set()

    def run(self, call: Coroutine[Any, Any, Result]) -> Result:
        async def and_settle() -> Result:
            result = await call
            while not all(actor.is_still for actor in (*self.workers, *self.readers)):  # noqa: ASYNC110
                await asyncio.sleep(0.0001)  # their threads go on meanwhile
            return result

        return self.runner.run(and_settle())

    async def start(self, actor: Actor, work: Coroutine[Any, Any, Any]) -> None:
        actor.task = asyncio.create_task(work)
        await asyncio.sleep(0)

    async def crash(self, actor: Actor) -> None:
        if actor.task is not None:
            actor.task.cancel()
            await asyncio.gather(actor.task, return_exceptions=True)
            actor.task = None

    def teardown(self) -> None:
        for actor in (*self.workers, *self.readers):
            self.run(self.crash(actor))
        self.run(self.repository.close())
        self.runner.close()

    @rule(number=st.sampled_from(WORKERS))
    def take_over(self, number: int) -> None:
        """The group gives the partition to this worker; the one that had it does not know yet."""
        self.workers[number].epoch = self.epoch = self.run(self.repository.claim_epoch(P, at_least=1))

    @rule(number=st.sampled_from(WORKERS), letters=st.text("abcd", min_size=1, max_size=4))
    def change(self, number: int, letters: str) -> None:
        self.changes += 1
        self.workers[number].store.letters, self.workers[number].store.changes = letters, self.changes

    @rule(number=st.sampled_from(WORKERS))
    def begin_a_snapshot(self, number: int) -> None:
        worker = self.workers[number]
        if worker.is_idle and worker.epoch:
            self.run(self.start(worker, worker.snapshot()))

    @rule(number=st.sampled_from(READERS))
    def begin_a_restore(self, number: int) -> None:
        if self.readers[number].is_idle and (versions := self.run(self.repository.versions(P))):
            self.run(self.start(self.readers[number], self.restored(self.readers[number].repository, versions[0])))

    @rule(data=st.data(), steps=st.integers(1, 6))
    def let_some_go_on(self, data: st.DataObject, steps: int) -> None:
        for _ in range(steps):
            waiting = [a for a in (*self.workers, *self.readers) if not a.is_idle]
            if not waiting:
                return
            self.run(self.go_on(data.draw(st.sampled_from(waiting))))

    async def go_on(self, actor: Actor) -> None:
        assert actor.port.turn is not None
        actor.port.turn.set_result(None)
        await asyncio.sleep(0)

    @rule(number=st.sampled_from(WORKERS))
    def crash_and_restart(self, number: int) -> None:
        """Everything that was in memory is lost, and whatever was under way has happened up to here."""
        self.run(self.crash(self.workers[number]))
        epoch, store = self.workers[number].epoch, self.workers[number].store
        self.workers[number] = Worker(self.repository, self.frozen)
        self.workers[number].epoch, self.workers[number].store = epoch, store

    @precondition(lambda self: self.newest)
    @rule(data=st.data())
    def damage(self, data: st.DataObject) -> None:
        needed = sorted(self.run(self.needed()))
        name = data.draw(st.sampled_from(needed))
        if self.run(self.repository.load_blocks(P, [name])):
            self.world.damage(name)
            self.damaged.add(name)

    @rule(steps=st.integers(1, 12))
    def wait(self, steps: int) -> None:
        self.world.pass_time(steps * GRACE_SECONDS // 10)

    async def restored(self, repository: SnapshotRepository, version: int) -> bytes | None:
        """As recovery does: a version that is damaged is done without, and its damaged blocks are discarded."""
        restore, blocks = SnapshotRestore(repository, CODEC, P, version), list[bytes]()
        try:
            manifest = await restore.check(blocks.append)
        except SnapshotNotFoundError:
            return None
        except SnapshotCorruptError:
            await repository.discard_blocks(P, restore.damaged)
            return None
        assert b"".join(blocks) == self.frozen[manifest.next_offsets["letters"]]
        return b"".join(blocks)

    async def manifests(self) -> dict[int, Any]:
        return {
            version: CODEC.open_manifest(P, version, await self.repository.load_manifest(P, version))
            for version in await self.repository.versions(P)
        }

    async def needed(self) -> frozenset[str]:
        return frozenset[str]().union(*(each.block_names for each in (await self.manifests()).values()))

    @invariant()
    def no_version_lacks_a_block_that_nobody_damaged(self) -> None:
        needed = self.run(self.needed())
        stored = self.run(self.repository.load_blocks(P, needed))
        for name in needed:
            if name not in self.damaged:
                CODEC.open_block(P, name, stored[name])
            elif name in stored:
                try:
                    CODEC.open_block(P, name, stored[name])
                except SnapshotCorruptError:
                    continue
                self.damaged.discard(name)  # stored anew, and never to be lost again

    @invariant()
    def versions_and_epochs_only_grow(self) -> None:
        manifests = self.run(self.manifests())
        newest = max(manifests, default=0)
        assert newest >= self.newest
        self.newest = newest
        epochs = [manifests[version].epoch for version in sorted(manifests)]
        assert epochs == sorted(epochs)
        assert all(epoch <= self.epoch for epoch in epochs)

    @invariant()
    def whoever_ended_ended_well(self) -> None:
        for actor in (*self.workers, *self.readers):
            if actor.task is not None and actor.task.done():
                error, actor.task = actor.task.exception(), None
                assert error is None or isinstance(error, SnapshotFencedError | SnapshotCorruptError), error

    @invariant()
    def every_whole_version_is_what_was_captured(self) -> None:
        for version, manifest in self.run(self.manifests()).items():
            if not manifest.block_names & self.damaged:
                assert self.run(self.restored(self.repository, version)) is not None


def check(make_world: Callable[[], MemoryWorld | RedisWorld], *, examples: int) -> None:
    class InItsWorld(SeveralWorkers):
        def __init__(self) -> None:
            super().__init__(make_world())

    machine = settings(
        max_examples=examples, stateful_step_count=30, deadline=None, suppress_health_check=list(HealthCheck)
    )
    run_state_machine_as_test(InItsWorld, settings=machine)


@pytest.mark.invariant(4, 8, place="checkpoint")
@pytest.mark.invariant(4, 5, place="rebalance")
def test_no_order_of_calls_of_several_workers_takes_a_block_from_a_version_in_memory() -> None:
    check(MemoryWorld, examples=40)


@pytest.mark.invariant(4, 8, place="checkpoint")
@pytest.mark.invariant(4, 5, place="rebalance")
def test_no_order_of_calls_of_several_workers_takes_a_block_from_a_version_in_redis() -> None:
    with RedisServer() as server:
        check(partial(RedisWorld, server), examples=10)
