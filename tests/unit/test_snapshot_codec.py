"""Sealing and opening of snapshot blocks and manifests."""

from __future__ import annotations

import os
from dataclasses import replace

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from schemas.manifest import Manifest
from streams.adapters.snapshot_codec import OVERHEAD_BYTES, BlockFingerprints, SnapshotCodec
from streams.config import Settings
from streams.errors import ConfigurationError, SnapshotCorruptError, SnapshotKeyError
from streams.limits import SNAPSHOT_BLOCK_BYTES

KEY = bytes(range(32))
CODEC = SnapshotCodec(KEY, application="test")
OTHER = SnapshotCodec(bytes(32), application="test")


def sealed(block: bytes, partition: int = 3) -> tuple[str, bytes]:
    name = CODEC.name_of(block)
    return name, CODEC.seal_block(partition, name, block)


def manifest() -> Manifest:
    blocks = (CODEC.name_of(b"one"), CODEC.name_of(b"two"), CODEC.name_of(b"one"))
    return Manifest(
        partition=3,
        version=17,
        epoch=9,
        created_at_ms=1_764_000_000_000,
        next_offsets={"flights": 84194, "plänes": 0},
        schema_versions={"flights": 2},
        duckdb_version="1.5.6",
        file_bytes=9,
        content_bytes=6,
        checksum=CODEC.file_checksum(9, blocks),
        blocks=blocks,
    )


@given(block=st.binary(max_size=2000))
def test_any_block_comes_back(block: bytes) -> None:
    name, stored = sealed(block)
    assert CODEC.open_block(3, name, stored) == block


def test_a_compressible_block_shrinks_and_an_incompressible_one_grows_by_the_overhead_only() -> None:
    name, stored = sealed(b"flight " * 30_000)
    assert len(stored) < 3_000
    block = os.urandom(SNAPSHOT_BLOCK_BYTES)
    name, stored = sealed(block)
    assert len(stored) == SNAPSHOT_BLOCK_BYTES + OVERHEAD_BYTES
    assert CODEC.open_block(3, name, stored) == block


def test_sealing_twice_uses_two_nonces_and_one_name() -> None:
    (name, first), (same_name, second) = sealed(b"content"), sealed(b"content")
    assert name == same_name
    assert first != second


def test_stored_bytes_show_nothing_of_the_content() -> None:
    _, stored = sealed(b"confidential" * 2)
    assert b"confidential" not in stored


@given(bit=st.integers(min_value=0), size=st.sampled_from([1, 100, 5000]))
def test_any_flipped_bit_is_found(bit: int, size: int) -> None:
    name, stored = sealed(bytes(size))
    bit %= 8 * len(stored)
    flipped = bytearray(stored)
    flipped[bit // 8] ^= 1 << bit % 8
    with pytest.raises(SnapshotCorruptError):
        CODEC.open_block(3, name, bytes(flipped))


@pytest.mark.parametrize("length", [0, 1, 13, 14, 26, 41, 42, 43])
def test_a_truncated_block_is_found(length: int) -> None:
    name, stored = sealed(b"some content")
    with pytest.raises(SnapshotCorruptError, match="damaged") as refusal:
        CODEC.open_block(3, name, stored[:length])
    assert refusal.value.blocks == {name}


def test_a_block_in_the_place_of_another_is_found() -> None:
    name, stored = sealed(b"one")
    other_name, _ = sealed(b"two")
    for partition, asked in ((3, other_name), (4, name)):
        with pytest.raises(SnapshotCorruptError, match="damaged"):
            CODEC.open_block(partition, asked, stored)
    with pytest.raises(SnapshotCorruptError, match="damaged"):
        SnapshotCodec(KEY, application="another").open_block(3, name, stored)


def test_a_block_sealed_under_a_name_that_is_not_its_own_is_found() -> None:
    wrong_name = CODEC.name_of(b"two")
    with pytest.raises(SnapshotCorruptError, match="does not have that name"):
        CODEC.open_block(3, wrong_name, CODEC.seal_block(3, wrong_name, b"one"))


def test_another_key_is_told_from_damage_and_named() -> None:
    name, stored = sealed(b"content")
    with pytest.raises(SnapshotKeyError) as refusal:
        OTHER.open_block(3, name, stored)
    assert CODEC.key_id in refusal.value.message
    assert OTHER.key_id in refusal.value.message
    assert "PINTAIL_SNAPSHOT_KEY" in refusal.value.hint
    assert not refusal.value.blocks
    damaged = stored[:-1] + bytes([stored[-1] ^ 1])
    with pytest.raises(SnapshotCorruptError, match="damaged") as refusal_of_damaged:
        CODEC.open_block(3, name, damaged)
    assert not isinstance(refusal_of_damaged.value, SnapshotKeyError)


def test_keys_give_different_names_and_ids_and_the_id_does_not_show_the_key() -> None:
    assert CODEC.name_of(b"content") != OTHER.name_of(b"content")
    assert CODEC.key_id != OTHER.key_id
    assert CODEC.key_id not in KEY.hex()


def test_a_manifest_comes_back() -> None:
    original = manifest()
    assert CODEC.open_manifest(3, 17, CODEC.seal_manifest(original)) == original
    assert original.block_names == {CODEC.name_of(b"one"), CODEC.name_of(b"two")}


def test_a_manifest_opens_only_as_its_own_version_of_its_own_partition() -> None:
    stored = CODEC.seal_manifest(manifest())
    for partition, version in ((3, 16), (4, 17)):
        with pytest.raises(SnapshotCorruptError, match="damaged"):
            CODEC.open_manifest(partition, version, stored)
    with pytest.raises(SnapshotKeyError):
        OTHER.open_manifest(3, 17, stored)


def test_a_manifest_whose_blocks_are_in_another_order_is_refused() -> None:
    original = manifest()
    swapped = replace(original, blocks=(original.blocks[1], original.blocks[0], original.blocks[2]))
    with pytest.raises(SnapshotCorruptError, match="checksum"):
        CODEC.open_manifest(3, 17, CODEC.seal_manifest(swapped))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": 2}, "format 2"),
        ({"colour": "red"}, "colour"),
        ({"blocks": None}, "fields"),
        ({"epoch": ...}, "epoch"),
    ],
)
def test_a_manifest_of_another_format_is_refused(change: dict[str, object], message: str) -> None:
    fields = {**orjson.loads(manifest().to_json()), **change}
    data = orjson.dumps({name: value for name, value in fields.items() if value is not ...})
    with pytest.raises(ValueError, match=message):
        Manifest.from_json(data)


def test_fingerprints_tell_apart_what_the_order_blind_checksum_of_duckdb_does_not() -> None:
    fingerprints = BlockFingerprints()
    words = [os.urandom(8) for _ in range(1000)]
    block = b"".join(words)
    words[10], words[20] = words[20], words[10]
    assert fingerprints.of(block) == fingerprints.of(bytes(bytearray(block)))
    assert fingerprints.of(block) != fingerprints.of(b"".join(words))
    assert fingerprints.of(block) != BlockFingerprints().of(block)


def test_the_codec_of_settings_without_a_key_says_which_setting_is_missing() -> None:
    with pytest.raises(ConfigurationError, match="PINTAIL_SNAPSHOT_KEY"):
        SnapshotCodec.from_settings(Settings(snapshot_key=""))
    assert SnapshotCodec.from_settings(Settings(snapshot_key=KEY.hex())).key_id == CODEC.key_id
