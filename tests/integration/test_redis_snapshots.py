"""What only a real Redis can show: configuration, outages, restarts, memory, the errors an operator reads."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from streams.adapters.redis_snapshots import RedisSnapshotRepository, open_snapshot_repository
from streams.config import Settings
from streams.errors import (
    ConfigurationError,
    SnapshotError,
    SnapshotStoreUnavailableError,
    SnapshotStoreUnsafeError,
)
from streams.limits import REDIS_VALUE_BYTES_MAX
from tests.redis_server import RedisServer


@pytest.fixture
def server() -> Iterator[RedisServer]:
    with RedisServer() as running:
        yield running


def repository_at(url: str, *, unsafe_allowed: bool = False) -> RedisSnapshotRepository:
    return RedisSnapshotRepository(url, application="test", unsafe_allowed=unsafe_allowed, timeout_seconds=2.0)


async def test_a_safe_server_passes(server: RedisServer) -> None:
    async with repository_at(server.url) as repository:
        await repository.verify_configuration()


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("maxmemory-policy", "allkeys-lru", "maxmemory-policy is allkeys-lru"),
        ("maxmemory-policy", "volatile-ttl", "maxmemory-policy is volatile-ttl"),
        ("appendonly", "no", "appendonly is off"),
    ],
)
async def test_an_unsafe_server_is_refused_unless_accepted(
    server: RedisServer, option: str, value: str, message: str
) -> None:
    with server.client() as client:
        client.config_set(option, value)
    async with repository_at(server.url) as repository:
        with pytest.raises(SnapshotStoreUnsafeError, match=message) as refusal:
            await repository.verify_configuration()
    assert "CONFIG SET" in refusal.value.hint
    async with repository_at(server.url, unsafe_allowed=True) as accepting:
        await accepting.verify_configuration()


async def test_a_server_that_is_away_is_a_retriable_error_and_works_again_when_back(server: RedisServer) -> None:
    async with repository_at(server.url) as repository:
        await repository.put_blocks(0, {"a": b"a"})
        await repository.publish(0, version=1, epoch=5, manifest=b"m", block_names=["a"])
        server.kill()
        with pytest.raises(SnapshotStoreUnavailableError) as outage:
            await repository.put_blocks(0, {"b": b"b"})
        assert outage.value.retriable
        assert "PINTAIL_REDIS" in outage.value.hint
        server.start()
        # The scripts are gone from the server's cache, the data is not.
        await repository.put_blocks(0, {"b": b"b"})
        await repository.publish(0, version=2, epoch=5, manifest=b"m", block_names=["a", "b"])
        assert await repository.versions(0) == (2, 1)
        assert await repository.claim_epoch(0, at_least=1) == 6


async def test_a_full_server_is_a_retriable_error_and_nothing_is_evicted(server: RedisServer) -> None:
    async with repository_at(server.url) as repository:
        await repository.put_blocks(0, {"a": b"a"})
        await repository.publish(0, version=1, epoch=1, manifest=b"m", block_names=["a"])
        with server.client() as client:
            client.config_set("maxmemory", 8 * 2**20)
        with pytest.raises(SnapshotStoreUnavailableError, match="full") as refusal:
            await repository.put_blocks(0, {f"{number:x}": os.urandom(2**18) for number in range(64)})
        assert "maxmemory" in refusal.value.hint
        assert await repository.load_blocks(0, ["a"]) == {"a": b"a"}


async def test_messages_do_not_show_the_password(server: RedisServer) -> None:
    with server.client() as client:
        client.config_set("requirepass", "correct-password")
    wrong = server.url.replace("unix://", "unix://:wrong-password@")
    async with repository_at(wrong) as repository:
        with pytest.raises(SnapshotError) as refusal:
            await repository.newest_version(0)
    assert "credentials" in str(refusal.value)
    assert "wrong-password" not in str(refusal.value)
    assert not refusal.value.retriable


async def test_no_stored_value_exceeds_the_size_class(server: RedisServer) -> None:
    async with repository_at(server.url) as repository:
        await repository.put_blocks(0, {"a": os.urandom(2**18 + 42)})
        await repository.publish(0, version=1, epoch=1, manifest=b"m", block_names=["a"])
        assert await repository.memory_bytes(0) >= 2**18
    with server.client() as client:
        pieces = client.hgetall("{test:0}:block:a")
    assert sorted(map(len, pieces.values())) == [2**18 + 42 - REDIS_VALUE_BYTES_MAX, REDIS_VALUE_BYTES_MAX]


async def test_all_keys_of_a_partition_share_one_hash_tag(server: RedisServer) -> None:
    async with repository_at(server.url) as repository:
        await repository.put_blocks(7, {"a": b"a"})
        await repository.publish(7, version=1, epoch=1, manifest=b"m", block_names=["a"])
    with server.client() as client:
        assert {key.split(b"}")[0] for key in client.keys("*")} == {b"{test:7"}


async def test_the_repository_of_settings(server: RedisServer) -> None:
    async with open_snapshot_repository(Settings(redis=server.url, application="named")) as repository:
        await repository.claim_epoch(2, at_least=4)
        assert await repository.partitions() == (2,)
    with server.client() as client:
        assert client.hgetall("{named:2}:head") == {b"epoch": b"4"}
    with pytest.raises(ConfigurationError, match="PINTAIL_REDIS"):
        open_snapshot_repository(Settings(redis=""))
