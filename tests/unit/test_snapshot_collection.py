"""Any order of puts, publishes, retirements and waiting: no version ever lacks a block (model test)."""

from __future__ import annotations

from collections.abc import Coroutine
from typing import Any, TypeVar, cast

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from streams.adapters.memory_snapshots import MemorySnapshotRepository
from streams.errors import SnapshotCorruptError, SnapshotFencedError

Result = TypeVar("Result")
GRACE_SECONDS = 10.0
names = st.frozensets(st.sampled_from("abcdefgh"), min_size=1)


class Collection(RuleBasedStateMachine):
    """The model knows the versions kept, what each needs, and when each mortal block may go."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 0.0
        self.repository = MemorySnapshotRepository(block_grace_seconds=GRACE_SECONDS, clock=lambda: self.now)
        self.kept: dict[int, frozenset[str]] = {}
        self.newest = 0
        self.epoch = 0
        #: Blocks that must still be there at the given time, whether a version needs them or not.
        self.promised: dict[str, float] = {}

    def run(self, call: Coroutine[Any, Any, Result]) -> Result:
        """The memory repository never awaits, so a call is done after one step."""
        try:
            call.send(None)
        except StopIteration as done:
            return cast(Result, done.value)
        raise AssertionError("the call awaits something")

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

    @rule(keep=st.integers(1, 3))
    def retire(self, keep: int) -> None:
        before = self.needed()
        self.run(self.repository.retire(0, keep=keep))
        self.kept = dict(sorted(self.kept.items())[-keep:])
        self.promised |= dict.fromkeys(before - self.needed(), self.now + GRACE_SECONDS)

    @rule(seconds=st.floats(0.1, 2 * GRACE_SECONDS))
    def wait(self, seconds: float) -> None:
        self.now += seconds

    @invariant()
    def every_kept_version_has_every_block(self) -> None:
        assert self.run(self.repository.versions(0)) == tuple(sorted(self.kept, reverse=True))
        assert not self.run(self.repository.missing_blocks(0, self.needed()))

    @invariant()
    def nothing_goes_before_its_time_and_everything_goes_after(self) -> None:
        promised = {name for name, until in self.promised.items() if until > self.now}
        stored = frozenset("abcdefgh") - self.run(self.repository.missing_blocks(0, "abcdefgh"))
        assert stored == self.needed() | promised


TestCollection = Collection.TestCase
TestCollection.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)
