"""A partition's file on disk: who may open it, and whether it is whole.

DuckDB checks its headers when it opens a file and each block only when it reads it. Here every block is checked before
anyone relies on the file, at memory speed: a block is 32768 little-endian words, the first of which is
5381 xor (every other word * 0xbf58476d1ce4e5b9). Called by DuckDBStore before ATTACH; never while the file is attached,
because closing any descriptor of the file would drop DuckDB's own lock on it.

A checksum does not say where a block belongs: one that a disk wrote in the place of another passes, and DuckDB then
reads other rows, or fails so that the whole instance is lost. So every checkpoint leaves `<N>.duckdb.blocks` beside the
file: which blocks the database uses, and their checksums. It counts only for the very header that it was made for, and
costs nothing when it is lost.

    b"PTLB" | checksum of the database header 8 bytes | (block id, checksum) 8 + 8 bytes each | BLAKE2b of that 16 bytes
"""

from __future__ import annotations

import fcntl
import hashlib
import logging
import os
from pathlib import Path
from typing import NamedTuple

import numpy as np

from streams.errors import StoreCorruptError, StoreLockedError
from streams.limits import SNAPSHOT_BLOCK_BYTES

logger = logging.getLogger(__name__)

HEADER_BYTES = 4096
#: The main header and two database headers, of which the one with the higher iteration counts.
HEADERS_BYTES = 3 * HEADER_BYTES
BLOCK_BYTES = SNAPSHOT_BLOCK_BYTES

_CHECKSUM_SEED = np.uint64(5381)
_CHECKSUM_FACTOR = np.uint64(0xBF58476D1CE4E5B9)
_READ_BLOCKS = 8
#: Of metadata in a block: as many parts of what its checksum leaves, in whole words.
_PIECES = 64
_PIECE_BYTES = (BLOCK_BYTES - 8) // _PIECES // 8 * 8
_NO_POINTER = (1 << 64) - 1
_LIST_MAGIC = b"PTLB"
_LIST_HASH_BYTES = 16
_RESTORE_HINT = "remove the partition's file and recover it from a snapshot, from ClickHouse or from the log"


class FileLock:
    """An exclusive lock on a file of its own, held by this process until released. A `signed` one holds the process's
    id, for whoever finds it locked. Raises StoreLockedError."""

    def __init__(self, path: Path, *, signed: bool = False) -> None:
        self._fd: int | None = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            self.release()
            raise StoreLockedError(
                f"{path} is locked: another worker has this partition open",
                hint="stop the other worker, or give this one a name and a data directory of its own",
            ) from None
        if signed:
            os.ftruncate(self._fd, 0)
            os.pwrite(self._fd, str(os.getpid()).encode(), 0)

    def release(self) -> None:
        """Idempotent."""
        if self._fd is not None:
            os.close(self._fd)
            self._fd = None


def companions(path: Path) -> list[Path]:
    """What lies beside a partition file and belongs to it alone: write-ahead logs, and the list of its blocks."""
    return sorted([*path.parent.glob(f"{path.name}.wal*"), *path.parent.glob(f"{path.name}.blocks*")])


def sync_folder(folder: Path) -> None:
    """Makes what was renamed or created in the folder durable."""
    fd = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def discard_unborn(path: Path) -> None:
    """Removes what cannot hold data: a file without complete headers, and logs without a file to belong to."""
    if path.exists() and path.stat().st_size < HEADERS_BYTES:
        path.unlink()
    if not path.exists():
        for log in companions(path):
            log.unlink()


def strip_zero_tail(path: Path) -> int:
    """Cuts zeros off the end of the write-ahead log and returns how many bytes.

    Power loss can extend a file without its data. No entry of the log ends in a zero byte, so only such a tail goes.
    """
    log = path.with_name(f"{path.name}.wal")
    if not log.exists():
        return 0
    with log.open("r+b") as file:
        size = end = file.seek(0, os.SEEK_END)
        while end:
            start = max(0, end - 65536)
            file.seek(start)
            kept = len(file.read(end - start).rstrip(b"\0"))
            end = start + kept
            if kept:
                break
        if end < size:
            file.truncate(end)
            os.fsync(file.fileno())
    return size - end


def unsound_blocks(fd: int, name: str) -> frozenset[int]:
    """Checks the headers and every block; returns the ids of blocks that are damaged or beyond the end of the file.

    They matter only if DuckDB uses them: a process killed in a checkpoint leaves torn blocks that nothing refers to,
    and a header that still counts the free blocks it had cut off. Raises StoreCorruptError for a damaged header.
    """
    headers = os.pread(fd, HEADERS_BYTES, 0)
    for position in range(0, HEADERS_BYTES, HEADER_BYTES):
        if not _sound(np.frombuffer(headers, np.uint64, HEADER_BYTES // 8, position).reshape(1, -1))[0]:
            raise damaged(name, f"the header at byte {position} is damaged")
    block_count = _newest_header(headers).block_count
    present = min(block_count, (os.fstat(fd).st_size - HEADERS_BYTES) // BLOCK_BYTES)
    unsound = set(range(present, block_count))
    buffer = bytearray(_READ_BLOCKS * BLOCK_BYTES)
    for first in range(0, present, _READ_BLOCKS):
        count = min(_READ_BLOCKS, present - first)
        view = memoryview(buffer)[: count * BLOCK_BYTES]
        _pread_into(fd, view, HEADERS_BYTES + first * BLOCK_BYTES)
        sound = _sound(np.frombuffer(view, np.uint64).reshape(count, -1))
        unsound.update(first + int(index) for index in np.flatnonzero(~sound))
    return frozenset(unsound)


def checkpointed_blocks(fd: int) -> frozenset[int]:
    """The ids of the blocks that the newest checkpoint uses: all but those that it lists as free. It lists them in its
    metadata, 64 pieces to a block, each of which begins with a pointer to the next: (piece << 56 | block).

    Reads the file alone, which says the same until the next checkpoint. DuckDB's own functions would count blocks that
    transactions have filled since, and that a crash gives back to be filled with something else."""
    header = _newest_header(os.pread(fd, HEADERS_BYTES, 0))
    content, pointer = bytearray(), header.free_list
    for _ in range(header.block_count * _PIECES):  # a damaged pointer may lead in a circle
        if pointer == _NO_POINTER:
            break
        block, piece = pointer & (1 << 56) - 1, pointer >> 56
        position = HEADERS_BYTES + block * BLOCK_BYTES + 8 + piece * _PIECE_BYTES
        words = os.pread(fd, _PIECE_BYTES, position)
        pointer = int.from_bytes(words[:8], "little")
        content += words[8:]
    count, *free = np.frombuffer(content, np.uint64).tolist() or [0]
    return frozenset(range(header.block_count)) - frozenset(free[:count])


def write_block_list(fd: int, path: Path) -> None:
    """After a checkpoint: notes where the blocks in use are. One that cannot be written is done without."""
    header_checksum = _newest_header(os.pread(fd, HEADERS_BYTES, 0)).checksum
    blocks = np.array(sorted(checkpointed_blocks(fd)), np.uint64)
    words = [os.pread(fd, 8, HEADERS_BYTES + int(block) * BLOCK_BYTES) for block in blocks]
    pairs = np.column_stack([blocks, np.frombuffer(b"".join(words), np.uint64)])
    content = _LIST_MAGIC + header_checksum.to_bytes(8, "little") + pairs.tobytes()
    temporary = path.with_name(f"{path.name}.blocks.new")
    try:
        temporary.write_bytes(content + _list_hash(content))
        temporary.replace(path.with_name(f"{path.name}.blocks"))
    except OSError as error:
        logger.warning("%s: the list of its blocks was not written: %s", path.name, error)


def misplaced_blocks(fd: int, path: Path) -> frozenset[int]:
    """The ids of blocks that are not those that the newest checkpoint left there; none if nobody noted them."""
    try:
        content = path.with_name(f"{path.name}.blocks").read_bytes()
    except FileNotFoundError:
        return frozenset()
    content, written_hash = content[:-_LIST_HASH_BYTES], content[-_LIST_HASH_BYTES:]
    header_checksum = _newest_header(os.pread(fd, HEADERS_BYTES, 0)).checksum
    prefix = _LIST_MAGIC + header_checksum.to_bytes(8, "little")
    if _list_hash(content) != written_hash or not content.startswith(prefix):
        return frozenset()
    pairs = np.frombuffer(content, np.uint64, offset=len(prefix)).reshape(-1, 2).tolist()
    found = ((block, os.pread(fd, 8, HEADERS_BYTES + block * BLOCK_BYTES)) for block, _ in pairs)
    return frozenset(
        block
        for (block, word), (_, checksum) in zip(found, pairs, strict=True)
        if word != checksum.to_bytes(8, "little")
    )


def damaged(name: str, cause: str) -> StoreCorruptError:
    """The error for a file that cannot be used."""
    return StoreCorruptError(f"{name}: {cause}", hint=_RESTORE_HINT)


class _DatabaseHeader(NamedTuple):
    """The words that a database header begins with."""

    checksum: int
    iteration: int
    metadata: int
    free_list: int
    block_count: int


def _newest_header(headers: bytes) -> _DatabaseHeader:
    """The database header that counts."""
    found = (np.frombuffer(headers, np.uint64, 5, n * HEADER_BYTES).tolist() for n in (1, 2))
    return max((_DatabaseHeader(*words) for words in found), key=lambda header: header.iteration)


def _list_hash(content: bytes) -> bytes:
    return hashlib.blake2b(content, digest_size=_LIST_HASH_BYTES).digest()


def _sound(blocks: np.ndarray[tuple[int, int], np.dtype[np.uint64]]) -> np.ndarray[tuple[int], np.dtype[np.bool_]]:
    expected = np.bitwise_xor.reduce(blocks[:, 1:] * _CHECKSUM_FACTOR, axis=1) ^ _CHECKSUM_SEED
    sound: np.ndarray[tuple[int], np.dtype[np.bool_]] = blocks[:, 0] == expected
    return sound


def _pread_into(fd: int, view: memoryview, offset: int) -> None:
    done = 0
    while done < len(view):
        count = os.preadv(fd, [view[done:]], offset + done)
        if not count:
            raise OSError(f"unexpected end of file at byte {offset + done}")
        done += count
