"""Writes what a profile found: <profile>.json for programs, .png to look at, .md as one page for people."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import orjson

from loadtest.latencies import percentiles
from loadtest.machine import machine_in_words
from loadtest.profile_run import Outcome
from loadtest.profiles import Profile

mpl.use("Agg")
from matplotlib import pyplot as plt  # after the choice of a backend that needs no display

RESULTS_DIR = Path(__file__).resolve().parent / "results"
_COUNTS = ("expected", "lost", "doubled", "unexpected", "changed")


def bounds_of(profile: Profile, metrics: dict[str, float]) -> list[dict[str, Any]]:
    """Every bound with what was measured; one without a measurement is not met."""
    return [
        {
            "metric": bound.metric,
            "limit": bound.limit,
            "at_least": bound.at_least,
            "measured": metrics.get(bound.metric),
            "met": bound.metric in metrics and bound.is_met(metrics[bound.metric]),
        }
        for bound in profile.bounds
    ]


def write_results(folder: Path, profile: Profile, result: dict[str, Any], outcome: Outcome) -> None:
    """All three files."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{profile.name}.json").write_bytes(orjson.dumps(result, option=orjson.OPT_INDENT_2) + b"\n")
    (folder / f"{profile.name}.md").write_text(page(result))
    _plot(folder / f"{profile.name}.png", profile, outcome)


def page(result: dict[str, Any]) -> str:
    """The report."""
    machine, metrics = result["machine"], result["metrics"]
    run = f"{result['events']:,} events, scale {result['scale']:g}, started {result['started']}. {result['note']}"
    packages = ("pintail", "duckdb", "aiokafka", "faust-streaming", "confluent-kafka", "pyarrow")
    lines = [
        f"# {result['profile']}",
        "",
        f"**Catches:** {result['catches']}",
        "",
        run.strip(),
        "",
        "**Correct**" if result["is_right"] else "**NOT CORRECT**",
        "",
        "| | " + " | ".join(_COUNTS) + " |",
        "|---|" + "---:|" * len(_COUNTS),
        *(
            f"| {words} | " + " | ".join(f"{result[name][count]:,}" for count in _COUNTS) + " |"
            for name, words in (("rows", "rows"), ("dead_letters", "dead letters"))
        ),
        "",
        *(f"- {name}" for kind in ("rows", "dead_letters") for name in result[kind]["named"]),
        "",
        "| bound | limit | measured | |",
        "|---|---:|---:|---|",
        *(_bound_line(bound) for bound in result["bounds"]),
        "",
        "| metric | value |",
        "|---|---:|",
        *(f"| {name} | {value:,} |" for name, value in metrics.items()),
        "",
        f"![{result['profile']}]({result['profile']}.png)",
        "",
        f"{machine_in_words(machine)}. {machine['system']}. "
        + ", ".join(f"{package} {machine[package]}" for package in packages)
        + ".",
        "",
        "`visible` is from the moment an event was due until the answer that reflects it was there, over all events "
        f"after a warm-up ({result['unseen_events']:,} were not seen before the run ended); `quiet_partitions` leaves "
        "the busiest partition out. Peak RSS and CPU are the worker's.",
        "",
    ]
    return "\n".join(lines).replace("\n\n\n", "\n\n")


def _bound_line(bound: dict[str, Any]) -> str:
    measured = "-" if bound["measured"] is None else f"{bound['measured']:,}"
    sign = ">=" if bound["at_least"] else "<="
    return f"| {bound['metric']} | {sign} {bound['limit']:,} | {measured} | {'met' if bound['met'] else 'NOT met'} |"


def by_second(latencies: Sequence[tuple[float, float]]) -> list[tuple[int, float, float, float]]:
    """(second, p50, p99, largest) of the events that were due in each second."""
    seconds: dict[int, list[float]] = {}
    for due, milliseconds in latencies:
        seconds.setdefault(int(due), []).append(milliseconds)
    cuts = {second: percentiles(values) for second, values in sorted(seconds.items())}
    return [(second, cut["p50"], cut["p99"], cut["max"]) for second, cut in cuts.items()]


def _plot(path: Path, profile: Profile, outcome: Outcome) -> None:
    figure, (rates, latencies, memory) = plt.subplots(3, 1, figsize=(9, 9), sharex=True, layout="constrained")
    figure.suptitle(f"{profile.name}: {outcome.events:,} events")
    at = [moment for moment, _, _ in outcome.progress]
    rates.plot(at, [due for _, due, _ in outcome.progress], label="due", linestyle="--", color="grey")
    rates.plot(at, [visible for _, _, visible in outcome.progress], label="visible")
    rates.set_ylabel("events")
    rates.legend()
    seconds = by_second(outcome.latencies)
    if seconds:
        for index, name in ((1, "p50"), (2, "p99"), (3, "max")):
            latencies.plot([each[0] for each in seconds], [each[index] for each in seconds], label=name)
        latencies.set_yscale("log")
        latencies.legend()
    latencies.set_ylabel("due to visible, ms")
    memory.plot([moment for moment, _ in outcome.memory], [mib for _, mib in outcome.memory])
    memory.set_ylabel("worker's RSS, MiB")
    memory.set_ylim(bottom=0)
    memory.set_xlabel("seconds")
    for axes in (rates, latencies, memory):
        axes.grid(alpha=0.3)
    figure.savefig(path, dpi=100, metadata={"Software": None})
    plt.close(figure)
