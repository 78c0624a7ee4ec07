"""The life of partitions under everything that can happen to their workers, as a simulation that a seed replays.

Kills between any two effects, rebalances, standbys that are promoted and demoted, zombies, a Redis that is away, empty
or evicting, a broker and a ClickHouse that are away, slow disks, inserts that get lost or land late, retention.
Invariants 1 to 8 are checked after every step against a model that is the log itself. PINTAIL_KILLS=500 makes the walk
longer, and the search of Hypothesis with it; PINTAIL_SEED gives both another seed.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import closing

import pytest
from hypothesis import HealthCheck, Phase, seed, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule, run_state_machine_as_test

from tests.simulation.simulation import Simulation

CYCLES = int(os.environ.get("PINTAIL_KILLS", "30"))
SEED = int(os.environ.get("PINTAIL_SEED", "1"))
EXAMPLES = max(1, CYCLES // 10)
STEPS = 12
#: A walk that is longer than this goes on in a deployment of its own, which keeps the log short.
CYCLES_PER_RUN = 15

pytestmark = pytest.mark.timeout(300 + 10 * CYCLES + 60 * EXAMPLES)

STORES = st.sampled_from(["store-0", "store-1", "store-2"])
SINKS = st.sampled_from(["sink-0", "sink-1"])
WORKERS = STORES | SINKS


class Lifecycle(RuleBasedStateMachine):
    """Hypothesis chooses the steps, and shortens what fails to the steps that matter."""

    simulation: Simulation | None = None

    @initialize(seed=st.integers(0, 2**32 - 1), records=st.integers(0, 60))
    def deploy(self, seed: int, records: int) -> None:
        self.simulation = Simulation(seed, store_workers=3)
        self.simulation.write(records)

    @property
    def running(self) -> Simulation:
        assert self.simulation is not None
        return self.simulation

    @rule(records=st.integers(1, 60), seconds=st.floats(0.0, 5.0))
    def write(self, records: int, seconds: float) -> None:
        self.running.write(records)
        self.running.pass_time(seconds)

    @rule(
        name=WORKERS,
        after_effects=st.integers(0, 60),
        disk=st.sampled_from(["kept", "torn", "lost"]),
        moves=st.booleans(),
        records=st.integers(0, 40),
    )
    def kill(self, name: str, after_effects: int, disk: str, moves: bool, records: int) -> None:
        self.running.write(records)
        self.running.kill(name, after_effects=after_effects, disk=disk, moves=moves)

    @rule(name=WORKERS, seconds=st.floats(0.1, 15.0), records=st.integers(0, 40), is_cut=st.booleans())
    def stop(self, name: str, seconds: float, records: int, is_cut: bool) -> None:
        self.running.write(records)
        self.running.stop(name, seconds=seconds, is_cut=is_cut)

    @rule(kept=st.booleans())
    def keep_standbys(self, kept: bool) -> None:
        self.running.keep_standbys(kept)

    @rule(placed=st.booleans())
    def place(self, placed: bool) -> None:
        self.running.place(placed)

    @rule(kind=st.sampled_from(["store", "sink"]))
    def rebalance(self, kind: str) -> None:
        self.running.rebalance(kind)

    @rule(slow=st.booleans())
    def slow_disks(self, slow: bool) -> None:
        self.running.slow_disks(slow)

    @rule(away=st.booleans())
    def redis_goes(self, away: bool) -> None:
        self.running.redis_goes(away)

    @rule()
    def redis_evicts(self) -> None:
        self.running.redis_evicts()

    @rule()
    def redis_restarts_empty(self) -> None:
        self.running.redis_restarts_empty()

    @rule(away=st.booleans())
    def kafka_goes(self, away: bool) -> None:
        self.running.kafka_goes(away)

    @rule(away=st.booleans())
    def clickhouse_goes(self, away: bool) -> None:
        self.running.clickhouse_goes(away)

    @rule()
    def retention(self) -> None:
        self.running.retention()

    @precondition(lambda self: self.simulation is not None)
    @rule()
    def settle(self) -> None:
        self.running.settle()

    def teardown(self) -> None:
        if self.simulation is not None:
            with closing(self.simulation):
                self.simulation.settle()


@seed(SEED)
class SeededLifecycle(Lifecycle):
    """The search starts where the seed says."""


@pytest.mark.invariant(1, 2, 3, 4, 5, 6, 7, 8, place="checkpoint")
@pytest.mark.invariant(1, 2, 3, 4, 5, 6, 7, 8, place="rebalance")
@pytest.mark.invariant(1, 2, 3, 4, 5, 6, 7, 8, place="recovery")
@pytest.mark.invariant(1, 2, 3, 4, 5, 6, 7, 8, place="outage")
def test_no_sequence_of_faults_breaks_an_invariant() -> None:
    run_state_machine_as_test(
        SeededLifecycle,
        settings=settings(
            max_examples=EXAMPLES,
            stateful_step_count=STEPS,
            deadline=None,
            database=None,
            phases=(Phase.generate, Phase.shrink) if CYCLES > 30 else (Phase.generate,),
            suppress_health_check=list(HealthCheck),
        ),
    )


def runs() -> Iterator[tuple[int, int]]:
    """(seed, cycles) of each run."""
    for number, first in enumerate(range(0, CYCLES, CYCLES_PER_RUN)):
        yield SEED + number, min(CYCLES_PER_RUN, CYCLES - first)


@pytest.mark.invariant(1, 2, 3, 4, 5, 6, 7, 8, place="checkpoint")
@pytest.mark.invariant(1, 2, 3, 4, 5, 6, 7, 8, place="rebalance")
@pytest.mark.invariant(1, 2, 3, 4, 5, 6, 7, 8, place="recovery")
@pytest.mark.invariant(1, 2, 3, 4, 5, 6, 7, 8, place="outage")
@pytest.mark.parametrize(("seed", "cycles"), list(runs()), ids=str)
def test_everything_is_exact_after_each_kill(seed: int, cycles: int) -> None:
    with closing(Simulation(seed)) as simulation:
        simulation.keep_standbys(seed % 2 == 0)
        for cycle in range(cycles):
            simulation.random_cycle(snapshots=cycle % 5 == 4 or cycle == cycles - 1)
        assert simulation.kills == cycles
        assert simulation.answers > cycles


def test_a_seed_replays_a_run() -> None:
    traces = []
    for _ in range(2):
        with closing(Simulation(7)) as simulation:
            simulation.keep_standbys(True)
            for _ in range(2):
                simulation.random_step()
                simulation.random_kill()
            simulation.settle(snapshots=False)
            traces.append(simulation.loop.trace)
    assert traces[0] == traces[1]
