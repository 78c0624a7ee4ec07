"""Orders of an operator to recover a partition from one rung and no other, as files beside the partition's own.

    <p>.recover.json     the order, from `pintail recover` until it is carried out or cannot be
    <p>.recovered.json   what became of the newest order, for the command that waits for it

The worker that hosts the partition sees the order within a second, also when the partition is FAILED; one that opens it
later carries it out then. Both files are replaced in one step and durable. An order that was begun is not carried out
again from the start after a crash: the file that it left is gone on with.
Callers: streams/cli/recover.py writes orders; processes/hosting.py and processes/recovery.py carry them out.
"""

from __future__ import annotations

import json
import logging
import os
import re
import uuid
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Self

from streams.adapters.duckdb_file import sync_folder
from streams.errors import ConfigurationError

logger = logging.getLogger(__name__)

_ORDER = re.compile(r"(\d+)\.recover\.json")
_SNAPSHOT = re.compile(r"snapshot:([1-9]\d{0,17})")


@dataclass(frozen=True)
class RecoverySource:
    """What to recover from: `clickhouse`, `log`, or `snapshot` with its version."""

    name: str
    version: int | None = None

    @classmethod
    def parse(cls, text: str) -> Self:
        """From `clickhouse`, `log` or `snapshot:VERSION`. Raises ConfigurationError."""
        if text in ("clickhouse", "log"):
            return cls(text)
        if match := _SNAPSHOT.fullmatch(text):
            return cls("snapshot", int(match[1]))
        raise ConfigurationError(
            f"a partition cannot be recovered from {text!r}",
            hint="write log, clickhouse or snapshot:VERSION (`pintail snapshots list` shows the versions)",
        )

    def __str__(self) -> str:
        return self.name if self.version is None else f"{self.name}:{self.version}"


@dataclass(frozen=True)
class RecoveryOrder:
    """One order. `is_begun` once the file that it asks for is in place."""

    partition: int
    source: RecoverySource
    id: str = field(default_factory=lambda: uuid.uuid4().hex)
    is_begun: bool = False


@dataclass(frozen=True)
class OrderOutcome:
    """What became of an order. `failure` is None if the partition serves again; `kept` names the file put aside."""

    id: str
    failure: str | None = None
    next_offsets: Mapping[str, int] = field(default_factory=dict)
    kept: tuple[str, ...] = ()


class RecoveryOrders:
    """The orders in one worker's folder. Blocks, briefly."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory

    def pending(self, partition: int) -> RecoveryOrder | None:
        """The order that waits or is under way; None if there is none, or none that can be read."""
        path = self._order_path(partition)
        content = _read(path)
        if content is None:
            return None
        try:
            source = RecoverySource.parse(content["from"])
            return RecoveryOrder(partition, source, id=str(content["id"]), is_begun=bool(content["is_begun"]))
        except (KeyError, ConfigurationError) as error:
            logger.error("%s is no order and is left alone: %r", path, error)
            return None

    def all_pending(self) -> list[RecoveryOrder]:
        """Every order that waits or is under way."""
        if not self._directory.is_dir():
            return []
        names = [match for path in self._directory.iterdir() if (match := _ORDER.fullmatch(path.name))]
        orders = [self.pending(int(match[1])) for match in names]
        return [order for order in orders if order is not None]

    def place(self, order: RecoveryOrder) -> None:
        """Writes the order, in place of an older one."""
        content = {"id": order.id, "from": str(order.source), "is_begun": order.is_begun}
        _write(self._order_path(order.partition), content)

    def begin(self, order: RecoveryOrder) -> None:
        """The file it asks for is in place: from now on it is gone on with, unless a newer order has come."""
        if self._is_pending(order):
            self.place(replace(order, is_begun=True))

    def finish(self, order: RecoveryOrder, outcome: OrderOutcome) -> None:
        """Leaves the outcome, then removes the order, unless a newer one has taken its place."""
        _write(self._outcome_path(order.partition), asdict(outcome))
        if self._is_pending(order):
            self._order_path(order.partition).unlink(missing_ok=True)

    def outcome(self, order: RecoveryOrder) -> OrderOutcome | None:
        """What became of this order; None while it waits or is under way."""
        content = _read(self._outcome_path(order.partition))
        if content is None or content.get("id") != order.id:
            return None
        return OrderOutcome(order.id, content["failure"], content["next_offsets"], tuple(content["kept"]))

    def _is_pending(self, order: RecoveryOrder) -> bool:
        pending = self.pending(order.partition)
        return pending is not None and pending.id == order.id

    def _order_path(self, partition: int) -> Path:
        return self._directory / f"{partition}.recover.json"

    def _outcome_path(self, partition: int) -> Path:
        return self._directory / f"{partition}.recovered.json"


def _read(path: Path) -> dict[str, Any] | None:
    try:
        content = json.loads(path.read_text())
    except FileNotFoundError:
        return None
    except ValueError as error:
        logger.error("%s cannot be read and is left alone: %s", path, error)
        return None
    return content if isinstance(content, dict) else None


def _write(path: Path, content: Mapping[str, Any]) -> None:
    """Replaces the file in one step, durably."""
    temporary = path.with_name(f"{path.name}.new")
    with temporary.open("w") as file:
        file.write(json.dumps(content, indent=2) + "\n")
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
    sync_folder(path.parent)
