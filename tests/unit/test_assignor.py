"""Partition p of every topic goes to one member (D2)."""

from __future__ import annotations

from aiokafka.cluster import ClusterMetadata
from aiokafka.coordinator.protocol import ConsumerProtocolMemberAssignment, ConsumerProtocolMemberMetadata

from agents.assignor import CopartitionAssignor, copartition_assignor


class Cluster(ClusterMetadata):  # type: ignore[misc]
    """Topics with their partition counts."""

    def __init__(self, **counts: int) -> None:
        super().__init__()
        self._counts = counts

    def partitions_for_topic(self, topic: str) -> set[int]:
        return set(range(self._counts[topic]))


def assign(cluster: Cluster, workers: dict[str, str], topics: list[str]) -> dict[str, dict[str, list[int]]]:
    members: dict[str, ConsumerProtocolMemberMetadata] = {
        member_id: copartition_assignor(worker).metadata(topics) for member_id, worker in workers.items()
    }
    assigned: dict[str, ConsumerProtocolMemberAssignment] = CopartitionAssignor.assign(cluster, members)
    return {member_id: dict(assignment.assignment) for member_id, assignment in assigned.items()}


def test_partition_p_of_every_topic_has_one_owner_whatever_the_counts() -> None:
    cluster = Cluster(flights=6, airlines=1, query=6)
    assigned = assign(cluster, {"m1": "a", "m2": "b", "m3": "c", "m4": "d"}, ["flights", "airlines", "query"])
    owners: dict[int, set[str]] = {}
    for member_id, topics in assigned.items():
        for partitions in topics.values():
            for partition in partitions:
                owners.setdefault(partition, set()).add(member_id)
    assert all(len(owner) == 1 for owner in owners.values())
    assert sorted(owners) == [0, 1, 2, 3, 4, 5]


def test_every_partition_is_assigned_exactly_once_and_evenly() -> None:
    assigned = assign(Cluster(flights=8), {"m1": "a", "m2": "b", "m3": "c"}, ["flights"])
    partitions = [partition for topics in assigned.values() for partition in topics["flights"]]
    assert sorted(partitions) == list(range(8))
    assert {len(topics["flights"]) for topics in assigned.values()} <= {2, 3}


def test_a_restarted_worker_gets_the_same_partitions_under_its_new_member_id() -> None:
    before = assign(Cluster(flights=4), {"m1": "a", "m2": "b"}, ["flights"])
    after = assign(Cluster(flights=4), {"m2": "b", "m0-restarted": "a"}, ["flights"])
    assert after["m0-restarted"] == before["m1"]
    assert after["m2"] == before["m2"]
