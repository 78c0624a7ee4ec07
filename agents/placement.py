"""Which member of the group owns a partition, and which ones keep a warm copy of it. A pure function.

After KIP-441: members say which partitions they hold a copy of and how far each copy is. A copy is warm when it is
close to the furthest one. Then, for each partition:
    home      where it should be: spread evenly, at the one that owned it if that has room, else where a copy is
    owner     its home if a copy is warm there or nowhere; else the warm member that owned it, or has least to do
    standbys  its home first, if that is not the owner: it warms up, and asks for a new assignment once it is warm;
              then as many as configured, at those that hold a copy, spread evenly
So a partition never goes to a member with a cold copy while a warm one is alive, and the load evens out all the same.
Without any copies partition p goes to member p modulo their number, by name. Called by agents/assignor.py.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial

from streams.limits import WARM_LAG_RECORDS_MAX


@dataclass(frozen=True)
class Member:
    """What a member says of itself when it joins."""

    #: Unique, and the same after a restart.
    worker: str
    #: What it owned until now.
    owned: frozenset[int] = frozenset()
    #: Partition -> records applied to its copy (the sum of its next_offsets), of all copies it has, owned or not.
    copies: Mapping[int, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Place:
    """What a member is given."""

    owned: frozenset[int] = frozenset()
    standbys: frozenset[int] = frozenset()
    #: Those of the standbys that it should own once they are warm.
    awaited: frozenset[int] = frozenset()


def place(members: Mapping[str, Member], partitions: Collection[int], *, standbys: int) -> dict[str, Place]:
    """Member id -> its place. Every partition has exactly one owner, and no standby beside it."""
    return _Placement(members, sorted(partitions), standbys).places()


class _Placement:
    def __init__(self, members: Mapping[str, Member], partitions: list[int], standbys: int) -> None:
        self._members = members
        self._partitions = partitions
        self._standbys = min(standbys, len(members) - 1)
        self._order = sorted(members, key=lambda member_id: (members[member_id].worker, member_id))
        self._furthest = {
            partition: max(member.copies.get(partition, 0) for member in members.values()) for partition in partitions
        }

    def places(self) -> dict[str, Place]:
        homes = self._homes()
        owners = self._owners(homes)
        standbys = self._standbys_beside(owners, homes)
        return {
            member_id: Place(
                owned=frozenset(p for p in self._partitions if owners[p] == member_id),
                standbys=frozenset(p for p in self._partitions if member_id in standbys[p]),
                awaited=frozenset(p for p in self._partitions if homes[p] == member_id != owners[p]),
            )
            for member_id in self._order
        }

    def _homes(self) -> dict[int, str]:
        smallest, larger = divmod(len(self._partitions), len(self._order))
        homes: dict[int, str] = {}
        loads: Counter[str] = Counter()

        def has_room(member_id: str) -> bool:
            """Nobody gets two more than another: so many are larger by one."""
            if loads[member_id] < smallest:
                return True
            return loads[member_id] == smallest and sum(load > smallest for load in loads.values()) < larger

        def settle(partition: int, candidates: Iterable[str]) -> None:
            """At the first candidate that has room, if any."""
            for member_id in candidates:
                if has_room(member_id):
                    homes[partition] = member_id
                    loads[member_id] += 1
                    return

        # Those stay whose copies are rarest: what has a copy elsewhere moves most easily.
        for partition in sorted(self._partitions, key=lambda number: len(self._holders(number))):
            settle(partition, self._owners_until_now(partition))
        for partition in self._unsettled(homes):
            settle(partition, sorted(self._warm(partition), key=loads.__getitem__))
        for partition in self._unsettled(homes):
            turn = partition % len(self._order)
            settle(partition, [*self._holders(partition), *self._order[turn:], *self._order[:turn]])
        return homes

    def _owners(self, homes: Mapping[int, str]) -> dict[int, str]:
        warm = {partition: self._warm(partition) for partition in self._partitions}
        owners = {p: homes[p] for p in self._partitions if homes[p] in warm[p] or not warm[p]}
        loads = Counter(owners.values())
        for partition in self._unsettled(owners):
            until_now = [member_id for member_id in self._owners_until_now(partition) if member_id in warm[partition]]
            owners[partition] = min(until_now or warm[partition], key=loads.__getitem__)
            loads[owners[partition]] += 1
        return owners

    def _standbys_beside(self, owners: Mapping[int, str], homes: Mapping[int, str]) -> dict[int, set[str]]:
        fair_share = -(-len(self._partitions) * self._standbys // len(self._order))
        chosen: dict[int, set[str]] = {p: {homes[p]} - {owners[p]} for p in self._partitions}
        loads = Counter(member_id for members in chosen.values() for member_id in members)
        owned = Counter(owners.values())

        def preference(member_id: str, partition: int) -> tuple[bool, int, int, int]:
            """Fair shares, then the furthest copy, then the least to do, then by turns."""
            turn = (self._order.index(member_id) - partition) % len(self._order)
            position = self._members[member_id].copies.get(partition, 0)
            return loads[member_id] >= fair_share, -position, loads[member_id] + owned[member_id], turn

        for partition, members in chosen.items():
            while len(members) < self._standbys:
                candidates = [m for m in self._order if m != owners[partition] and m not in members]
                best = min(candidates, key=partial(preference, partition=partition))
                members.add(best)
                loads[best] += 1
        return chosen

    def _unsettled(self, settled: Collection[int]) -> list[int]:
        return [partition for partition in self._partitions if partition not in settled]

    def _holders(self, partition: int) -> list[str]:
        return [member_id for member_id in self._order if partition in self._members[member_id].copies]

    def _warm(self, partition: int) -> list[str]:
        return [m for m in self._holders(partition) if self._distance(m, partition) <= WARM_LAG_RECORDS_MAX]

    def _owners_until_now(self, partition: int) -> list[str]:
        """Those that claim it, the furthest first."""
        claiming = [member_id for member_id in self._order if partition in self._members[member_id].owned]
        return sorted(claiming, key=lambda member_id: self._distance(member_id, partition))

    def _distance(self, member_id: str, partition: int) -> int:
        """Records behind the furthest copy; a member without a copy is behind by all of them."""
        return self._furthest[partition] - self._members[member_id].copies.get(partition, 0)
