"""SnapshotRepository in Redis (7 or newer; Valkey), the only file that imports its driver.

Keys of a partition share one hash tag, so that its scripts also run on a cluster:

    {application:partition}:head           hash: epoch (newest claimed), version (newest published)
    {application:partition}:versions       sorted set of the versions kept
    {application:partition}:manifest:<v>   sealed manifest
    {application:partition}:members:<v>    set of the block names of that version
    {application:partition}:block:<name>   hash: field 0, 1, ... hold a sealed block in pieces

Every change that could break a promise is one script: storing a block, publishing, retiring, claiming. A sealed block
that did not compress is a little longer than 256 KiB, which would cost it the allocator's next size class, a quarter
more memory. So a block is a hash of pieces of at most REDIS_VALUE_BYTES_MAX: such a block has a second piece of about a
hundred bytes, every other has one, and both are one key that exists, persists and expires as a whole.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import islice
from typing import Any, NoReturn, Self, cast

from redis.asyncio import Redis
from redis.asyncio.retry import Retry
from redis.backoff import ExponentialBackoff
from redis.exceptions import (
    AuthenticationError,
    BusyLoadingError,
    OutOfMemoryError,
    ReadOnlyError,
    RedisError,
    TryAgainError,
)
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import TimeoutError as RedisTimeoutError

from streams.config import URL_SETTINGS, Settings
from streams.errors import ConfigurationError, SnapshotError, SnapshotStoreUnavailableError, SnapshotStoreUnsafeError
from streams.limits import REDIS_VALUE_BYTES_MAX
from streams.ports_snapshots import (
    BLOCK_GRACE_SECONDS,
    blocks_missing,
    fenced_by_epoch,
    fenced_by_version,
    version_not_found,
)
from streams.urls import ESCAPES, parse_url, redacted

#: Blocks per pipeline: 4 MiB in flight.
PIPELINE_BLOCKS = 16
#: Names per command; keeps arguments and replies short.
_NAMES_PER_CALL = 1000

_CLAIM = """
local claimed = math.max((tonumber(redis.call('HGET', KEYS[1], 'epoch')) or 0) + 1, tonumber(ARGV[1]))
redis.call('HSET', KEYS[1], 'epoch', claimed)
return claimed
"""

# A block that is there already stays as it is; only its remaining time, if it has one, is made at least the grace.
_PUT = """
if redis.call('EXISTS', KEYS[1]) == 0 then
    for piece = 2, #ARGV do redis.call('HSET', KEYS[1], piece - 2, ARGV[piece]) end
    redis.call('PEXPIRE', KEYS[1], ARGV[1])
else
    local remaining = redis.call('PTTL', KEYS[1])
    if remaining >= 0 and remaining < tonumber(ARGV[1]) then redis.call('PEXPIRE', KEYS[1], ARGV[1]) end
end
"""

# KEYS: block. ARGV: digest of the damaged piece.
_DISCARD = """
local pieces = redis.call('HKEYS', KEYS[1])
table.sort(pieces, function(one, other) return tonumber(one) < tonumber(other) end)
for place, piece in ipairs(pieces) do pieces[place] = redis.call('HGET', KEYS[1], piece) end
if redis.sha1hex(table.concat(pieces)) == ARGV[1] then redis.call('UNLINK', KEYS[1]) end
"""

# KEYS: head, versions, manifest, members. ARGV: epoch, version, sealed manifest, prefix of block keys, block names...
# The head is switched last, after everything it stands for.
_PUBLISH = """
local epoch, version = tonumber(ARGV[1]), tonumber(ARGV[2])
local claimed = tonumber(redis.call('HGET', KEYS[1], 'epoch')) or 0
if claimed > epoch then return {'epoch', claimed} end
local newest = tonumber(redis.call('HGET', KEYS[1], 'version')) or 0
if version <= newest then
    if redis.call('GET', KEYS[3]) == ARGV[3] then return {'published'} end
    return {'version', newest}
end
local missing = {'missing'}
for name = 5, #ARGV do
    if redis.call('EXISTS', ARGV[4] .. ARGV[name]) == 0 then missing[#missing + 1] = ARGV[name] end
end
if #missing > 1 then return missing end
redis.call('DEL', KEYS[4])
for name = 5, #ARGV do
    redis.call('PERSIST', ARGV[4] .. ARGV[name])
    redis.call('SADD', KEYS[4], ARGV[name])
end
redis.call('SET', KEYS[3], ARGV[3])
redis.call('ZADD', KEYS[2], version, version)
redis.call('HSET', KEYS[1], 'epoch', epoch, 'version', version)
return {'published'}
"""

# KEYS: versions. ARGV: grace in ms, prefixes of manifest, members and block keys, versions to retire...
# If what a kept version needs is not known, because its set was evicted, nothing is retired.
_RETIRE = """
local unwanted, retired, needed, dead = {}, {}, {}, 0
for argument = 5, #ARGV do unwanted[ARGV[argument]] = true end
for place, version in ipairs(redis.call('ZREVRANGE', KEYS[1], 0, -1)) do
    if place > 1 and unwanted[version] then
        retired[#retired + 1] = version
    elseif redis.call('EXISTS', ARGV[3] .. version) == 0 then
        return 0
    else
        for _, name in ipairs(redis.call('SMEMBERS', ARGV[3] .. version)) do needed[name] = true end
    end
end
for _, version in ipairs(retired) do
    for _, name in ipairs(redis.call('SMEMBERS', ARGV[3] .. version)) do
        if not needed[name] then
            needed[name] = true
            dead = dead + redis.call('PEXPIRE', ARGV[4] .. name, ARGV[1])
        end
    end
    redis.call('DEL', ARGV[2] .. version, ARGV[3] .. version)
    redis.call('ZREM', KEYS[1], version)
end
return dead
"""


class RedisSnapshotRepository:
    """See the contract in `streams.ports_snapshots`. Connects when first used; an async context manager."""

    def __init__(
        self,
        url: str,
        *,
        application: str,
        unsafe_allowed: bool = False,
        block_grace_seconds: float = BLOCK_GRACE_SECONDS,
        timeout_seconds: float = 5.0,
    ) -> None:
        """`url` is redis[s]://[[user]:password@]host:port[/db] or unix://[[user]:password@]/path. Raises
        ConfigurationError."""
        #: The URL without its password, for messages.
        self._where = redacted(url)
        example, schemes = URL_SETTINGS["redis"]
        try:
            parse_url(url, schemes=schemes, example=example)
            self._redis = Redis.from_url(
                url,
                socket_timeout=timeout_seconds,
                socket_connect_timeout=min(2.0, timeout_seconds),
                retry=Retry(ExponentialBackoff(cap=0.5, base=0.05), retries=1),
            )
        except ValueError:  # of the driver too, whose message may quote from the query
            raise ConfigurationError(
                f"PINTAIL_REDIS cannot be used: {self._where}",
                hint=f"write {example}; {ESCAPES}",
            ) from None
        self._application = application
        self._unsafe_allowed = unsafe_allowed
        self._grace_ms = round(block_grace_seconds * 1000)
        self._claim = self._redis.register_script(_CLAIM)
        self._put = self._redis.register_script(_PUT)
        self._discard = self._redis.register_script(_DISCARD)
        self._publish = self._redis.register_script(_PUBLISH)
        self._retire = self._redis.register_script(_RETIRE)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exception: object) -> None:
        await self.close()

    async def close(self) -> None:
        """See the port."""
        await self._redis.aclose()

    async def verify_configuration(self) -> None:
        """See the port; `unsafe_allowed` accepts an unsafe server."""
        with self._errors_translated():
            memory, persistence = await self._redis.info("memory"), await self._redis.info("persistence")
        faults = []
        if (policy := memory.get("maxmemory_policy")) != "noeviction":
            faults.append(f"maxmemory-policy is {policy}: blocks of snapshots would be evicted")
        if persistence.get("aof_enabled") != 1:
            faults.append("appendonly is off: a restart of Redis forgets the snapshots")
        if faults and not self._unsafe_allowed:
            raise SnapshotStoreUnsafeError(
                f"Redis at {self._where} is not safe for snapshots: {'; '.join(faults)}",
                hint="redis-cli CONFIG SET maxmemory-policy noeviction; redis-cli CONFIG SET appendonly yes; "
                "redis-cli CONFIG REWRITE; or accept it with PINTAIL_SNAPSHOT_UNSAFE_REDIS_ALLOWED=true",
            )

    async def claim_epoch(self, partition: int, *, at_least: int) -> int:
        """See the port."""
        with self._errors_translated():
            return int(await self._claim(keys=[self._key(partition, "head")], args=[at_least]))

    async def missing_blocks(self, partition: int, names: Collection[str]) -> frozenset[str]:
        """See the port. Asks with one variadic EXISTS, and name by name only where that finds too few."""
        missing: set[str] = set()
        with self._errors_translated():
            for some in _in_groups(names, _NAMES_PER_CALL):
                keys = [self._block_key(partition, name) for name in some]
                if await self._redis.exists(*keys) == len(keys):
                    continue
                async with self._redis.pipeline(transaction=False) as pipeline:
                    for key in keys:
                        pipeline.exists(key)
                    missing.update(
                        name for name, found in zip(some, await pipeline.execute(), strict=True) if not found
                    )
        return frozenset(missing)

    async def put_blocks(self, partition: int, blocks: Mapping[str, bytes]) -> None:
        """See the port."""
        with self._errors_translated():
            for names in _in_groups(blocks, PIPELINE_BLOCKS):
                async with self._redis.pipeline(transaction=False) as pipeline:
                    for name in names:
                        await self._put(
                            keys=[self._block_key(partition, name)],
                            args=[self._grace_ms, *_pieces(blocks[name])],
                            client=pipeline,
                        )
                    await pipeline.execute()

    async def discard_blocks(self, partition: int, damaged: Mapping[str, str]) -> None:
        """See the port."""
        with self._errors_translated():
            for names in _in_groups(damaged, PIPELINE_BLOCKS):
                async with self._redis.pipeline(transaction=False) as pipeline:
                    for name in names:
                        await self._discard(
                            keys=[self._block_key(partition, name)], args=[damaged[name]], client=pipeline
                        )
                    await pipeline.execute()

    async def publish(
        self, partition: int, *, version: int, epoch: int, manifest: bytes, block_names: Collection[str]
    ) -> None:
        """See the port."""
        suffixes = ("head", "versions", f"manifest:{version}", f"members:{version}")
        with self._errors_translated():
            outcome, *details = await self._publish(
                keys=[self._key(partition, suffix) for suffix in suffixes],
                args=[epoch, version, manifest, self._block_key(partition, ""), *dict.fromkeys(block_names)],
            )
        match outcome:
            case b"published":
                return
            case b"epoch":
                raise fenced_by_epoch(partition, epoch, int(details[0]))
            case b"version":
                raise fenced_by_version(partition, version, int(details[0]))
            case _:
                raise blocks_missing(partition, version, frozenset(name.decode() for name in details))

    async def newest_version(self, partition: int) -> int | None:
        """See the port."""
        with self._errors_translated():
            version = await self._redis.hget(self._key(partition, "head"), "version")
        return None if version is None else int(version)

    async def versions(self, partition: int) -> tuple[int, ...]:
        """See the port."""
        with self._errors_translated():
            versions = cast(list[bytes], await self._redis.zrevrange(self._key(partition, "versions"), 0, -1))
        return tuple(int(version) for version in versions)

    async def load_manifest(self, partition: int, version: int) -> bytes:
        """See the port."""
        with self._errors_translated():
            sealed = await self._redis.get(self._key(partition, f"manifest:{version}"))
        if sealed is None:
            raise version_not_found(partition, version)
        return cast(bytes, sealed)

    async def load_blocks(self, partition: int, names: Collection[str]) -> dict[str, bytes]:
        """See the port."""
        found: dict[str, bytes] = {}
        with self._errors_translated():
            for some in _in_groups(names, PIPELINE_BLOCKS):
                async with self._redis.pipeline(transaction=False) as pipeline:
                    for name in some:
                        pipeline.hgetall(self._block_key(partition, name))
                    for name, pieces in zip(some, await pipeline.execute(), strict=True):
                        if pieces:
                            found[name] = b"".join(pieces[number] for number in sorted(pieces, key=int))
        return found

    async def retire(self, partition: int, versions: Collection[int]) -> int:
        """See the port."""
        prefixes = [self._key(partition, f"{kind}:") for kind in ("manifest", "members", "block")]
        with self._errors_translated():
            return int(
                await self._retire(keys=[self._key(partition, "versions")], args=[self._grace_ms, *prefixes, *versions])
            )

    async def memory_bytes(self, partition: int) -> int:
        """See the port."""
        versions, total = await self.versions(partition), 0
        if not versions:
            return 0
        with self._errors_translated():
            members = [self._key(partition, f"members:{version}") for version in versions]
            manifests = [self._key(partition, f"manifest:{version}") for version in versions]
            names = cast(set[bytes], await self._redis.sunion(members))
            keys = members + manifests + [self._block_key(partition, name.decode()) for name in names]
            for some in _in_groups(keys, _NAMES_PER_CALL):
                async with self._redis.pipeline(transaction=False) as pipeline:
                    for key in some:
                        pipeline.memory_usage(key, samples=0)
                    total += sum(usage or 0 for usage in await pipeline.execute())
        return total

    async def partitions(self) -> tuple[int, ...]:
        """See the port."""
        escaped = re.sub(r"([\\*?\[\]])", r"\\\1", self._application)
        with self._errors_translated():
            keys = [key async for key in self._redis.scan_iter(match=f"{{{escaped}:*}}:head", count=1000)]
        return tuple(sorted({int(key.decode().rpartition(":")[0].rpartition(":")[2].rstrip("}")) for key in keys}))

    def _key(self, partition: int, suffix: str) -> str:
        return f"{{{self._application}:{partition}}}:{suffix}"

    def _block_key(self, partition: int, name: str) -> str:
        return self._key(partition, f"block:{name}")

    @contextmanager
    def _errors_translated(self) -> Iterator[None]:
        """Turns the driver's errors into the tree's; the driver has repeated what it may by then."""
        try:
            yield
        except RedisError as error:
            self._raise_translated(error)

    def _raise_translated(self, error: RedisError) -> NoReturn:
        match error.__cause__ if isinstance(error.__cause__, RedisError) else error:
            case AuthenticationError():  # the driver wraps it in a ConnectionError
                raise SnapshotError(
                    f"Redis at {self._where} refuses the credentials: {error}",
                    hint="set PINTAIL_REDIS to redis://[user]:password@host:port",
                ) from error
            case OutOfMemoryError():
                raise SnapshotStoreUnavailableError(
                    f"Redis at {self._where} is full: {error}",
                    hint="raise its maxmemory, or keep fewer versions (PINTAIL_SNAPSHOTS_KEPT)",
                ) from error
            case RedisConnectionError() | RedisTimeoutError() | BusyLoadingError() | ReadOnlyError() | TryAgainError():
                raise SnapshotStoreUnavailableError(
                    f"Redis at {self._where} cannot be used: {error}",
                    hint="is it running, reachable and done loading? PINTAIL_REDIS says where Pintail looks for it",
                ) from error
            case _:
                raise SnapshotError(
                    f"Redis at {self._where} refused a command: {error}",
                    hint="it must be Redis 7 or newer (or Valkey), and the user must be allowed to run scripts",
                ) from error


def open_snapshot_repository(settings: Settings) -> RedisSnapshotRepository:
    """The repository that the settings name. Connects when first used. Raises ConfigurationError if none is named."""
    settings.require("redis")
    return RedisSnapshotRepository(
        settings.redis, application=settings.application, unsafe_allowed=settings.snapshot_unsafe_redis_allowed
    )


def _pieces(sealed: bytes) -> Sequence[bytes]:
    """`sealed` cut so that no piece exceeds what Redis stores without waste."""
    if len(sealed) <= REDIS_VALUE_BYTES_MAX:
        return (sealed,)
    return [sealed[start : start + REDIS_VALUE_BYTES_MAX] for start in range(0, len(sealed), REDIS_VALUE_BYTES_MAX)]


def _in_groups(items: Collection[Any] | Mapping[Any, Any], size: int) -> Iterator[list[Any]]:
    iterator = iter(items)
    while group := list(islice(iterator, size)):
        yield group
