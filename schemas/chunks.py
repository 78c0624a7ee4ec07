"""An answer that is larger than a record: cut into chunks in order, and put together again under its checksum.

Each chunk is a record under the reply's key and with its headers, and two more: `chunk`, such as `2/5` for the second
of five, and `checksum`, the CRC-32 of the whole answer in hexadecimal, the same for all of them. An answer that fits
one record has neither.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence

Headers = Sequence[tuple[str, bytes]]

CHUNK_HEADER = "chunk"
CHECKSUM_HEADER = "checksum"


class ChunkError(Exception):
    """Chunks that do not make an answer."""


def chunks_of(value: bytes, *, bytes_max: int) -> list[tuple[bytes, Headers]]:
    """The records of an answer, with the headers that each has beside the reply's own."""
    if len(value) <= bytes_max:
        return [(value, ())]
    total, checksum = -(-len(value) // bytes_max), checksum_of(value)
    return [
        (
            value[number * bytes_max : (number + 1) * bytes_max],
            ((CHUNK_HEADER, b"%d/%d" % (number + 1, total)), (CHECKSUM_HEADER, checksum)),
        )
        for number in range(total)
    ]


def checksum_of(value: bytes) -> bytes:
    """CRC-32, eight hexadecimal digits."""
    return b"%08x" % zlib.crc32(value)


class ChunkCollector:
    """The chunks of one request's answer, as they come. An answer that is sent again after a crash may come between."""

    def __init__(self) -> None:
        #: Checksum -> number of the chunk -> its bytes.
        self._parts: dict[bytes, dict[int, bytes]] = {}

    def add(self, value: bytes, headers: Headers) -> bytes | None:
        """The whole answer once all of it is there, else None. Raises ChunkError if it is not what was sent."""
        named = dict(headers)
        if CHUNK_HEADER not in named:
            return value
        checksum = named.get(CHECKSUM_HEADER, b"")
        number, _, total = named[CHUNK_HEADER].partition(b"/")
        if not (number.isdigit() and total.isdigit()):
            raise ChunkError(f"{CHUNK_HEADER}: {named[CHUNK_HEADER]!r} is not a number of a chunk")
        parts = self._parts.setdefault(checksum, {})
        parts[int(number)] = value
        if len(parts) < int(total):
            return None
        whole = b"".join(part for _, part in sorted(parts.items()))
        if checksum_of(whole) != checksum:
            raise ChunkError("the answer is not what was sent: its checksum differs")
        return whole
