"""An independent oracle: what the log says tables must hold, against what the stores say they hold.

It reads the topics itself, judges every record by itself (it shares no code with the decoder or the store), and asks
over the query topic like anybody else. Rows are compared by (partition, offset) and event number, so it tells lost rows
from doubled, unexpected and changed ones; dead letters are compared by the offsets in their headers.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, NamedTuple

import orjson
from confluent_kafka import Message

from schemas import dead_letters
from schemas.table import ScalarKind, ScalarType, TableDefinition

#: Every table of a load profile has this column: the number of the event that made the row.
NUMBER = "n"
_BUCKET_OFFSETS_MIN = 1_000
_BUCKETS_MAX = 4_000
_PAGE_OFFSETS = 4_000
_NAMED_MAX = 5

#: Rows of an SQL statement.
Ask = Callable[[str], Sequence[Sequence[Any]]]


class Record(NamedTuple):
    """One record of a topic, as the oracle needs it."""

    partition: int
    offset: int
    key: bytes | None
    value: bytes | None

    @classmethod
    def of(cls, message: Message) -> Record:
        """From a consumer."""
        return cls(message.partition(), message.offset(), message.key(), message.value())


@dataclass
class Expected:
    """What the log says about one table."""

    #: partition -> offset -> number of the event, of every row that must be there.
    rows: defaultdict[int, dict[int, int]] = field(default_factory=lambda: defaultdict(dict))
    #: (partition, offset) of every record that must be parked.
    parked: set[tuple[int, int]] = field(default_factory=set)
    #: partition -> (offset, number) of every record that is no poison, in order.
    arrivals: defaultdict[int, list[tuple[int, int]]] = field(default_factory=lambda: defaultdict(list))
    #: partition -> the offset of its last record.
    last_offsets: dict[int, int] = field(default_factory=dict)


@dataclass
class Verdict:
    """How many rows or letters are not as they must be, and the first few by name."""

    expected: int = 0
    lost: int = 0
    doubled: int = 0
    unexpected: int = 0
    changed: int = 0
    named: list[str] = field(default_factory=list)

    @property
    def is_right(self) -> bool:
        """True if nothing is wrong."""
        return not (self.lost or self.doubled or self.unexpected or self.changed)

    def note(self, what: str, where: str, count: int = 1) -> None:
        """`what` is the name of one of the counts."""
        setattr(self, what, getattr(self, what) + count)
        if len(self.named) < _NAMED_MAX:
            self.named.append(f"{what}: {where}")

    def add(self, other: Verdict) -> None:
        """Both together."""
        for name in ("expected", "lost", "doubled", "unexpected", "changed"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        self.named = [*self.named, *other.named][:_NAMED_MAX]


def expected_of(table: TableDefinition, records: Iterable[Record]) -> Expected:
    """Plays the log through, record by record. Of a keyed table the newest record of a key is its row."""
    expected = Expected()
    newest: dict[Any, tuple[int, int]] = {}
    for partition, offset, key, value in records:
        expected.last_offsets[partition] = offset
        fields = judged(table, key, value)
        if fields is None:
            expected.parked.add((partition, offset))
            continue
        expected.arrivals[partition].append((offset, fields[NUMBER]))
        if table.is_keyed:
            row_key = tuple(fields[name] for name in table.primary_key)
            if row_key in newest:
                old_partition, old_offset = newest[row_key]
                del expected.rows[old_partition][old_offset]
            newest[row_key] = partition, offset
        expected.rows[partition][offset] = fields[NUMBER]
    return expected


def judged(table: TableDefinition, key: bytes | None, value: bytes | None) -> dict[str, Any] | None:
    """The fields of a record, or None if it has to be parked. Load profiles write no tombstones."""
    if value is None or (table.is_keyed and key is None):
        return None
    try:
        fields = orjson.loads(value)
    except orjson.JSONDecodeError:
        return None
    if not isinstance(fields, dict):
        return None
    for column in table.columns:
        given = fields.get(column.name)
        assert isinstance(column.type, ScalarType), "load profiles have scalars only"
        if given is None:
            if not column.nullable or column.name in table.primary_key:
                return None
        elif not _fits(given, column.type.kind):
            return None
    return fields


def _fits(given: object, kind: ScalarKind) -> bool:
    if kind is ScalarKind.BIGINT:
        return type(given) is int and -(2**63) <= given < 2**63
    if kind is ScalarKind.BOOLEAN:
        return type(given) is bool
    if kind in (ScalarKind.DOUBLE, ScalarKind.DECIMAL):
        return type(given) in (int, float)
    if kind is ScalarKind.TIMESTAMPTZ:
        try:
            return isinstance(given, str) and datetime.fromisoformat(given).tzinfo is not None
        except ValueError:
            return False
    assert kind is ScalarKind.VARCHAR, f"the oracle does not judge {kind}"
    return isinstance(given, str)


def compare_rows(table: TableDefinition, expected: Expected, ask: Ask) -> Verdict:
    """Asks for sums over ranges of offsets first, and for single rows where those differ."""
    verdict = Verdict(expected=sum(map(len, expected.rows.values())))
    size = bucket_size(sum(expected.last_offsets.values()))
    wanted = _buckets(expected, size)
    found = {
        (int(partition), int(bucket)): (int(rows), int(distinct), int(offsets), int(squares), int(numbers))
        for partition, bucket, rows, distinct, offsets, squares, numbers in ask(
            f"SELECT _partition, _offset // {size} AS bucket, count(*), count(DISTINCT _offset), "
            f"sum(_offset)::VARCHAR, sum(_offset::HUGEINT * _offset)::VARCHAR, sum({NUMBER})::VARCHAR "
            f"FROM {table.name} GROUP BY _partition, bucket"
        )
    }
    for partition, bucket in sorted(wanted.keys() | found.keys()):
        if wanted.get((partition, bucket)) != found.get((partition, bucket)):
            for low in range(bucket * size, (bucket + 1) * size, _PAGE_OFFSETS):
                high = min(low + _PAGE_OFFSETS, (bucket + 1) * size)
                _compare_page(table, expected, ask, verdict, partition, low, high)
    return verdict


def bucket_size(offsets: int) -> int:
    """So many offsets a bucket that the answer with all buckets stays small."""
    return max(_BUCKET_OFFSETS_MIN, -(-offsets // _BUCKETS_MAX))


def _buckets(expected: Expected, size: int) -> dict[tuple[int, int], tuple[int, int, int, int, int]]:
    sums: dict[tuple[int, int], list[int]] = {}
    for partition, rows in expected.rows.items():
        for offset, number in rows.items():
            each = sums.setdefault((partition, offset // size), [0, 0, 0, 0, 0])
            each[0] += 1
            each[1] += 1
            each[2] += offset
            each[3] += offset * offset
            each[4] += number
    return {where: (each[0], each[1], each[2], each[3], each[4]) for where, each in sums.items()}


def _compare_page(
    table: TableDefinition, expected: Expected, ask: Ask, verdict: Verdict, partition: int, low: int, high: int
) -> None:
    there = ask(
        f"SELECT _offset, min({NUMBER}), count(*) FROM {table.name} "
        f"WHERE _partition = {partition} AND _offset >= {low} AND _offset < {high} GROUP BY _offset"
    )
    wanted = {offset: number for offset, number in expected.rows[partition].items() if low <= offset < high}
    for offset, number, count in there:
        where = f"{table.name}[{partition}]@{offset}"
        if offset not in wanted:
            verdict.note("unexpected", where, count)
            continue
        if number != wanted[offset]:
            verdict.note("changed", where)
        if count > 1:
            verdict.note("doubled", where, count - 1)
    for offset in wanted.keys() - {offset for offset, *_ in there}:
        verdict.note("lost", f"{table.name}[{partition}]@{offset}")


def compare_dead_letters(table: TableDefinition, expected: Expected, letters: Iterable[Message]) -> Verdict:
    """Each poison record must be parked once. Workers that were killed may repeat a letter; load profiles kill none."""
    verdict = Verdict(expected=len(expected.parked))
    found = Counter(place for letter in letters if (place := _source_of(letter, table.topic)))
    for place, count in found.items():
        where = f"letter of {table.topic}[{place[0]}]@{place[1]}"
        if place not in expected.parked:
            verdict.note("unexpected", where, count)
        elif count > 1:
            verdict.note("doubled", where, count - 1)
    for partition, offset in expected.parked - found.keys():
        verdict.note("lost", f"letter of {table.topic}[{partition}]@{offset}")
    return verdict


def _source_of(letter: Message, topic: str) -> tuple[int, int] | None:
    headers = dict(letter.headers() or [])
    if headers.get(dead_letters.TOPIC, b"").decode() != topic:
        return None
    return int(headers[dead_letters.PARTITION]), int(headers[dead_letters.OFFSET])
