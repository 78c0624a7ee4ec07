"""One worker process that a test starts, stops, kills and looks into."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from streams.localstack.ports import HOST, choose_port
from tests.waiting import worker_report


class Worker:
    """One worker process, `<kind>-<number>`, on a data directory of its own or shared."""

    def __init__(self, data_dir: Path, name: str, environment: Mapping[str, str]) -> None:
        self.name = name
        self.stores = data_dir / "stores" / name
        self.log = data_dir / "logs" / f"{name}.log"
        self._port = 0
        self._environment = {
            **os.environ,
            "PINTAIL_DATA_DIR": str(data_dir),
            "PINTAIL_WORKER": name,
            "PINTAIL_METRICS_HOST": HOST,
            **environment,
        }
        self.start()

    def start(self) -> None:
        """Also after its death."""
        self.log.parent.mkdir(parents=True, exist_ok=True)
        self._port = choose_port(server=self.name)
        environment = self._environment | {"PINTAIL_METRICS_PORT": str(self._port)}
        with self.log.open("ab") as log:
            command = [sys.executable, "-m", "agents", self.name.partition("-")[0]]
            self.process = subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT)

    def partitions(self) -> dict[str, Any]:
        """What it says of each; empty while it does not answer."""
        partitions: dict[str, Any] = worker_report(self._port).get("partitions", {})
        return partitions

    def serving(self) -> dict[int, int]:
        """Partition -> epoch, of a store worker."""
        states = self.partitions().items()
        return {int(number): state["epoch"] for number, state in states if state["state"] == "serving"}

    def delivering(self) -> int:
        """How many partitions a sink worker delivers."""
        return sum(state["state"] == "running" for state in self.partitions().values())

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()
