"""The load profiles: what is sent, how fast, which bug each one catches, and what is expected of a worker meanwhile.

Correctness is expected of every profile: no row and no dead letter is lost, doubled, unexpected or changed. The bounds
here are about speed and memory, on two cores with the broker beside the worker; they are reported as
met or not.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from random import Random
from typing import NamedTuple

from loadtest.open_loop import Event, Phase
from loadtest.orders import tail_of

_MIB_MAX = 1_024
_KEYS = 10_000
_MANY = 32
_WIDE_COLUMNS = 200
_WIDE_VARIANTS = 97
_WIDE_KINDS = ("BIGINT", "DOUBLE", "VARCHAR", "BOOLEAN")
_HOT_SHARE = 100
_PARTITIONS = 8


class Bound(NamedTuple):
    """A metric of the result and what it may be at most, or has to be at least."""

    metric: str
    limit: float
    at_least: bool = False

    def is_met(self, measured: float) -> bool:
        """True within the bound."""
        return measured >= self.limit if self.at_least else measured <= self.limit


@dataclass(frozen=True)
class Profile:
    """One load. `event` gives record n and can be imported by name."""

    name: str
    #: One sentence.
    catches: str
    tables: Mapping[str, str]
    event: Callable[[int], Event]
    bounds: tuple[Bound, ...]
    phases: tuple[Phase, ...] = ()
    #: Events published before the worker starts; such a profile has no phases.
    backlog: int = 0


def _table(name: str, *, keyed: bool = False, partitions: int = _PARTITIONS, more: str = "") -> str:
    key = ", PRIMARY KEY (id)" if keyed else ""
    return (
        f"CREATE TABLE {name} (id BIGINT NOT NULL, n BIGINT NOT NULL, customer VARCHAR NOT NULL, "
        f"amount DECIMAL(12, 2) NOT NULL, country VARCHAR, at TIMESTAMPTZ NOT NULL{more}{key}) "
        f"WITH (topic='{name}', partitions={partitions}, format='json');\n"
    )


def _event(topic: str, number: int, row_id: int, partition: int = -1) -> Event:
    return Event(topic, b"%d" % row_id, b'{"id":%d,"n":%d%b' % (row_id, number, tail_of(number)), partition)


def both_kinds(number: int) -> Event:
    """By turns a row of its own, and a change of one of 10,000."""
    if number % 2:
        return _event("accounts", number, number // 2 % _KEYS)
    return _event("orders", number, number)


def appended(number: int) -> Event:
    """A row of its own."""
    return _event("orders", number, number)


def to_a_hot_partition(number: int) -> Event:
    """Partition 0 gets 100 events for every one of each other partition."""
    place = number % (_HOT_SHARE + _PARTITIONS - 1)
    return _event("orders", number, number, max(0, place - _HOT_SHARE + 1))


def to_many_tables(number: int) -> Event:
    """One table after the other; every second one is keyed."""
    table = number % _MANY
    row_id = number // _MANY % _KEYS if table % 2 else number
    return _event(f"table_{table:02d}", number, row_id)


def with_poison(number: int) -> Event:
    """One in five cannot be stored, in six ways."""
    good = _event("orders", number, number)
    if number % 5:
        return good
    assert good.value is not None
    kinds = (
        good.value[:-1],
        b"[%b]" % good.value,
        good.value.replace(b'"id":', b'"it":', 1),
        good.value.replace(b'"n":', b'"n":"x","m":', 1),
        good.value.replace(b'"id":', b'"id":9223372036854775808,"it":', 1),
        good.value.replace(b'"at":"2026', b'"at":"soon', 1),
    )
    return good._replace(value=kinds[number // 5 % len(kinds)])


def wide(number: int) -> Event:
    """200 further columns, some of them null or missing; about 4 KB."""
    start = b'{"id":%d,"n":%d' % (number, number)
    return Event("wide", b"%d" % number, start + _wide_tails()[number % _WIDE_VARIANTS] + tail_of(number))


@cache
def _wide_tails() -> list[bytes]:
    random = Random(200)
    values: tuple[Callable[[], str], ...] = (
        lambda: str(random.randrange(-(10**12), 10**12)),
        lambda: repr(random.random() * 1e6),
        lambda: '"' + "".join(random.choices("abcdefgh \u00fc\u2603", k=random.randrange(40))) + '"',
        lambda: random.choice(("true", "false")),
    )

    def tail() -> str:
        members = []
        for column in range(_WIDE_COLUMNS):
            dice = random.random()
            if dice > 0.1:
                value = "null" if dice < 0.2 else values[column % len(values)]()
                members.append(f',"c{column:03d}":{value}')
        return "".join(members)

    return [tail().encode() for _ in range(_WIDE_VARIANTS)]


_WIDE_SQL = "".join(f", c{column:03d} {_WIDE_KINDS[column % len(_WIDE_KINDS)]}" for column in range(_WIDE_COLUMNS))
_MEMORY = Bound("peak_rss_mib", _MIB_MAX)

PROFILES: dict[str, Profile] = {
    profile.name: profile
    for profile in (
        Profile(
            "steady",
            "A group commit that waits for company, a checkpoint that stalls its partition, or a leak: 20,000 events a "
            "second have to become visible one like the other.",
            {"orders": _table("orders"), "accounts": _table("accounts", keyed=True)},
            both_kinds,
            (Bound("visible_ms_p99", 100), _MEMORY),
            (Phase(40, 20_000),),
        ),
        Profile(
            "burst",
            "Queues without a bound, and batches that never shrink again after a burst 50 times the usual rate.",
            {"orders": _table("orders"), "accounts": _table("accounts", keyed=True)},
            both_kinds,
            (Bound("visible_ms_p99", 2_000), Bound("catch_up_seconds", 1), _MEMORY),
            (*(Phase(5, 2_000), Phase(2, 100_000)) * 3, Phase(10, 2_000)),
        ),
        Profile(
            "hot-partition",
            "A partition with 100 times the events of each other one starves those: their events have to become "
            "visible as if it were not there.",
            {"orders": _table("orders")},
            to_a_hot_partition,
            (Bound("visible_ms_p99", 250), Bound("quiet_partitions_ms_p99", 100), _MEMORY),
            (Phase(30, 20_000),),
        ),
        Profile(
            "backlog-drain",
            "Work per event on the path from a fetched batch to a durable row, and memory that grows with the backlog.",
            {"orders": _table("orders")},
            appended,
            (Bound("drain_events_per_second", 1_000_000, at_least=True), _MEMORY),
            backlog=2_000_000,
        ),
        Profile(
            "many-tables",
            "Costs per table and transaction: 32 tables share the rate that one table takes.",
            {
                f"table_{table:02d}": _table(f"table_{table:02d}", keyed=table % 2 == 1, partitions=4)
                for table in range(_MANY)
            },
            to_many_tables,
            (Bound("visible_ms_p99", 250), _MEMORY),
            (Phase(30, 20_000),),
        ),
        Profile(
            "poison-storm",
            "One poison record costs its neighbours: they are lost with it, parked with it, or wait for it.",
            {"orders": _table("orders")},
            with_poison,
            (Bound("visible_ms_p99", 500), _MEMORY),
            (Phase(20, 10_000),),
        ),
        Profile(
            "wide-rows",
            "Limits counted in records instead of bytes, and costs per column: rows of 206 columns and 4 KB.",
            {"wide": _table("wide", more=_WIDE_SQL)},
            wide,
            (Bound("visible_ms_p99", 250), _MEMORY),
            (Phase(30, 1_000),),
        ),
    )
}
