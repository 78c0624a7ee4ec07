"""Partition p of every topic goes to one member, so that one worker owns all of partition p (D2).

Members are ordered by worker name, which survives a restart; partition p belongs to member p modulo their number.
The worker name travels in the subscription's user data. A member gets only topics it subscribes to: while a rolling
update adds a table, partition p of its topic waits until the member that owns p has been updated. Handing it to another
member would give partition p two owners, and moving all of p would move most partitions twice.
"""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Iterable, Mapping

from aiokafka.cluster import ClusterMetadata
from aiokafka.coordinator.assignors.abstract import AbstractPartitionAssignor
from aiokafka.coordinator.protocol import ConsumerProtocolMemberAssignment, ConsumerProtocolMemberMetadata

logger = logging.getLogger(__name__)


class CopartitionAssignor(AbstractPartitionAssignor):  # type: ignore[misc]
    """aiokafka's assignor interface; use `copartition_assignor` to bind the worker's name."""

    name = "pintail-copartition"
    version = 0
    worker = b""

    @classmethod
    def assign(
        cls, cluster: ClusterMetadata, members: Mapping[str, ConsumerProtocolMemberMetadata]
    ) -> dict[str, ConsumerProtocolMemberAssignment]:
        """Member id -> its partitions of the topics it subscribes to. Runs on the group's leader."""
        topics = sorted({topic for member in members.values() for topic in member.subscription})
        ordered = sorted(members, key=lambda member_id: (members[member_id].user_data or b"", member_id))
        subscribed = {member_id: frozenset(members[member_id].subscription) for member_id in ordered}
        owned: dict[str, dict[str, list[int]]] = {member_id: defaultdict(list) for member_id in ordered}
        for topic in topics:
            waiting = []
            for partition in sorted(cluster.partitions_for_topic(topic) or ()):
                owner = ordered[partition % len(ordered)]
                if topic in subscribed[owner]:
                    owned[owner][topic].append(partition)
                else:
                    waiting.append(partition)
            if waiting:
                logger.warning("%s%s: not assigned until their workers know the topic; update them", topic, waiting)
        return {
            member_id: ConsumerProtocolMemberAssignment(cls.version, sorted(owned[member_id].items()), b"")
            for member_id in ordered
        }

    @classmethod
    def metadata(cls, topics: Iterable[str]) -> ConsumerProtocolMemberMetadata:
        """What this member tells the group's leader."""
        return ConsumerProtocolMemberMetadata(cls.version, sorted(topics), cls.worker)

    @classmethod
    def on_assignment(cls, assignment: ConsumerProtocolMemberAssignment) -> None:
        """Nothing to remember: the assignment is a function of names and counts."""


def copartition_assignor(worker: str) -> type[CopartitionAssignor]:
    """The assignor of the member that runs as `worker`."""
    return type("WorkerCopartitionAssignor", (CopartitionAssignor,), {"worker": worker.encode()})
