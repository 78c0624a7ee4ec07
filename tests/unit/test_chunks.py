"""An answer is put together from its chunks, or not at all."""

from __future__ import annotations

import random

import pytest

from schemas.chunks import CHECKSUM_HEADER, CHUNK_HEADER, ChunkCollector, ChunkError, chunks_of

VALUE = random.Random(1).randbytes(2_500)


def test_what_fits_one_record_stays_one() -> None:
    assert chunks_of(VALUE, bytes_max=2_500) == [(VALUE, ())]
    assert ChunkCollector().add(VALUE, ()) == VALUE


def test_chunks_make_the_answer_in_any_order_and_with_repeats() -> None:
    chunks = chunks_of(VALUE, bytes_max=1_000)
    assert [dict(headers)[CHUNK_HEADER] for _, headers in chunks] == [b"1/3", b"2/3", b"3/3"]
    for order in ([0, 1, 2], [2, 0, 1], [0, 0, 1, 1, 2]):
        collector = ChunkCollector()
        *before, last = [collector.add(*chunks[number]) for number in order]
        assert set(before) == {None}
        assert last == VALUE


def test_two_answers_to_one_request_do_not_mix() -> None:
    collector = ChunkCollector()
    first, second = (chunks_of(value, bytes_max=1_000) for value in (VALUE, VALUE[::-1]))
    assert [collector.add(*each) for each in (first[0], second[0], second[1], first[1])] == [None] * 4
    assert collector.add(*first[2]) == VALUE


def test_a_damaged_chunk_is_noticed() -> None:
    collector = ChunkCollector()
    (one, headers), *rest = chunks_of(VALUE, bytes_max=1_000)
    collector.add(one[:-1] + b"x" + one[-1:], headers)
    collector.add(*rest[0])
    with pytest.raises(ChunkError, match="checksum"):
        collector.add(*rest[1])
    with pytest.raises(ChunkError, match="not a number"):
        collector.add(one, ((CHUNK_HEADER, b"x"), (CHECKSUM_HEADER, b"")))
