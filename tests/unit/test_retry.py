"""Pauses between tries."""

from __future__ import annotations

from streams.retry import Backoff


def test_pauses_stay_at_the_ceiling_however_long_an_outage_is() -> None:
    backoff = Backoff(first_seconds=0.1, ceiling_seconds=10.0, failures=5_000)
    assert 5.0 <= backoff.next_delay_seconds() <= 10.0
