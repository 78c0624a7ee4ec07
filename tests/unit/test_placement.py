"""Owners and standbys: complete, even, sticky, and never cold while a warm copy is alive."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from hypothesis import given, settings
from hypothesis import strategies as st

from agents.placement import Member, Place, place
from streams.limits import WARM_LAG_RECORDS_MAX

FAR = 10 * WARM_LAG_RECORDS_MAX
PARTITIONS = range(8)
#: After so many, each with everything warm that the one before gave, nothing moves any more.
ASSIGNMENTS_MAX = 4


@st.composite
def groups(draw: st.DrawFn) -> tuple[dict[str, Member], range, int]:
    """Members with any claims and copies, however contradictory; partitions; standbys."""
    partitions = range(draw(st.integers(1, 12)))
    numbers = st.sampled_from(partitions)
    position = st.sampled_from([0, 1, FAR - WARM_LAG_RECORDS_MAX - 1, FAR - WARM_LAG_RECORDS_MAX, FAR - 1, FAR])
    member = st.builds(
        lambda owned, copies: (frozenset(owned), copies),
        st.sets(numbers),
        st.dictionaries(numbers, position),
    )
    members = draw(st.lists(member, min_size=1, max_size=6))
    return (
        {f"m{n}": Member(f"store-{n}", owned, copies) for n, (owned, copies) in enumerate(members)},
        partitions,
        draw(st.integers(0, 3)),
    )


def after(members: Mapping[str, Member], places: Mapping[str, Place]) -> dict[str, Member]:
    """The same members once everything they were given is warm."""
    return {
        member_id: warm(member.worker, places[member_id].owned, places[member_id].standbys)
        for member_id, member in members.items()
    }


def warm(worker: str, owned: Collection[int], standbys: Collection[int] = ()) -> Member:
    return Member(worker, frozenset(owned), dict.fromkeys({*owned, *standbys}, FAR))


@settings(deadline=None)
@given(groups())
def test_every_partition_has_one_owner_and_its_standbys_are_elsewhere(
    group: tuple[dict[str, Member], range, int],
) -> None:
    members, partitions, standbys = group
    places = place(members, partitions, standbys=standbys)
    assert places.keys() == members.keys()
    assert sorted(p for each in places.values() for p in each.owned) == list(partitions)
    for each in places.values():
        assert not each.owned & each.standbys
        assert each.awaited <= each.standbys
    for partition in partitions:
        copies = sum(partition in each.standbys for each in places.values())
        awaited = sum(partition in each.awaited for each in places.values())
        wanted = min(standbys, len(members) - 1)
        assert copies == max(wanted, awaited)


@settings(deadline=None)
@given(groups())
def test_a_cold_member_never_owns_a_partition_while_a_warm_one_is_alive(
    group: tuple[dict[str, Member], range, int],
) -> None:
    members, partitions, standbys = group
    for member_id, each in place(members, partitions, standbys=standbys).items():
        for partition in each.owned:
            furthest = max(member.copies.get(partition, -1) for member in members.values())
            own = members[member_id].copies.get(partition)
            assert furthest == -1 or (own is not None and furthest - own <= WARM_LAG_RECORDS_MAX)


@settings(deadline=None, max_examples=50)
@given(groups())
def test_the_load_is_even_once_what_was_given_is_warm_and_nothing_moves_from_then_on(
    group: tuple[dict[str, Member], range, int],
) -> None:
    members, partitions, standbys = group
    for _ in range(ASSIGNMENTS_MAX):
        places = place(members, partitions, standbys=standbys)
        members = after(members, places)
    loads = [len(each.owned) for each in places.values()]
    assert max(loads) - min(loads) <= 1
    assert not any(each.awaited for each in places.values())
    assert place(members, partitions, standbys=standbys) == places


@settings(deadline=None)
@given(st.integers(1, 6), st.integers(1, 12), st.integers(0, 2))
def test_without_copies_partitions_are_dealt_by_name(workers: int, count: int, standbys: int) -> None:
    members = {f"m{n}": Member(f"store-{n}") for n in range(workers)}
    places = place(members, range(count), standbys=standbys)
    assert all(each.owned == {p for p in range(count) if p % workers == n} for n, each in enumerate(places.values()))
    if standbys:
        spread = [len(each.standbys) for each in places.values()]
        assert max(spread) - min(spread) <= standbys


def test_when_a_worker_dies_its_partitions_go_to_their_standbys_and_no_other_moves() -> None:
    members = {"b": warm("b", {2, 3}, {0}), "c": warm("c", {4, 5}, {1})}
    places = place(members, range(6), standbys=1)
    assert places["b"].owned == {0, 2, 3}
    assert places["c"].owned == {1, 4, 5}
    assert places["b"].standbys == {1, 4, 5}, "and new standbys take their place"


def test_a_new_worker_warms_up_before_it_owns_anything() -> None:
    members = {"a": warm("a", set(PARTITIONS)), "b": Member("b")}
    first = place(members, PARTITIONS, standbys=0)
    assert first["a"].owned == set(PARTITIONS)
    assert first["b"].owned == set()
    assert len(first["b"].awaited) == 4
    assert first["b"].standbys == first["b"].awaited
    second = place(after(members, first), PARTITIONS, standbys=0)
    assert second["b"].owned == first["b"].awaited
    assert second["a"].standbys == set()


def test_a_worker_that_comes_back_with_an_old_copy_warms_up_first() -> None:
    members = {"a": warm("a", {0, 1}), "b": Member("b", copies={0: FAR - WARM_LAG_RECORDS_MAX - 1, 1: 1})}
    places = place(members, range(2), standbys=1)
    assert places["a"].owned == {0, 1}
    assert places["b"].standbys == {0, 1}
    assert len(places["b"].awaited) == 1


def test_of_two_that_claim_a_partition_the_one_that_is_further_keeps_it() -> None:
    zombie = Member("a", frozenset({0}), {0: FAR - 10})
    owner = Member("b", frozenset({0}), {0: FAR})
    assert place({"a": zombie, "b": owner}, [0], standbys=1)["b"].owned == {0}
