"""Partition p of every topic goes to one member, so that one worker owns all of partition p (D2).

Members say in their subscription's user data who they are and which copies they have; agents/placement.py decides; a
member's standbys travel in the assignment's user data. A member gets only topics it subscribes to: while a rolling
update adds a table, partition p of its topic waits until the member that owns p has been updated. Handing it to another
member would give partition p two owners, and moving all of p would move most partitions twice.
"""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from aiokafka.cluster import ClusterMetadata
from aiokafka.coordinator.assignors.abstract import AbstractPartitionAssignor
from aiokafka.coordinator.protocol import ConsumerProtocolMemberAssignment, ConsumerProtocolMemberMetadata

from agents.placement import Member, Place, place

logger = logging.getLogger(__name__)

CONFIRMED_CHECK_SECONDS = 0.05


class Membership:
    """What this worker tells its group, and what it was given; shared by the consumer's thread, which joins, and the
    worker's loop, which reads `given` and sets `owned`. A worker without state only has a name."""

    def __init__(self, worker: str, *, standbys: int = 0, copies: Callable[[], Mapping[int, int]] = dict) -> None:
        self.worker = worker
        #: What this worker owned last; it stays owned while the group assigns anew.
        self.owned: frozenset[int] = frozenset()
        #: The standbys of the newest assignment.
        self.given = Place()
        self._standbys = standbys
        self._copies = copies
        self._joins = 0
        self._confirmed_at = self._joining_since = time.monotonic()

    def confirm(self, sent_at: float) -> None:
        """The group knew this worker as its member at this moment (monotonic seconds)."""
        self._confirmed_at = sent_at

    async def confirmed(self, session_seconds: float) -> None:
        """Returns once the group has known this worker within a session: before that another one may own what it did.
        Sooner or later it has, or the process ends."""
        while time.monotonic() - self._confirmed_at > session_seconds:  # noqa: ASYNC110  # another thread moves it
            await asyncio.sleep(CONFIRMED_CHECK_SECONDS)

    def subscription_data(self) -> bytes:
        """User data of the subscription. Different each time: of one who asks for a new assignment with the data that
        it joined with before, Kafka takes no notice."""
        self._joining_since = time.monotonic()
        self._joins += 1
        said = {
            "worker": self.worker,
            "owned": sorted(self.owned),
            "copies": dict(self._copies()),
            "standbys": self._standbys,
            "joins": self._joins,
        }
        return json.dumps(said).encode()

    def accept(self, data: bytes) -> None:
        """Takes note of the user data of an assignment. The group knew this worker when it answered, which may be as
        long ago as the worker asked: the process may have been stopped since. Then it waits for a heartbeat."""
        self.confirm(max(self._confirmed_at, self._joining_since))
        given = _object_of(data)
        self.given = Place(standbys=frozenset(given.get("standbys", ())), awaited=frozenset(given.get("awaited", ())))


class CopartitionAssignor(AbstractPartitionAssignor):  # type: ignore[misc]
    """aiokafka's assignor interface; use `copartition_assignor` to bind the worker's membership."""

    name = "pintail-copartition"
    version = 0
    membership = Membership("")

    @classmethod
    def assign(
        cls, cluster: ClusterMetadata, members: Mapping[str, ConsumerProtocolMemberMetadata]
    ) -> dict[str, ConsumerProtocolMemberAssignment]:
        """Member id -> its partitions of the topics it subscribes to. Runs on the group's leader."""
        topics = sorted({topic for member in members.values() for topic in member.subscription})
        partitions_of = {topic: sorted(cluster.partitions_for_topic(topic) or ()) for topic in topics}
        said = {member_id: _object_of(member.user_data) for member_id, member in members.items()}
        places = place(
            {member_id: _member_of(each) for member_id, each in said.items()},
            {partition for partitions in partitions_of.values() for partition in partitions},
            standbys=max((int(each.get("standbys", 0)) for each in said.values()), default=0),
        )
        assigned: dict[str, dict[str, list[int]]] = {member_id: defaultdict(list) for member_id in members}
        waiting: dict[str, list[int]] = defaultdict(list)
        for member_id, member in members.items():
            for topic, partitions in partitions_of.items():
                owned = [partition for partition in partitions if partition in places[member_id].owned]
                if owned:
                    (assigned[member_id] if topic in member.subscription else waiting)[topic] += owned
        for topic, partitions in waiting.items():
            logger.warning("%s%s: not assigned until their workers know the topic; update them", topic, partitions)
        return {
            member_id: ConsumerProtocolMemberAssignment(
                cls.version, sorted(assigned[member_id].items()), _assignment_data(places[member_id])
            )
            for member_id in members
        }

    @classmethod
    def metadata(cls, topics: Iterable[str]) -> ConsumerProtocolMemberMetadata:
        """What this member tells the group's leader."""
        return ConsumerProtocolMemberMetadata(cls.version, sorted(topics), cls.membership.subscription_data())

    @classmethod
    def on_assignment(cls, assignment: ConsumerProtocolMemberAssignment) -> None:
        """Takes note of the standbys; the partitions reach their owner through the consumer."""
        cls.membership.accept(assignment.user_data)


def copartition_assignor(membership: Membership) -> type[CopartitionAssignor]:
    """The assignor of one member."""
    return type("MemberCopartitionAssignor", (CopartitionAssignor,), {"membership": membership})


def _assignment_data(given: Place) -> bytes:
    return json.dumps({"standbys": sorted(given.standbys), "awaited": sorted(given.awaited)}).encode()


def _object_of(data: bytes | None) -> dict[str, Any]:
    """What a member or the leader says; nothing if another version says it otherwise."""
    try:
        said = json.loads(data or b"{}")
    except ValueError:
        said = None
    return said if isinstance(said, dict) else {}


def _member_of(said: Mapping[str, Any]) -> Member:
    copies = {int(partition): int(position) for partition, position in said.get("copies", {}).items()}
    return Member(worker=said.get("worker", ""), owned=frozenset(said.get("owned", ())), copies=copies)
