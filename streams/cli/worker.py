"""`pintail worker store|sink`: one worker in the foreground."""

from __future__ import annotations

import os
import sys
from enum import StrEnum
from typing import Annotated

import typer

from streams.config import load_settings


class WorkerKind(StrEnum):
    """The two processes of a deployment."""

    STORE = "store"
    SINK = "sink"


def register(app: typer.Typer) -> None:
    """Adds the command to `app`."""

    @app.command()
    def worker(
        kind: Annotated[WorkerKind, typer.Argument(help="store: write and query; sink: into ClickHouse")],
    ) -> None:
        """Run one worker in the foreground, configured by PINTAIL_* and pintail.toml."""
        load_settings().require("kafka", *(("redis", "snapshot_key") if kind is WorkerKind.STORE else ("clickhouse",)))
        os.execv(sys.executable, [sys.executable, "-m", "agents", kind])  # noqa: S606  # the same interpreter
