"""The contract of SnapshotRepository, over every implementation: in memory and in a real Redis-protocol server."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator

import pytest

from streams.adapters.memory_snapshots import MemorySnapshotRepository
from streams.adapters.redis_snapshots import RedisSnapshotRepository
from streams.errors import SnapshotCorruptError, SnapshotFencedError, SnapshotNotFoundError
from streams.limits import REDIS_VALUE_BYTES_MAX
from streams.ports_snapshots import SnapshotRepository, digest_of
from tests.redis_server import RedisServer

P = 3
GRACE_SECONDS = 0.2

Opener = Callable[[float], SnapshotRepository]


@pytest.fixture(scope="module")
def server() -> Iterator[RedisServer]:
    with RedisServer() as running:
        yield running


@pytest.fixture(params=["memory", "redis"])
async def open_repository(request: pytest.FixtureRequest) -> AsyncIterator[Opener]:
    opened: list[SnapshotRepository] = []

    def open_(grace_seconds: float) -> SnapshotRepository:
        repository: SnapshotRepository
        if request.param == "memory":
            repository = MemorySnapshotRepository(block_grace_seconds=grace_seconds)
        else:
            server: RedisServer = request.getfixturevalue("server")
            with server.client() as client:
                client.flushall()
            repository = RedisSnapshotRepository(server.url, application="test[*]", block_grace_seconds=grace_seconds)
        opened.append(repository)
        return repository

    yield open_
    for repository in opened:
        await repository.close()


@pytest.fixture
def repository(open_repository: Opener) -> SnapshotRepository:
    return open_repository(60.0)


@pytest.fixture
def forgetful(open_repository: Opener) -> SnapshotRepository:
    return open_repository(GRACE_SECONDS)


async def publish(repository: SnapshotRepository, version: int, names: str, *, epoch: int = 1) -> bytes:
    """Publishes a version whose blocks are the letters of `names`, after putting them."""
    await repository.put_blocks(P, {name: f"content of {name}".encode() for name in names})
    manifest = f"manifest {version} {names}".encode()
    await repository.publish(P, version=version, epoch=epoch, manifest=manifest, block_names=list(names))
    return manifest


async def until(condition: Callable[[], Awaitable[bool]], seconds: float = 5.0) -> None:
    deadline = time.monotonic() + seconds
    while not await condition():
        assert time.monotonic() < deadline, "the condition did not come true in time"


async def test_a_new_repository_is_empty(repository: SnapshotRepository) -> None:
    assert await repository.newest_version(P) is None
    assert await repository.versions(P) == ()
    assert await repository.partitions() == ()
    assert await repository.memory_bytes(P) == 0
    assert await repository.retire(P, [1]) == 0
    with pytest.raises(SnapshotNotFoundError):
        await repository.load_manifest(P, 1)


async def test_what_was_put_and_published_is_loaded(repository: SnapshotRepository) -> None:
    manifest = await publish(repository, 1, "ab")
    assert await repository.newest_version(P) == 1
    assert await repository.load_manifest(P, 1) == manifest
    assert await repository.load_blocks(P, "abx") == {"a": b"content of a", "b": b"content of b"}
    assert await repository.missing_blocks(P, "abx") == {"x"}
    assert await repository.memory_bytes(P) >= len(manifest) + 24


@pytest.mark.parametrize(
    "size", [0, 1, REDIS_VALUE_BYTES_MAX, REDIS_VALUE_BYTES_MAX + 1, 3 * REDIS_VALUE_BYTES_MAX + 5]
)
async def test_a_block_of_any_size_comes_back_whole(repository: SnapshotRepository, size: int) -> None:
    block = os.urandom(size)
    await repository.put_blocks(P, {"a": block, "b": b"b"})
    assert await repository.load_blocks(P, ["a"]) == {"a": block}


async def test_more_blocks_than_one_call_carries(repository: SnapshotRepository) -> None:
    blocks = {f"{number:040x}": number.to_bytes(2, "big") for number in range(2100)}
    await repository.put_blocks(P, blocks)
    assert await repository.missing_blocks(P, [*blocks, "other"]) == {"other"}
    await repository.publish(P, version=1, epoch=1, manifest=b"m", block_names=list(blocks))
    assert await repository.load_blocks(P, list(blocks)) == blocks


@pytest.mark.invariant(4, place="checkpoint")
async def test_invariant_4_a_version_is_visible_only_when_every_block_is_stored(repository: SnapshotRepository) -> None:
    await publish(repository, 1, "ab")
    with pytest.raises(SnapshotCorruptError) as refusal:
        await repository.publish(P, version=2, epoch=1, manifest=b"m", block_names=["a", "x", "y"])
    assert refusal.value.blocks == {"x", "y"}
    assert await repository.newest_version(P) == 1
    assert await repository.versions(P) == (1,)
    with pytest.raises(SnapshotNotFoundError):
        await repository.load_manifest(P, 2)


@pytest.mark.invariant(4, place="checkpoint")
async def test_invariant_4_a_crash_between_put_and_publish_leaves_the_old_version(
    repository: SnapshotRepository,
) -> None:
    await publish(repository, 1, "ab")
    await repository.put_blocks(P, {"c": b"c"})
    assert await repository.newest_version(P) == 1
    assert await repository.versions(P) == (1,)


async def test_epochs_only_grow(repository: SnapshotRepository) -> None:
    assert await repository.claim_epoch(P, at_least=1) == 1
    assert await repository.claim_epoch(P, at_least=1) == 2
    assert await repository.claim_epoch(P, at_least=10) == 10
    assert await repository.claim_epoch(P, at_least=3) == 11
    assert await repository.claim_epoch(P + 1, at_least=1) == 1
    assert await repository.partitions() == (P, P + 1)


async def test_concurrent_claims_get_different_epochs(repository: SnapshotRepository) -> None:
    epochs = await asyncio.gather(*(repository.claim_epoch(P, at_least=5) for _ in range(20)))
    assert sorted(epochs) == list(range(5, 25))


@pytest.mark.invariant(5, place="rebalance")
async def test_invariant_5_a_publish_under_an_older_epoch_is_refused(repository: SnapshotRepository) -> None:
    old = await repository.claim_epoch(P, at_least=1)
    await publish(repository, 1, "a", epoch=old)
    await repository.claim_epoch(P, at_least=1)
    with pytest.raises(SnapshotFencedError, match="epoch 2"):
        await publish(repository, 2, "ab", epoch=old)
    assert await repository.versions(P) == (1,)


async def test_a_publish_raises_the_epoch_that_others_must_exceed(repository: SnapshotRepository) -> None:
    await publish(repository, 1, "a", epoch=7)
    with pytest.raises(SnapshotFencedError):
        await publish(repository, 2, "a", epoch=6)
    assert await repository.claim_epoch(P, at_least=1) == 8


async def test_a_version_is_published_once(repository: SnapshotRepository) -> None:
    manifest = await publish(repository, 4, "a")
    for version in (3, 4):
        with pytest.raises(SnapshotFencedError, match="version 4"):
            await repository.publish(P, version=version, epoch=1, manifest=b"other", block_names=["a"])
    assert await repository.load_manifest(P, 4) == manifest


async def test_publishing_the_same_again_after_a_lost_reply_succeeds(repository: SnapshotRepository) -> None:
    manifest = await publish(repository, 1, "a")
    await repository.publish(P, version=1, epoch=1, manifest=manifest, block_names=["a"])
    assert await repository.versions(P) == (1,)


async def test_an_unpublished_block_expires_and_a_published_one_does_not(forgetful: SnapshotRepository) -> None:
    await publish(forgetful, 1, "ab")
    await forgetful.put_blocks(P, {"c": b"c"})

    async def c_is_gone() -> bool:
        return "c" in await forgetful.missing_blocks(P, "c")

    await until(c_is_gone)
    assert await forgetful.missing_blocks(P, "abc") == {"c"}


async def test_putting_a_live_block_again_neither_changes_it_nor_makes_it_mortal(
    forgetful: SnapshotRepository,
) -> None:
    await publish(forgetful, 1, "a")
    await forgetful.put_blocks(P, {"a": b"sealed anew", "z": b"z"})

    async def z_is_gone() -> bool:
        return "z" in await forgetful.missing_blocks(P, "z")

    await until(z_is_gone)
    assert await forgetful.load_blocks(P, "a") == {"a": b"content of a"}


async def test_retire_keeps_the_newest_and_every_block_they_need(forgetful: SnapshotRepository) -> None:
    for version, names in enumerate(("abc", "bcd", "cde"), start=1):
        await publish(forgetful, version, names)
    assert await forgetful.retire(P, [1]) == 1
    assert await forgetful.versions(P) == (3, 2)
    with pytest.raises(SnapshotNotFoundError):
        await forgetful.load_manifest(P, 1)

    async def a_is_gone() -> bool:
        return "a" in await forgetful.missing_blocks(P, "a")

    await until(a_is_gone)
    assert await forgetful.missing_blocks(P, "abcde") == {"a"}
    assert await forgetful.retire(P, [2, 3, 9]) == 1
    assert await forgetful.versions(P) == (3,), "the newest version stays, whoever asks"
    assert await forgetful.retire(P, [2, 3]) == 0


async def test_a_retired_block_that_a_new_version_needs_is_live_again(forgetful: SnapshotRepository) -> None:
    await publish(forgetful, 1, "ab")
    await publish(forgetful, 2, "bc")
    assert await forgetful.retire(P, [1]) == 1
    await publish(forgetful, 3, "ac")
    await forgetful.put_blocks(P, {"z": b"z"})

    async def z_is_gone() -> bool:
        return "z" in await forgetful.missing_blocks(P, "z")

    await until(z_is_gone)
    assert await forgetful.missing_blocks(P, "abc") == set()


async def test_discarded_blocks_are_missing_until_put_again(repository: SnapshotRepository) -> None:
    """Whoever read a damaged piece late takes nothing from the one that has replaced it."""
    await publish(repository, 1, "ab")
    damaged = {"a": digest_of((await repository.load_blocks(P, "a"))["a"]), "x": digest_of(b"")}
    await repository.discard_blocks(P, damaged)
    assert await repository.missing_blocks(P, "ab") == {"a"}
    await repository.put_blocks(P, {"a": b"anew"})
    await repository.discard_blocks(P, damaged)
    assert await repository.load_blocks(P, "a") == {"a": b"anew"}


async def test_a_damaged_block_of_several_pieces_is_discarded(repository: SnapshotRepository) -> None:
    sealed = bytes(12 * REDIS_VALUE_BYTES_MAX)
    await repository.put_blocks(P, {"a": sealed})
    await repository.discard_blocks(P, {"a": digest_of(sealed)})
    assert await repository.missing_blocks(P, "a") == {"a"}


async def test_partitions_do_not_see_each_other(repository: SnapshotRepository) -> None:
    await publish(repository, 1, "a")
    assert await repository.missing_blocks(P + 1, "a") == {"a"}
    assert await repository.newest_version(P + 1) is None
    assert await repository.load_blocks(P + 1, "a") == {}


async def test_no_names_are_no_work(repository: SnapshotRepository) -> None:
    assert await repository.missing_blocks(P, ()) == frozenset()
    assert await repository.load_blocks(P, ()) == {}
    await repository.put_blocks(P, {})
    await repository.discard_blocks(P, {})
