"""The manifest of a snapshot: what one version of one partition consists of, and which log positions it reflects.

Stored as JSON (below), LZ4-compressed and encrypted, one per version. `format` counts incompatible changes; a reader
refuses a newer one. Times are milliseconds since the epoch, sizes bytes.

    {"format": 1, "partition": 3, "version": 17, "epoch": 9, "created_at_ms": 1764000000000,
     "next_offsets": {"flights": 84194}, "schema_versions": {"flights": 1}, "duckdb_version": "1.5.6",
     "file_bytes": 21508096, "content_bytes": 20971520, "checksum": "5d0c...", "blocks": ["a41f...", ...],
     "content_hash": "77e1..."}

The file is the blocks in order: first its header area, then blocks of the database's own size; only the last may be
short. A block's name is the keyed hash of its content, so equal blocks share a name and are stored once. `checksum` is
the keyed hash of `file_bytes` and all names in order: with every block checked against its name, it covers the file.
`content_hash` is that of the store's rows and offsets at that moment, for drills; most versions go without.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import orjson

MANIFEST_FORMAT = 1


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """One version of one partition."""

    partition: int
    version: int
    #: Epoch of the assignment under which it was published.
    epoch: int
    created_at_ms: int
    #: By topic: where replay goes on after a restore.
    next_offsets: Mapping[str, int]
    #: By table: number of the newest migration the file has.
    schema_versions: Mapping[str, int]
    duckdb_version: str
    file_bytes: int
    #: Bytes of the distinct blocks: what the version occupies before compression, shared blocks counted once.
    content_bytes: int
    checksum: str
    blocks: tuple[str, ...]
    #: PartitionStore.content_hash of what was captured; None if nobody computed it.
    content_hash: str | None = None

    @property
    def block_names(self) -> frozenset[str]:
        """The distinct blocks."""
        return frozenset(self.blocks)

    def to_json(self) -> bytes:
        """The documented format."""
        fields = asdict(self)
        if self.content_hash is None:
            del fields["content_hash"]
        return orjson.dumps({"format": MANIFEST_FORMAT, **fields})

    @classmethod
    def from_json(cls, data: bytes) -> Manifest:
        """Raises ValueError that says what is wrong: not JSON, a newer format, a missing or unknown field."""
        fields: dict[str, Any] = orjson.loads(data)
        written = fields.pop("format", None)
        if written != MANIFEST_FORMAT:
            raise ValueError(f"manifest format {written!r}, this version reads {MANIFEST_FORMAT}")
        try:
            return cls(**{**fields, "blocks": tuple(fields["blocks"])})
        except (KeyError, TypeError) as error:
            raise ValueError(f"manifest fields: {error}") from None
