"""What changed between two answers: whatever the rows are, the client ends up with those of the worker."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from schemas.deltas import Delta, DeltaError, split

ROWS = st.lists(st.integers(0, 5), max_size=12)


@given(ROWS, ROWS)
def test_a_delta_leads_from_the_old_rows_to_the_new_ones(old: list[int], new: list[int]) -> None:
    change = Delta.between(old, new, ordered=False)
    assert change is not None
    delta, rows = change
    assert delta.applied(old, [rows[place] for place in delta.inserted]) == rows
    assert Counter(rows) == Counter(new)
    assert len(delta.removed) + len(delta.inserted) == (Counter(old) - Counter(new)).total() + len(split(new, old)[1])


@given(ROWS, ROWS)
def test_the_order_of_sorted_rows_is_kept_or_there_is_no_delta(old: list[int], new: list[int]) -> None:
    change = Delta.between(old, new, ordered=True)
    if change is None:
        assert split(old, new)[0] != split(new, old)[0]
    else:
        delta, rows = change
        assert rows == new == delta.applied(old, [new[place] for place in delta.inserted])


def test_sorted_rows_that_changed_places_have_no_delta() -> None:
    assert Delta.between([1, 2], [2, 1], ordered=True) is None
    assert Delta.between([1, 2], [2, 1], ordered=False) == (Delta((), ()), [1, 2])


@pytest.mark.parametrize("delta", [Delta((2,), ()), Delta((), (3,)), Delta((), ()), Delta((0,), (0, 1))])
def test_a_delta_of_other_rows_is_refused(delta: Delta) -> None:
    with pytest.raises(DeltaError):
        delta.applied([1, 2], [9])
