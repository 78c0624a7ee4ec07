"""Runs one load profile on a fresh local stack with one store worker, and measures and judges it from outside."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from loadtest.latencies import percentiles
from loadtest.log_oracle import Expected, Record, Verdict, compare_dead_letters, compare_rows, expected_of
from loadtest.log_reader import read_log
from loadtest.open_loop import OpenLoopSender, Phase, Schedule, Sent, stretched
from loadtest.preload import Records, high_watermarks, preload
from loadtest.profiles import PROFILES, Profile
from loadtest.store_drain import STORE, StoreDrain
from loadtest.usage import Sample, UsageSampler
from loadtest.visibility import Seen, VisibilityProbe, visible_at
from schemas.catalog import Catalog, load_catalog
from streams.client import AsyncClient, Client
from streams.config import load_settings
from streams.limits import QUERY_DEADLINE_MS_MAX
from streams.localstack.processes import Report
from streams.localstack.stack import LocalStack, StackOptions

#: Events due before this are sent and checked, but their latencies are not counted: everything is new to everybody.
WARM_UP_SECONDS_MAX = 2.0
#: A worker that has not caught up by then, after the last event was due, is reported with what it has.
CATCH_UP_SECONDS_MAX = 120.0
_START_IN_SECONDS = 0.5
_PUBLISHERS = 2


@dataclass
class Outcome:
    """What was measured and found."""

    events: int
    #: Metric -> value; the bounds of profiles name these.
    metrics: dict[str, float] = field(default_factory=dict)
    rows: Verdict = field(default_factory=Verdict)
    dead_letters: Verdict = field(default_factory=Verdict)
    #: (seconds after the start when the event was due, milliseconds until it was visible), in no order.
    latencies: list[tuple[float, float]] = field(default_factory=list)
    #: (seconds after the start, events due, events visible).
    progress: list[tuple[float, int, int]] = field(default_factory=list)
    #: (seconds after the start, MiB) of the worker.
    memory: list[tuple[float, float]] = field(default_factory=list)
    refused_probes: int = 0
    #: Events that no answer reflected; they count as visible at the end of the run, the earliest that it can have been.
    unseen: int = 0

    @property
    def is_right(self) -> bool:
        """True if every row and every dead letter is as it must be."""
        return self.rows.is_right and self.dead_letters.is_right


def run_profile(
    profile: Profile,
    folder: Path,
    *,
    scale: float = 1.0,
    seconds: float | None = None,
    say: Callable[[str], None],
    report: Report = lambda *_: None,
) -> Outcome:
    """Everything from an empty folder to an outcome; nothing is left running."""
    tables = folder.resolve() / "tables"
    for name, sql in profile.tables.items():
        (tables / name).mkdir(parents=True)
        (tables / name / "001_create.sql").write_text(sql)
    options = StackOptions(
        services=("kafka", "redis"), store_workers=1, worker_environment={"PINTAIL_TABLES_DIR": str(tables)}
    )
    with LocalStack(folder / "stack", options, report=report) as stack:
        os.environ.update(stack.settings_environment() | dict(options.worker_environment))
        run = _ProfileRun(profile, stack, load_catalog(tables), say)
        if profile.backlog:
            return run.backlog(max(1, int(profile.backlog * scale)))
        return run.live(stretched(profile.phases, scale=scale, seconds=seconds))


class _ProfileRun:
    def __init__(self, profile: Profile, stack: LocalStack, catalog: Catalog, say: Callable[[str], None]) -> None:
        self._profile = profile
        self._stack = stack
        self._catalog = catalog
        self._say = say
        self._kafka = stack.addresses["kafka"]

    def backlog(self, events: int) -> Outcome:
        """Publishes while the worker is stopped, then times it."""
        (table,) = self._catalog.tables
        self._stack.stop_process(STORE)
        self._say(f"publishing {events:,} events")
        half = -(-events // _PUBLISHERS)
        parts = [(low, min(low + half, events)) for low in range(0, events, half)]
        preload(self._kafka, table.topic, [(_records, (self._profile.name, *part)) for part in parts], events)
        self._say("draining")
        drain = StoreDrain(self._stack, table.topic)
        drain.run(events)
        self._stack.wait_until_ready(STORE)
        assert drain.usage is not None
        outcome = Outcome(events)
        outcome.metrics = {
            "drain_events_per_second": round(events / drain.seconds),
            "drain_seconds": round(drain.seconds, 2),
            **_usage_metrics(drain.usage, drain.started, drain.finished, events),
        }
        outcome.progress = [(at - drain.started, events, applied) for at, applied in drain.curve]
        outcome.memory = _memory(drain.usage.samples[STORE], drain.started)
        self._judge(outcome)
        return outcome

    def live(self, phases: Sequence[Phase]) -> Outcome:
        """Sends by the clock while it asks all the time."""
        schedule = Schedule(phases)
        self._say(f"sending {schedule.events:,} events in {schedule.seconds:.0f} s")
        sender = OpenLoopSender(self._kafka, self._profile.event, phases)
        pid = self._stack.process(STORE).pid
        assert pid is not None, "the worker serves"
        try:
            with UsageSampler({STORE: pid}) as usage:
                started, probe = asyncio.run(self._ask_while_sending(sender, schedule))
                finished = time.monotonic()
            sent = sender.result()
        finally:
            sender.stop()
        outcome = Outcome(schedule.events, refused_probes=probe.refused)
        outcome.memory = _memory(usage.samples[STORE], started)
        expected = self._judge(outcome)
        by_partition = self._visible(expected, probe.seen)
        outcome.unseen = _add_unseen(by_partition, expected, finished)
        self._measure(outcome, schedule, sent, started, by_partition)
        outcome.metrics |= _usage_metrics(usage, started, finished, schedule.events)
        outcome.metrics |= _named("probe_ms", [each.round_trip_ms for each in probe.seen])
        outcome.metrics |= _named("probe_executed_ms", [each.executed_ms for each in probe.seen])
        return outcome

    async def _ask_while_sending(self, sender: OpenLoopSender, schedule: Schedule) -> tuple[float, VisibilityProbe]:
        ends: dict[str, dict[int, int]] = {}

        def is_enough(offsets: Mapping[str, Mapping[int, int]]) -> bool:
            if not sender.is_over:
                return False
            if not ends:
                ends.update({topic: high_watermarks(self._kafka, topic) for topic in self._catalog.topics})
            return all(
                offsets.get(topic, {}).get(partition, 0) >= end
                for topic, partitions in ends.items()
                for partition, end in partitions.items()
            )

        async with await AsyncClient.connect(load_settings()) as client:
            probe = VisibilityProbe(client, self._catalog.tables)
            started = time.monotonic() + _START_IN_SECONDS
            sender.start(started)
            await probe.run(is_enough, seconds_max=_START_IN_SECONDS + schedule.seconds + CATCH_UP_SECONDS_MAX)
        return started, probe

    def _judge(self, outcome: Outcome) -> dict[str, Expected]:
        """Compares every table and every dead-letter topic with the log; by topic, what the log says."""
        self._say("comparing rows and dead letters with the log")
        found: dict[str, Expected] = {}
        with Client.connect(load_settings()) as client:
            for table in self._catalog.tables:
                expected = expected_of(table, map(Record.of, read_log(self._kafka, table.topic)))
                position = {table.topic: expected.last_offsets}

                def ask(sql: str, position: Mapping[str, Mapping[int, int]] = position) -> Sequence[Sequence[Any]]:
                    return client.query(sql, at_least=position, deadline_ms=QUERY_DEADLINE_MS_MAX).rows

                outcome.rows.add(compare_rows(table, expected, ask))
                letters = read_log(self._kafka, table.dead_letter_topic)
                outcome.dead_letters.add(compare_dead_letters(table, expected, letters))
                found[table.topic] = expected
        published = sum(sum(high_watermarks(self._kafka, topic).values()) for topic in self._catalog.topics)
        if published != outcome.events:
            outcome.rows.note("lost", "on the way to the log", abs(outcome.events - published))
        return found

    def _visible(self, expected: Mapping[str, Expected], seen: Sequence[Seen]) -> dict[int, list[tuple[int, float]]]:
        """Partition number -> (number of the event, when it was visible), over all topics."""
        by_partition: dict[int, list[tuple[int, float]]] = {}
        for topic, each in expected.items():
            for partition, arrivals in each.arrivals.items():
                by_partition.setdefault(partition, []).extend(visible_at(seen, topic, partition, arrivals))
        return by_partition

    def _measure(
        self,
        outcome: Outcome,
        schedule: Schedule,
        sent: Sent,
        started: float,
        by_partition: Mapping[int, Sequence[tuple[int, float]]],
    ) -> None:
        warm_up = min(WARM_UP_SECONDS_MAX, schedule.seconds / 5)
        latencies: dict[int, list[tuple[float, float]]] = {}
        for partition, events in by_partition.items():
            timed = [(schedule.due_at(number), at - started) for number, at in events]
            latencies[partition] = [(due, (at - due) * 1000) for due, at in timed if due >= warm_up]
        outcome.latencies = [each for some in latencies.values() for each in some]
        moments = sorted(at - started for events in by_partition.values() for _, at in events)
        outcome.progress = _progress(schedule, moments)
        busiest = max(latencies, key=lambda partition: len(latencies[partition]), default=None)
        outcome.metrics = {
            **_named("visible_ms", [ms for _, ms in outcome.latencies]),
            **_named(
                "quiet_partitions_ms",
                [ms for partition, some in latencies.items() if partition != busiest for _, ms in some],
            ),
            "catch_up_seconds": round(max(0.0, max(moments, default=0.0) - schedule.due_at(schedule.events - 1)), 2),
            "sender_late_ms_max": round(sent.late_ms_max, 1),
        }


def _add_unseen(
    by_partition: dict[int, list[tuple[int, float]]], expected: Mapping[str, Expected], finished: float
) -> int:
    """Adds the events that no answer reflected, as visible when the run ended; returns how many."""
    unseen = 0
    for partition, events in by_partition.items():
        seen = {number for number, _ in events}
        arrived = (number for each in expected.values() for _, number in each.arrivals.get(partition, ()))
        missing = [(number, finished) for number in arrived if number not in seen]
        events += missing
        unseen += len(missing)
    return unseen


def _records(profile_name: str, low: int, high: int) -> Records:
    """The events of a backlog; a function with a name, which another process can import."""
    event = PROFILES[profile_name].event
    for number in range(low, high):
        _, key, value, partition = event(number)
        yield key, value, partition


def _named(name: str, milliseconds: list[float]) -> dict[str, float]:
    return {f"{name}_{cut}": value for cut, value in percentiles(milliseconds).items()} if milliseconds else {}


def _progress(schedule: Schedule, moments: Sequence[float]) -> list[tuple[float, int, int]]:
    """Once a second: how many events were due, and how many visible."""
    progress, visible = [], 0
    for second in range(int(moments[-1]) + 2 if moments else 0):
        while visible < len(moments) and moments[visible] <= second:
            visible += 1
        progress.append((float(second), schedule.due(second), visible))
    return progress


def _memory(samples: Sequence[Sample], started: float) -> list[tuple[float, float]]:
    return [(round(each.at - started, 2), round(each.rss_bytes / 2**20, 1)) for each in samples]


def _usage_metrics(usage: UsageSampler, started: float, finished: float, events: int) -> dict[str, float]:
    cpu = usage.cpu_seconds(STORE, started, finished)
    return {
        "peak_rss_mib": usage.peak_rss_mib(STORE),
        "worker_cpu_seconds": cpu,
        "worker_cpu_us_per_event": round(cpu / events * 1e6, 2),
    }


def as_result(outcome: Outcome) -> dict[str, Any]:
    """Counts and metrics of an outcome, without the curves."""
    return {
        "events": outcome.events,
        "rows": asdict(outcome.rows),
        "dead_letters": asdict(outcome.dead_letters),
        "metrics": outcome.metrics,
        "refused_probes": outcome.refused_probes,
        "unseen_events": outcome.unseen,
    }
