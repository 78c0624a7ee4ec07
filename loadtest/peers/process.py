"""Starts a peer as a process of its own, watches what it uses, and makes the virtual environment that one needs."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from loadtest.peers.drain import Drained, read_drained
from loadtest.usage import UsageSampler
from schemas.errors import PintailError
from schemas.table import TableDefinition

ROOT = Path(__file__).resolve().parents[2]
_QUIX_REQUIREMENTS = Path(__file__).with_name("quix-requirements.txt")


class PeerError(PintailError):
    """A peer could not be installed, or ended with an error."""


@dataclass(frozen=True)
class PeerDrain:
    """What a peer did, and what it used for it."""

    drained: Drained
    cpu_seconds: float
    peak_rss_mib: float
    broker_cpu_seconds: float

    @property
    def events(self) -> int:
        """How many it applied."""
        return self.drained.events

    @property
    def seconds(self) -> float:
        """How long that took."""
        return self.drained.finished - self.drained.started

    @property
    def rate(self) -> float:
        """Events per second."""
        return self.events / self.seconds


def run_peer(
    name: str,
    *,
    kafka: str,
    tables: Path,
    table: TableDefinition,
    path: Path,
    events: int,
    seconds: float | None = None,
    python: Path | str = sys.executable,
    broker_pid: int | None = None,
) -> PeerDrain:
    """Runs `loadtest.peers.<name>` to its end. Raises PeerError, with the end of what it said."""
    command = [str(python), "-m", f"loadtest.peers.{name}", "--kafka", kafka, "--tables", str(tables)]
    command += ["--table", table.name, "--path", str(path), "--events", str(events), "--group", f"{name}-{path.stem}"]
    if seconds is not None:
        command += ["--seconds", str(seconds)]
    log = path.with_suffix(".log")
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with (
        log.open("wb") as errors,
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, cwd=path.parent, env=environment) as process,
    ):
        pids = {"peer": process.pid} | ({"broker": broker_pid} if broker_pid else {})
        with UsageSampler(pids) as usage:
            output, _ = process.communicate()
    if process.returncode:
        raise PeerError(
            f"{name} ended with status {process.returncode}:\n{log.read_text()[-2000:]}", hint=f"its log is {log}"
        )
    drained = read_drained(output.splitlines()[-1])
    started, finished = drained.started, drained.finished
    return PeerDrain(
        drained=drained,
        cpu_seconds=usage.cpu_seconds("peer", started, finished),
        peak_rss_mib=usage.peak_rss_mib("peer"),
        broker_cpu_seconds=usage.cpu_seconds("broker", started, finished) if broker_pid else 0.0,
    )


def quix_python(folder: Path, *, say: Callable[[str], None]) -> Path:
    """The interpreter of Quix Streams' own virtual environment below `folder`, made if it is not there yet.

    Raises PeerError.
    """
    requirements = hashlib.sha256(_QUIX_REQUIREMENTS.read_bytes()).hexdigest()[:12]
    home = folder.resolve() / f"quix-{requirements}-{sys.version_info.major}.{sys.version_info.minor}"
    python = home / "bin" / "python"
    ready = home / ".installed"
    if ready.exists():
        return python
    say("installing Quix Streams into a virtual environment of its own, once")
    shutil.rmtree(home, ignore_errors=True)
    install = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    for command in ([sys.executable, "-m", "venv", str(home)], [*install, "--requirement", str(_QUIX_REQUIREMENTS)]):
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise PeerError(
                f"Quix Streams cannot be installed:\n{done.stderr[-1000:]}", hint="leave it out with --without quix"
            )
    ready.touch()
    return python
