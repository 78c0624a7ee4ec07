"""Orders: narrow events of about 100 bytes, cheap to build, and what a table must hold after any number of them.

Event n is a new order, except that every tenth changes an earlier one: the order halfway back, so that an upsert meets
keys of all ages. Event n of a slice depends on nothing but n and the slice's start, so that several processes can
publish at once; a key belongs to one slice, which keeps its order. Used by `make bench-ingest` and by load profiles.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from decimal import Decimal
from functools import cache
from random import Random
from typing import NamedTuple

UPDATE_EVERY = 10
#: A prime, so that neither slices nor partitions see a pattern; 1 MB of text, far more than a window of LZ4.
_CUSTOMERS = 9_973
_COUNTRIES = ("DE", "FR", "US", "GB", "JP", "BR", "IN", "NL", "PL", "SE")
_KEY_COLUMN = ("BIGINT", "VARCHAR")


class Slice(NamedTuple):
    """Events [start, stop); `start` is a multiple of UPDATE_EVERY."""

    start: int
    stop: int


@dataclass(frozen=True)
class Totals:
    """What a table of orders holds, in numbers that any SQL engine computes exactly."""

    rows: int
    distinct_ids: int
    amount: Decimal

    @classmethod
    def of(cls, row: Sequence[object]) -> Totals:
        """From the one row of `totals_sql`."""
        rows, distinct_ids, amount = row
        return cls(int(str(rows)), int(str(distinct_ids)), Decimal(str(amount)))


def table_sql(*, keyed: bool, text_ids: bool = False, partitions: int = 8, name: str = "orders") -> str:
    """The definition of a table of orders, fed by the topic of its name."""
    key = ",\n    PRIMARY KEY (id)" if keyed else ""
    return f"""CREATE TABLE {name} (
    id       {_KEY_COLUMN[text_ids]} NOT NULL,
    customer VARCHAR NOT NULL,
    amount   DECIMAL(12, 2) NOT NULL,
    country  VARCHAR NOT NULL,
    at       TIMESTAMPTZ NOT NULL{key}
) WITH (topic='{name}', partitions={partitions}, format='json');
"""


def totals_sql(name: str = "orders") -> str:
    """One row for `Totals.of`."""
    return f"SELECT count(*), count(DISTINCT id), coalesce(sum(amount), 0)::VARCHAR FROM {name}"


def slices(events: int, count: int) -> list[Slice]:
    """So many slices, together [0, events)."""
    size = -(-events // count)
    size += -size % UPDATE_EVERY
    return [Slice(start, min(start + size, events)) for start in range(0, events, size)]


def order_of(number: int, start: int) -> int:
    """The order that event `number` of a slice is about, itself the number of an event."""
    if number % UPDATE_EVERY != UPDATE_EVERY - 1:
        return number
    earlier = start + (number - start) // 2
    return earlier - 1 if earlier % UPDATE_EVERY == UPDATE_EVERY - 1 else earlier


def key_of(order: int, *, text_ids: bool = False) -> bytes:
    """The Kafka key, which is the id as plain text."""
    return b"order-%011d" % order if text_ids else b"%d" % order


def value_of(number: int, order: int, *, text_ids: bool = False) -> bytes:
    """The JSON of one event."""
    tail = tail_of(number)
    return b'{"id":"order-%011d"%b' % (order, tail) if text_ids else b'{"id":%d%b' % (order, tail)


def tail_of(number: int) -> bytes:
    """The members of an event after its id, and the closing brace."""
    return _tails()[number % _CUSTOMERS]


def orders(of: Slice, *, text_ids: bool = False) -> Iterator[tuple[bytes, bytes]]:
    """(key, value) of every event of a slice."""
    for number in range(of.start, of.stop):
        order = order_of(number, of.start)
        yield key_of(order, text_ids=text_ids), value_of(number, order, text_ids=text_ids)


def expected_totals(parts: Sequence[Slice]) -> tuple[Totals, Totals]:
    """What an append table and an upsert table hold after all events of these slices."""
    cents = [_cents(number) for number in range(_CUSTOMERS)]
    appended = rows = ids = kept = 0
    for part in parts:
        newest: dict[int, int] = {}
        for number in range(part.start, part.stop):
            amount = cents[number % _CUSTOMERS]
            appended += amount
            order = order_of(number, part.start)
            if order == number:
                ids += 1
                kept += amount
            else:
                kept += amount - newest.get(order, cents[order % _CUSTOMERS])
                newest[order] = amount
        rows += part.stop - part.start
    return Totals(rows, ids, Decimal(appended) / 100), Totals(ids, ids, Decimal(kept) / 100)


def _cents(number: int) -> int:
    return 100 + (number * 7_919) % 1_000_000


@cache
def _tails() -> list[bytes]:
    """The end of the JSON, by customer."""
    random = Random(9_973)
    return [
        (
            f',"customer":"c-{random.randrange(10**7):07d}","amount":{_cents(number) / 100:.2f}'
            f',"country":"{random.choice(_COUNTRIES)}","at":"2026-{random.randrange(1, 13):02d}-'
            f"{random.randrange(1, 29):02d}T{random.randrange(24):02d}:{random.randrange(60):02d}:"
            f'{random.randrange(60):02d}.{random.randrange(1000):03d}Z"}}'
        ).encode()
        for number in range(_CUSTOMERS)
    ]
