"""`pintail status`: every partition of every worker in one table, from the workers' own reports (`/ready`).

Workers are those of the running local stack, or those whose addresses are given: there is no registry of workers, and
Kafka's group knows only where they connect from. A worker that does not answer is shown as such.
"""

from __future__ import annotations

import http.client
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Annotated, Any

import orjson
import typer
from rich.console import Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from streams.cli.output import table_console
from streams.config import Settings, load_settings, read_stack_processes
from streams.errors import ConfigurationError

_REPLY_SECONDS_MAX = 3.0
_WATCH_SECONDS = 1.0
_COLOURS = {"serving": "green", "running": "green", "standby": "green", "failed": "red", "fenced": "red"}


@dataclass(frozen=True)
class WorkerReport:
    """What one worker says of itself. `failure` says why it says nothing."""

    address: str
    name: str = ""
    ready: bool = False
    partitions: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    standbys: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    failure: str | None = None


def register(app: typer.Typer) -> None:
    """Adds the command to `app`."""
    app.command()(status)


def status(
    address: Annotated[
        list[str] | None,
        typer.Option(help="HOST:PORT of a worker's /ready. Repeatable; without it, those of the local stack."),
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="One JSON object.")] = False,
    watch: Annotated[bool, typer.Option("--watch", help="Again every second, until Ctrl-C.")] = False,
) -> None:
    """Show state, positions, lag and failures of every partition. Exit status 1 unless all are ready."""
    addresses = addresses_of(load_settings(), address or [])
    if watch and not json:
        _watch(addresses)
    reports = reports_of(addresses)
    if json:
        print(orjson.dumps(as_json(reports), option=orjson.OPT_INDENT_2).decode())
    else:
        table_console().print(table_of(reports))
    raise typer.Exit(0 if all(report.ready for report in reports) else 1)


def addresses_of(settings: Settings, given: Sequence[str]) -> dict[str, str]:
    """Address -> name, as far as it is known. Raises ConfigurationError."""
    for each in given:
        host, _, port = each.rpartition(":")
        if not host or not port.isdigit():
            raise ConfigurationError(f"{each!r} is no address", hint="give HOST:PORT, such as --address localhost:8000")
    if given:
        return dict.fromkeys(given, "")
    processes = read_stack_processes(settings.data_dir)
    of_stack = {
        f"127.0.0.1:{process['port']}": name
        for name, process in processes.items()
        if name.startswith(("store-", "sink-")) and process.get("port")
    }
    if of_stack:
        return of_stack
    if settings.metrics_port:
        return {f"{settings.metrics_host}:{settings.metrics_port}": settings.worker}
    raise ConfigurationError(
        "no worker is known: no local stack with workers runs here",
        hint="give their addresses (PINTAIL_METRICS_PORT is the port): --address HOST:PORT --address ...",
    )


def reports_of(addresses: Mapping[str, str]) -> list[WorkerReport]:
    """All reports, asked for at the same time."""
    with ThreadPoolExecutor(max_workers=min(32, len(addresses))) as pool:
        return list(pool.map(_report_of, addresses, addresses.values()))


def _report_of(address: str, name: str) -> WorkerReport:
    connection = http.client.HTTPConnection(address, timeout=_REPLY_SECONDS_MAX)
    try:
        connection.request("GET", "/ready")
        content = orjson.loads(connection.getresponse().read())
        return WorkerReport(
            address,
            str(content.get("worker", name)),
            bool(content["ready"]),
            dict(content["partitions"]),
            dict(content.get("standbys", {})),
        )
    except (OSError, http.client.HTTPException) as error:
        return WorkerReport(address, name, failure=f"does not answer: {error or type(error).__name__}")
    except (ValueError, KeyError, TypeError, AttributeError):
        return WorkerReport(address, name, failure="answers, but is no worker of Pintail")
    finally:
        connection.close()


def as_json(reports: Sequence[WorkerReport]) -> dict[str, Any]:
    """For programs."""
    return {
        "ready": all(report.ready for report in reports),
        "workers": [
            {
                "worker": report.name,
                "address": report.address,
                "ready": report.ready,
                **({"failure": report.failure} if report.failure else {}),
                "partitions": report.partitions,
                "standbys": report.standbys,
            }
            for report in reports
        ],
    }


def table_of(reports: Sequence[WorkerReport]) -> Group:
    """For people: a line per partition, then each failure in full."""
    table = Table("worker", "partition", "state", "from", "epoch", "next offsets", "lag", "snapshot", box=None)
    for number in (4, 6, 7):
        table.columns[number].justify = "right"
    failures: list[Text] = []
    for report in reports:
        name = report.name or report.address
        for row, failure in _rows(report):
            table.add_row(Text(name), *row)
            if failure:
                failures.append(Text(f"{name} {row[0].plain}: {failure}".strip(), style="red"))
    return Group(table, *([Text()] if failures else []), *failures)


def _rows(report: WorkerReport) -> Iterator[tuple[list[Text], str | None]]:
    if report.failure:
        yield [Text(""), Text("unknown", style="red")], report.failure
    elif not report.partitions and not report.standbys:
        yield [Text(""), Text("no partitions", style="yellow")], None
    for partition, each in (*report.partitions.items(), *report.standbys.items()):
        state = str(each.get("state", ""))
        offsets = each.get("next_offsets", {})
        positions = ", ".join(f"{topic} {offset}" for topic, offset in sorted(offsets.items()))
        if "next_offset" in each:
            positions = str(each["next_offset"])
        yield (
            [
                Text(str(partition)),
                Text(_state_of(each), style=_COLOURS.get(state, "yellow")),
                Text(_rung_of(each.get("recovered"))),
                Text(str(each.get("epoch", ""))),
                Text(positions, overflow="fold"),
                Text("" if (lag := each.get("lag")) is None else str(lag)),
                Text(str(each.get("snapshot", {}).get("version", ""))),
            ],
            str(each["failure"]) if "failure" in each else None,
        )


def _state_of(each: Mapping[str, Any]) -> str:
    progress = each.get("progress")
    words = str(each.get("state", ""))
    if isinstance(progress, Mapping) and words in ("recovering", "replaying") and "ratio" in progress:
        return f"{words} {progress['ratio']:.0%}"
    return words


def _rung_of(recovered: Mapping[str, Any] | None) -> str:
    if not recovered:
        return ""
    version = recovered.get("version")
    return str(recovered["rung"]) + (f" {version}" if version is not None else "")


def _watch(addresses: Mapping[str, str]) -> None:
    console = table_console()
    with Live(console=console, auto_refresh=False) as live:
        try:
            while True:
                live.update(table_of(reports_of(addresses)), refresh=True)
                time.sleep(_WATCH_SECONDS)
        except KeyboardInterrupt:
            raise typer.Exit(0) from None
