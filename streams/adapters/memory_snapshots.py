"""SnapshotRepository in this process's memory: for tests, and for looking at Pintail without Redis.

Keeps the same contract as `redis_snapshots` (one test suite runs over both). Nothing survives the process. Each method
runs without awaiting anything, which on one event loop makes it the atomic step that the contract asks for.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from math import inf

from streams.ports_snapshots import (
    BLOCK_GRACE_SECONDS,
    blocks_missing,
    digest_of,
    fenced_by_epoch,
    fenced_by_version,
    version_not_found,
)


@dataclass
class _Block:
    sealed: bytes
    #: Clock time at which it is gone; infinite for blocks of published versions.
    expires: float


@dataclass
class _Partition:
    epoch: int = 0
    newest: int | None = None
    manifests: dict[int, bytes] = field(default_factory=dict)
    members: dict[int, frozenset[str]] = field(default_factory=dict)
    blocks: dict[str, _Block] = field(default_factory=dict)


class MemorySnapshotRepository:
    """See the contract in `streams.ports_snapshots`. `clock` returns seconds."""

    def __init__(
        self, *, block_grace_seconds: float = BLOCK_GRACE_SECONDS, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._partitions: dict[int, _Partition] = {}
        self._grace = block_grace_seconds
        self._clock = clock

    async def verify_configuration(self) -> None:
        """Memory evicts nothing, and forgetting is its declared nature."""

    async def close(self) -> None:
        """Holds no connection; what it stores stays readable."""

    async def claim_epoch(self, partition: int, *, at_least: int) -> int:
        """See the port."""
        state = self._partitions.setdefault(partition, _Partition())
        state.epoch = max(state.epoch + 1, at_least)
        return state.epoch

    async def missing_blocks(self, partition: int, names: Collection[str]) -> frozenset[str]:
        """See the port."""
        return frozenset(names) - self._living(partition).keys()

    async def put_blocks(self, partition: int, blocks: Mapping[str, bytes]) -> None:
        """See the port."""
        living, expires = self._living(partition), self._clock() + self._grace
        for name, sealed in blocks.items():
            if name in living:
                living[name].expires = max(living[name].expires, expires)
            else:
                living[name] = _Block(sealed, expires)

    async def discard_blocks(self, partition: int, damaged: Mapping[str, str]) -> None:
        """See the port."""
        living = self._living(partition)
        for name, digest in damaged.items():
            if name in living and digest_of(living[name].sealed) == digest:
                del living[name]

    async def publish(
        self, partition: int, *, version: int, epoch: int, manifest: bytes, block_names: Collection[str]
    ) -> None:
        """See the port."""
        living = self._living(partition)
        state = self._partitions[partition]
        if state.epoch > epoch:
            raise fenced_by_epoch(partition, epoch, state.epoch)
        if state.newest is not None and version <= state.newest:
            if state.manifests.get(version) == manifest:
                return
            raise fenced_by_version(partition, version, state.newest)
        if missing := frozenset(block_names) - living.keys():
            raise blocks_missing(partition, version, missing)
        for name in block_names:
            living[name].expires = inf
        state.manifests[version], state.members[version] = manifest, frozenset(block_names)
        state.epoch, state.newest = epoch, version

    async def newest_version(self, partition: int) -> int | None:
        """See the port."""
        return self._partitions.get(partition, _Partition()).newest

    async def versions(self, partition: int) -> tuple[int, ...]:
        """See the port."""
        return tuple(sorted(self._partitions.get(partition, _Partition()).manifests, reverse=True))

    async def load_manifest(self, partition: int, version: int) -> bytes:
        """See the port."""
        try:
            return self._partitions[partition].manifests[version]
        except KeyError:
            raise version_not_found(partition, version) from None

    async def load_blocks(self, partition: int, names: Collection[str]) -> dict[str, bytes]:
        """See the port."""
        living = self._living(partition)
        return {name: living[name].sealed for name in names if name in living}

    async def retire(self, partition: int, versions: Collection[int]) -> int:
        """See the port."""
        living = self._living(partition)
        state = self._partitions[partition]
        kept = [version for version in state.manifests if version == state.newest or version not in versions]
        needed = frozenset[str]().union(*(state.members[version] for version in kept))
        retired = frozenset[str]().union(*(state.members[version] for version in state.members.keys() - set(kept)))
        for name in (dead := (retired - needed) & living.keys()):
            living[name].expires = self._clock() + self._grace
        state.manifests = {version: state.manifests[version] for version in kept}
        state.members = {version: state.members[version] for version in kept}
        return len(dead)

    async def memory_bytes(self, partition: int) -> int:
        """See the port."""
        living = self._living(partition)
        state = self._partitions[partition]
        names = frozenset[str]().union(*state.members.values()) & living.keys()
        return sum(map(len, state.manifests.values())) + sum(len(living[name].sealed) for name in names)

    async def partitions(self) -> tuple[int, ...]:
        """See the port."""
        return tuple(sorted(number for number, state in self._partitions.items() if state.epoch))

    def _living(self, partition: int) -> dict[str, _Block]:
        """The partition's blocks, without those whose time has come."""
        state, now = self._partitions.setdefault(partition, _Partition()), self._clock()
        for name in [name for name, block in state.blocks.items() if block.expires <= now]:
            del state.blocks[name]
        return state.blocks
