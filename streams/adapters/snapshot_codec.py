"""Seals snapshot blocks and manifests: named by a keyed hash, LZ4-compressed, AES-256-GCM-encrypted.

    stored  = "PTLS" | format 1 byte | packing 1 byte (0 raw, 1 LZ4 frame) | key id 8 bytes | nonce 12 bytes
              | AES-256-GCM(packed content)                 42 bytes more than the packed content, with the tag

The associated data binds the header to the place: application, partition, and block name or version; so a sealed piece
moved elsewhere does not open. Nonces are random: derived from content, one would repeat with another plaintext as soon
as the compressor's version changes. Encryption, names and key id use keys of their own, derived with HKDF from
`snapshot_key`. Of several keys the first one seals, and each opens what it sealed; equal blocks have another name under
each key, so no version mixes keys. Pure and thread-safe; called from worker threads.
"""

from __future__ import annotations

import hmac
import os
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import NoReturn

import lz4.frame
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from schemas.manifest import Manifest
from streams.config import Settings
from streams.errors import SnapshotCorruptError, SnapshotKeyError
from streams.limits import SNAPSHOT_BLOCK_BYTES

_MAGIC = b"PTLS"
_FORMAT = 1
_RAW, _LZ4 = 0, 1
_KEY_ID_BYTES = 8
_NONCE_BYTES = 12
_HEADER_BYTES = len(_MAGIC) + 2 + _KEY_ID_BYTES
#: What sealing adds to content that does not compress.
OVERHEAD_BYTES = _HEADER_BYTES + _NONCE_BYTES + 16
#: 160 bits: no two blocks will ever share a name by chance, and without the key nobody can aim.
_NAME_BYTES = 20


@dataclass(frozen=True)
class _Key:
    """What is derived from one `snapshot_key`."""

    key_id: bytes
    cipher: AESGCM = field(repr=False)
    name_key: bytes = field(repr=False)

    @classmethod
    def of(cls, key: bytes) -> _Key:
        assert len(key) == 32, "AES-256"
        return cls(
            key_id=_derived(key, "key id", _KEY_ID_BYTES),
            cipher=AESGCM(_derived(key, "encryption", 32)),
            name_key=_derived(key, "names", 32),
        )

    def hash_of(self, purpose: bytes, data: bytes) -> str:
        return hmac.digest(self.name_key, purpose + b"\0" + data, "sha256")[:_NAME_BYTES].hex()

    def file_checksum(self, file_bytes: int, names: Iterable[str]) -> str:
        return self.hash_of(b"file", b"%d\n" % file_bytes + "\n".join(names).encode())


class SnapshotCodec:
    """Names, seals and opens for one application, under one key, or opens under older ones as well."""

    def __init__(self, key: bytes, *older_keys: bytes, application: str) -> None:
        self._key = _Key.of(key)
        self._keys = {each.key_id: each for each in map(_Key.of, (*older_keys, key))}
        self._application = application

    @classmethod
    def from_settings(cls, settings: Settings) -> SnapshotCodec:
        """Raises ConfigurationError when no key is set."""
        settings.require("snapshot_key")
        return cls(*settings.snapshot_keys, application=settings.application)

    @property
    def key_id(self) -> str:
        """Tells keys apart without revealing them: the id of the one that seals."""
        return self._key.key_id.hex()

    def key_id_of(self, sealed: bytes) -> str:
        """The id of the key under which something was sealed; meaningless for what is damaged."""
        return sealed[_HEADER_BYTES - _KEY_ID_BYTES : _HEADER_BYTES].hex()

    def name_of(self, block: bytes) -> str:
        """The content address of a block, in hexadecimal digits."""
        return self._key.hash_of(b"block", block)

    def file_checksum(self, file_bytes: int, names: Iterable[str]) -> str:
        """The keyed hash of a file's size and of its blocks' names in order; needs no second pass over the file."""
        return self._key.file_checksum(file_bytes, names)

    def seal_block(self, partition: int, name: str, block: bytes) -> bytes:
        """The stored form of a block whose name is `name`; differs from call to call."""
        assert len(block) <= SNAPSHOT_BLOCK_BYTES
        return self._seal(self._block_place(partition, name), block)

    def open_block(self, partition: int, name: str, sealed: bytes) -> bytes:
        """The block, checked against its name. Raises SnapshotCorruptError or SnapshotKeyError."""
        blocks = frozenset({name})
        block, key = self._open(self._block_place(partition, name), sealed, what=f"block {name}", blocks=blocks)
        if not hmac.compare_digest(key.hash_of(b"block", block), name):
            _raise_damaged(f"block {name}", "its content does not have that name", blocks)
        return block

    def seal_manifest(self, manifest: Manifest) -> bytes:
        """The stored form of a manifest."""
        return self._seal(self._manifest_place(manifest.partition, manifest.version), manifest.to_json())

    def open_manifest(self, partition: int, version: int, sealed: bytes) -> Manifest:
        """The manifest, with its checksum checked. Raises SnapshotCorruptError or SnapshotKeyError."""
        what = f"manifest of version {version} of partition {partition}"
        data, key = self._open(self._manifest_place(partition, version), sealed, what=what)
        try:
            manifest = Manifest.from_json(data)
        except ValueError as error:
            raise SnapshotCorruptError(
                f"the {what} cannot be read: {error}", hint="it was written by another version of Pintail; use that one"
            ) from None
        if manifest.checksum != key.file_checksum(manifest.file_bytes, manifest.blocks):
            _raise_damaged(what, "its checksum does not match its blocks")
        return manifest

    def _seal(self, place: bytes, content: bytes) -> bytes:
        packed, packing = lz4.frame.compress(content), _LZ4
        if len(packed) >= len(content):
            packed, packing = content, _RAW
        header = _MAGIC + bytes((_FORMAT, packing)) + self._key.key_id
        nonce = os.urandom(_NONCE_BYTES)
        return header + nonce + self._key.cipher.encrypt(nonce, packed, header + place)

    def _open(
        self, place: bytes, sealed: bytes, *, what: str, blocks: frozenset[str] = frozenset()
    ) -> tuple[bytes, _Key]:
        """The content, and the key that sealed it."""
        header, nonce = sealed[:_HEADER_BYTES], sealed[_HEADER_BYTES : _HEADER_BYTES + _NONCE_BYTES]
        if len(sealed) < OVERHEAD_BYTES or not header.startswith(_MAGIC):
            _raise_damaged(what, "it does not start like a sealed piece", blocks)
        if header[4] != _FORMAT:
            raise SnapshotCorruptError(
                f"the {what} has sealing format {header[4]}, this version of Pintail reads {_FORMAT}",
                hint="restore with the version of Pintail that wrote it",
                blocks=blocks,
            )
        key = self._keys.get(header[_HEADER_BYTES - _KEY_ID_BYTES :])
        if key is None:
            configured = " and ".join(each.hex() for each in reversed(self._keys))
            raise SnapshotKeyError(
                f"the {what} was written under key {self.key_id_of(sealed)}, but the configured key is {configured}",
                hint="set PINTAIL_SNAPSHOT_KEY to the key that snapshots were taken with, or to NEW,OLD",
            )
        try:
            packed = key.cipher.decrypt(nonce, sealed[_HEADER_BYTES + _NONCE_BYTES :], header + place)
        except InvalidTag:
            _raise_damaged(what, f"it does not authenticate although it is under key {key.key_id.hex()}", blocks)
        return (packed if header[5] == _RAW else bytes(lz4.frame.decompress(packed))), key

    def _block_place(self, partition: int, name: str) -> bytes:
        return f"block\0{self._application}\0{partition}\0{name}".encode()

    def _manifest_place(self, partition: int, version: int) -> bytes:
        return f"manifest\0{self._application}\0{partition}\0{version}".encode()


class BlockFingerprints:
    """Recognises a block seen before in this process, five times faster than naming it: GMAC under a random key.

    DuckDB's own block checksum cannot tell: it is the XOR of the block's words, each multiplied by a constant, so that
    exchanging two values (an upsert that swaps two rows' UUIDs) leaves it unchanged. The nonce may repeat, because the
    tags never leave the process.
    """

    def __init__(self) -> None:
        self._cipher = AESGCM(AESGCM.generate_key(256))

    def of(self, block: bytes) -> bytes:
        """16 bytes; equal for equal blocks, and for others only by a chance of about 2**-114."""
        return self._cipher.encrypt(bytes(_NONCE_BYTES), b"", block)


def _derived(key: bytes, purpose: str, length: int) -> bytes:
    return HKDF(algorithm=SHA256(), length=length, salt=None, info=f"pintail snapshot {purpose}".encode()).derive(key)


def _raise_damaged(what: str, how: str, blocks: frozenset[str] = frozenset()) -> NoReturn:
    raise SnapshotCorruptError(
        f"the {what} is damaged: {how}",
        hint="an older version may be intact: `pintail snapshots verify` checks them",
        blocks=blocks,
    )
