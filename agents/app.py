"""What the store worker and the sink worker have in common: a Faust app over the batched transport, and status pages.

Faust owns group membership, assignment and the agents' flow; the `owner` owns positions and state.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterable
from typing import Any

import faust
import prometheus_client
from faust.tables.manager import TableManager
from faust.utils import venusian

from agents.assignor import Membership, copartition_assignor
from agents.fetched_batches import FETCH_WAIT_MS_MAX
from agents.memory import collect_young_garbage, return_freed_memory
from agents.transport import SCHEME, BatchConsumer, BatchSchema, PartitionOwner
from agents.worker_name import check_name, client_id
from schemas.catalog import Catalog
from streams.adapters.duckdb_decoder import DuckDBDecoder
from streams.adapters.format_decoder import FormatDecoder
from streams.adapters.http_registry import HttpSchemaRegistry
from streams.adapters.kafka_options import kafka_client_options
from streams.config import Settings
from streams.limits import MIB
from streams.ports import Decoder

HEARTBEAT_SECONDS = 2
REBALANCE_TIMEOUT_SECONDS = 30
REQUEST_TIMEOUT_SECONDS = 60
#: Between two commits of the positions: what monitoring sees, and what a standby must see before it passes poison.
COMMIT_SECONDS = 1.0
#: Between two returns of freed memory.
FREED_MEMORY_SECONDS = 2.0
PARTITION_FETCH_BYTES_MAX = 4 * MIB
FETCH_BYTES_MAX = 32 * MIB

StatusReport = Callable[[], dict[str, Any]]


def _note_nothing(*_: Any, **__: Any) -> None:
    """Faust notes where its decorators were used, for an autodiscovery that a worker has no use for, and each time
    looks through all modules: a fifth of a second of each start."""


venusian.attach = _note_nothing


class NoTables(TableManager):  # type: ignore[misc]
    """Pintail has none of Faust's tables, so there are none to wait for: Faust sleeps for a second at every start."""

    async def on_start(self) -> None:
        """Lets the consumer subscribe at once."""
        await self._update_channels()
        await self.recovery.start()


class PintailApp(faust.App):  # type: ignore[misc]
    """A Faust app whose transport delivers batches.

    `before_joining` prepares topics and tables on a loop of its own, so that a fault is one clear message;
    `start_parts` and `stop_parts` bracket the life of the engine on the worker's loop.
    """

    owner: PartitionOwner

    def __init__(
        self,
        group: str,
        settings: Settings,
        *,
        assigned_only: Iterable[str] = (),
        membership: Membership | None = None,
    ) -> None:
        self.settings = settings
        #: Topics that the group assigns and somebody else reads.
        self.assigned_only = frozenset(assigned_only)
        self.buffer_bytes_max = settings.ingest_buffer_bytes_max
        self.before_joining: list[Callable[[], Awaitable[None]]] = []
        self.start_parts: list[Callable[[], Awaitable[None]]] = []
        self.stop_parts: list[Callable[[], Awaitable[None]]] = []
        self.membership = membership or Membership(settings.worker)
        self.consumer_options = consumer_options(group, settings, self.membership)
        servers = [f"{SCHEME}://{server.strip()}" for server in settings.kafka.split(",")]
        super().__init__(
            group,
            broker=servers,
            broker_session_timeout=settings.session_timeout_seconds,
            broker_request_timeout=REQUEST_TIMEOUT_SECONDS,
            broker_commit_interval=COMMIT_SECONDS,
            datadir=str(settings.data_dir / "faust" / f"{group}-{settings.worker}"),
            store="memory://",
            topic_allow_declare=False,
            topic_disable_leader=True,
            TableManager=NoTables,
            web_enabled=settings.metrics_port > 0,
            web_port=settings.metrics_port or 6066,
            web_bind=settings.metrics_host,
            web_host=settings.metrics_host,
            worker_redirect_stdouts=False,
        )
        for topic in self.assigned_only:
            self.topics.add(self.batches_of(topic))

        @self.timer(FREED_MEMORY_SECONDS)  # type: ignore[untyped-decorator]
        async def give_back() -> None:
            collect_young_garbage()
            await asyncio.to_thread(return_freed_memory)

    def batches_of(self, *topics: str) -> Any:
        """A Faust channel of RecordBatches."""
        return self.topic(*topics, schema=BatchSchema(), acks=False)

    @property
    def log_reader(self) -> BatchConsumer:
        """The consumer, as streams.ports.PartitionLog."""
        return self.consumer  # type: ignore[no-any-return]

    async def prepare(self) -> None:
        """Runs `before_joining`. Raises ConfigurationError, and WorkerNameTakenError."""
        await check_name(self.settings, self.conf.id)
        for step in self.before_joining:
            await step()

    async def on_first_start(self) -> None:
        """Faust makes its data directory without parents."""
        self.conf.datadir.parent.mkdir(parents=True, exist_ok=True)
        await super().on_first_start()

    async def on_start(self) -> None:
        """Connects the engine before the consumer joins its group."""
        for start in self.start_parts:
            await start()
        await super().on_start()

    async def on_shutdown(self) -> None:
        """Lets the engine go after the consumer has left."""
        await super().on_shutdown()
        for stop in reversed(self.stop_parts):
            await stop()

    def serve_status(self, status: StatusReport) -> None:
        """/metrics, /health (the loop turns) and /ready (200 when `status()["ready"]`)."""

        @self.page("/metrics")  # type: ignore[untyped-decorator]
        async def metrics(view: Any, request: Any) -> Any:
            del request
            return view.bytes(prometheus_client.generate_latest(), content_type="text/plain; version=0.0.4")

        @self.page("/health")  # type: ignore[untyped-decorator]
        async def health(view: Any, request: Any) -> Any:
            del request
            return view.json({"status": "up", "worker": self.settings.worker})

        @self.page("/ready")  # type: ignore[untyped-decorator]
        async def ready(view: Any, request: Any) -> Any:
            del request
            report = {"worker": self.settings.worker, **status()}
            return view.json(report, status=200 if report["ready"] else 503)


def record_decoder(catalog: Catalog, settings: Settings) -> Decoder:
    """The decoder of both workers. Raises ConfigurationError if tables are in Avro and there is no registry."""
    needs_registry = any(table.format.is_avro for table in catalog.tables)
    return FormatDecoder(DuckDBDecoder(), HttpSchemaRegistry.from_settings(settings) if needs_registry else None)


def consumer_options(group: str, settings: Settings, membership: Membership) -> dict[str, Any]:
    """How the batch consumer joins. Static membership: a restarted worker gets its partitions back at once."""
    return {
        **log_options(settings, client_id(settings, group)),
        "group_id": group,
        "group_instance_id": settings.worker,
        "partition_assignment_strategy": [copartition_assignor(membership)],
        "fetch_max_wait_ms": FETCH_WAIT_MS_MAX,
        "session_timeout_ms": settings.session_timeout_seconds * 1000,
        "heartbeat_interval_ms": HEARTBEAT_SECONDS * 1000,
        "rebalance_timeout_ms": REBALANCE_TIMEOUT_SECONDS * 1000,
        # aiokafka would drop a member that has polled nothing for so long, and let it join again only after a poll: a
        # spare worker has nothing to poll, nor has one that recovers for long. agents/group_watch.py watches instead.
        "max_poll_interval_ms": 10 * 365 * 24 * 3600 * 1000,
    }


def log_options(settings: Settings, client_id: str) -> dict[str, Any]:
    """How any consumer of a worker reads."""
    return {
        **kafka_client_options(settings),
        "client_id": client_id,
        "enable_auto_commit": False,
        # Positions come from the owner; a position that Kafka does not have must be an error, never a jump.
        "auto_offset_reset": "none",
        "isolation_level": "read_committed",
        "fetch_max_bytes": FETCH_BYTES_MAX,
        "max_partition_fetch_bytes": PARTITION_FETCH_BYTES_MAX,
        "metadata_max_age_ms": 30_000,
    }
