"""Partition p of every topic goes to one member (D2)."""

from __future__ import annotations

import pytest
from aiokafka.cluster import ClusterMetadata
from aiokafka.consumer.subscription_state import SubscriptionState
from aiokafka.coordinator.protocol import ConsumerProtocolMemberAssignment, ConsumerProtocolMemberMetadata
from aiokafka.structs import TopicPartition

from agents.assignor import CopartitionAssignor, Membership, copartition_assignor
from agents.placement import Place


class Cluster(ClusterMetadata):  # type: ignore[misc]
    """Topics with their partition counts."""

    def __init__(self, **counts: int) -> None:
        super().__init__()
        self._counts = counts

    def partitions_for_topic(self, topic: str) -> set[int]:
        return set(range(self._counts[topic]))


def assign(
    cluster: Cluster, workers: dict[str, str], topics: list[str], knowing_more: dict[str, list[str]] | None = None
) -> dict[str, dict[str, list[int]]]:
    """Member id -> topic -> partitions. `knowing_more`: worker -> what it subscribes to besides `topics`."""
    members: dict[str, ConsumerProtocolMemberMetadata] = {
        member_id: copartition_assignor(Membership(worker)).metadata([*topics, *(knowing_more or {}).get(worker, ())])
        for member_id, worker in workers.items()
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


WORKERS = {"m1": "a", "m2": "b", "m3": "c"}


@pytest.mark.parametrize("updated", [["a"], ["b"], ["a", "c"], ["b", "c"]])
def test_a_rolling_update_that_adds_a_table_moves_nothing_and_splits_no_partition(updated: list[str]) -> None:
    cluster = Cluster(flights=6, planes=6, query=6)
    before = assign(cluster, WORKERS, ["flights", "query"])
    during = assign(cluster, WORKERS, ["flights", "query"], {worker: ["planes"] for worker in updated})
    for member_id, worker in WORKERS.items():
        expected = before[member_id]
        if worker in updated:
            expected = {**expected, "planes": expected["flights"]}
        assert during[member_id] == expected


def test_after_the_update_every_partition_of_the_new_table_has_an_owner() -> None:
    cluster = Cluster(flights=6, planes=6)
    after = assign(cluster, WORKERS, ["flights", "planes"])
    assert all(topics["planes"] == topics["flights"] for topics in after.values())
    assert sorted(partition for topics in after.values() for partition in topics["planes"]) == list(range(6))


async def test_a_member_that_has_not_the_new_table_yet_accepts_its_assignment() -> None:
    """aiokafka asserts that nobody is given a topic that it did not subscribe to."""
    during = assign(Cluster(flights=2, planes=2), {"m1": "a", "m2": "b"}, ["flights"], {"b": ["planes"]})
    subscriptions = SubscriptionState()
    subscriptions.subscribe({"flights"})
    subscriptions.assign_from_subscribed(
        {TopicPartition(topic, partition) for topic, partitions in during["m1"].items() for partition in partitions}
    )


def test_partitions_that_wait_for_an_update_are_named(caplog: pytest.LogCaptureFixture) -> None:
    assign(Cluster(flights=2, planes=2), {"m1": "a", "m2": "b"}, ["flights"], {"b": ["planes"]})
    assert "planes[0]" in caplog.text


def test_standbys_reach_their_members_and_each_join_says_something_new() -> None:
    memberships = {
        "m1": Membership("a", standbys=1, copies=lambda: {0: 700, 1: 9}),
        "m2": Membership("b", standbys=1, copies=lambda: {1: 9}),
    }
    memberships["m1"].owned = frozenset({0})
    assignors = {member_id: copartition_assignor(membership) for member_id, membership in memberships.items()}
    members = {member_id: assignor.metadata(["flights"]) for member_id, assignor in assignors.items()}
    assert members["m1"].user_data != assignors["m1"].metadata(["flights"]).user_data
    for member_id, assignment in assignors["m1"].assign(Cluster(flights=2), members).items():
        sent = ConsumerProtocolMemberAssignment.decode(assignment.encode())
        assignors[member_id].on_assignment(sent)
    assert memberships["m1"].given == Place(standbys=frozenset({1}))
    assert memberships["m2"].given == Place(standbys=frozenset({0}))


@pytest.mark.parametrize("said", [b"", b"store-0", b"[]", b"\xff"])
def test_a_member_that_says_something_else_gets_partitions_all_the_same(said: bytes) -> None:
    known = copartition_assignor(Membership("b")).metadata(["flights"])
    other = ConsumerProtocolMemberMetadata(0, ["flights"], said)
    assigned = CopartitionAssignor.assign(Cluster(flights=2), {"m1": other, "m2": known})
    assert {len(dict(each.assignment)["flights"]) for each in assigned.values()} == {1}
    membership = Membership("a")
    membership.accept(said)
    assert membership.given == Place()
