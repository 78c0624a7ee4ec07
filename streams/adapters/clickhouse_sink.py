"""ClickHouseSink: tables, positions and exactly-once inserts in ClickHouse, over HTTP. The only user of its driver.

An insert is ONE record batch in one LZ4 frame under the token `topic:partition:lo:hi`: ClickHouse writes it as one part
or not at all, and drops a second insert under the same token. The driver may send an insert again by itself after a
lost connection; the token makes that harmless. All methods block and are thread-safe; called by the delivery process
from worker threads.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from threading import Lock
from typing import Any
from urllib.parse import unquote

import clickhouse_connect
import lz4.frame
import pyarrow as pa
from clickhouse_connect.driver.client import Client
from clickhouse_connect.driver.exceptions import ClickHouseError, OperationalError
from clickhouse_connect.driver.httputil import get_pool_manager

from schemas.catalog import Catalog
from schemas.clickhouse_ddl import create_table_statements, has_position_projection, migration_sql, on_cluster, quote
from schemas.table import TableDefinition
from streams import telemetry
from streams.adapters.clickhouse_rows import beyond_the_short_calendar
from streams.adapters.clickhouse_shape import (
    Difference,
    FoundTable,
    as_text,
    column_differences,
    sharding_differences,
    storage_differences,
)
from streams.config import URL_SETTINGS
from streams.errors import (
    ClickHouseShapeError,
    ConfigurationError,
    RowsRefusedError,
    SinkError,
    SinkOverloadedError,
    SinkRejectedError,
    SinkUnavailableError,
)
from streams.positions import OffsetRange, TopicPartition
from streams.urls import ESCAPES, parse_url, redacted

log = logging.getLogger(__name__)

CONNECT_SECONDS_MAX = 5
#: An insert that has not been answered by then is tried again under the same token.
REPLY_SECONDS_MAX = 30
CONNECTIONS_MAX = 8

#: ClickHouse error codes that say "not now": time-outs, limits on load, memory and parts, read-only states, Keeper,
#: replicas that lag.
_TRANSIENT_CODES = frozenset(
    {3, 159, 160, 164, 198, 202, 203, 209, 210, 225, 236, 241, 242, 243, 244, 279, 285, 286, 289, 305, 319}
    | {369, 373, 394, 415, 425, 439, 473, 499, 517, 521, 626, 667, 722, 999}
)
_TOO_MANY_PARTS_CODE = 252
#: Codes that may be about one row's values: text, numbers, dates and UUIDs that cannot be converted (6, 26, 27, 38, 41,
#: 70, 72, 117, 376, 407), what is out of range or too large (69, 128, 131, 321), a null where there is none (349), and
#: what the rules of the table or of a view behind it refuse (153, 190, 395, 469, 691).
_ROW_CODES = frozenset({6, 26, 27, 38, 41, 69, 70, 72, 117, 128, 131, 153, 190, 321, 349, 376, 395, 407, 469, 691})
#: VALUE_IS_OUT_OF_RANGE_OF_DATA_TYPE
_OUT_OF_RANGE_CODE = 321
#: Acknowledged means: on the shard, and there by most replicas, so that no fail-over loses it. Tables that are neither
#: replicated nor distributed ignore both.
_CLUSTER_SETTINGS = {"insert_quorum": "auto", "distributed_foreground_insert": 1}
_CALENDAR_SHOWN = ("0001-01-01", "9999-12-31", "0001-01-01 00:00:00.000000", "9999-12-31 23:59:59.000000")
_CALENDAR_PROBE = (
    "SELECT toString(toDate32('0001-01-01')), toString(toDate32('9999-12-31')), "
    "toString(toDateTime64('0001-01-01 00:00:00', 6, 'UTC')), toString(toDateTime64('9999-12-31 23:59:59', 6, 'UTC'))"
)


class ClickHouseSink:
    """One ClickHouse database. Connects when first used, and again after ClickHouse was away."""

    def __init__(
        self,
        url: str,
        *,
        cluster: str = "",
        reply_seconds_max: int = REPLY_SECONDS_MAX,
        connections_max: int = CONNECTIONS_MAX,
    ) -> None:
        """`url` is http[s]://[user:password@]host:port[/database], of a server or of what balances over a cluster's;
        with a `cluster`, tables are created on all of it. Raises ConfigurationError."""
        example, schemes = URL_SETTINGS["clickhouse"]
        try:
            parts = parse_url(url, schemes=schemes, example=example)
        except ValueError:
            parts = None
        if parts is None or not parts.hostname or parts.query:
            raise ConfigurationError(
                f"PINTAIL_CLICKHOUSE is not the URL of ClickHouse's HTTP interface: {redacted(url)}",
                hint=f"write {example}; {ESCAPES}",
            )
        self._cluster = cluster
        self.database = unquote(parts.path.strip("/")) or "default"
        self._address = f"{parts.hostname}:{parts.port or (8443 if parts.scheme == 'https' else 8123)}"
        self._options: dict[str, Any] = {
            "interface": parts.scheme,
            "host": parts.hostname,
            "port": int(self._address.rpartition(":")[2]),
            "username": unquote(parts.username or "default"),
            "password": unquote(parts.password or ""),
            "connect_timeout": CONNECT_SECONDS_MAX,
            "send_receive_timeout": reply_seconds_max,
        }
        self._connections_max = connections_max
        self._client: Client | None = None
        self._lock = Lock()

    def __repr__(self) -> str:
        return f"ClickHouseSink({self._address}/{self.database})"

    def connect(self) -> None:
        """Reach ClickHouse now rather than with the first statement. Raises SinkError."""
        self._connected()

    def close(self) -> None:
        """Idempotent; the next use connects again."""
        with self._lock:
            client, self._client = self._client, None
        if client is not None:
            client.close()

    def ensure_tables(self, catalog: Catalog) -> None:
        """Every table exists and has the shape of its definition; safe when several workers do it at once.

        Creates missing tables and adds the columns of newer migrations. Columns that only ClickHouse has are left
        alone: they belong to newer workers, or to the operator. Raises ClickHouseShapeError, SinkError.
        """
        if not self._rows("SELECT 1 FROM system.databases WHERE name = {name:String}", name=self.database):
            self.command(f"CREATE DATABASE IF NOT EXISTS {quote(self.database)}{on_cluster(self._cluster)}")
        for table in catalog.tables:
            self._ensure_table(table)

    def last_offset(self, table: TableDefinition, topic_partition: TopicPartition) -> int | None:
        """See Sink. Reads the sorting key, or the projection where that does not find it: milliseconds."""
        name = self.qualified(table)
        if has_position_projection(table):
            sql = f"SELECT max(_offset) FROM {name} WHERE _partition = {{partition:UInt32}} GROUP BY _partition"
        else:
            sql = (
                f"SELECT _offset FROM {name} WHERE _partition = {{partition:UInt32}} "
                "ORDER BY _partition DESC, _offset DESC LIMIT 1"
            )
        rows = self._rows(sql, partition=topic_partition.partition)
        return int(rows[0][0]) if rows else None

    def insert(
        self, table: TableDefinition, topic_partition: TopicPartition, offsets: OffsetRange, rows: pa.Table
    ) -> None:
        """See Sink. `rows` come from `delivery_table`."""
        self._check_calendar(topic_partition, rows)
        (record_batch,) = rows.to_batches()
        body = pa.BufferOutputStream()
        with pa.ipc.new_stream(body, rows.schema) as stream:
            stream.write_batch(record_batch)
        topic, partition = topic_partition
        settings = {
            # The token works on the insert itself, so the insert must not wait in the server to be merged with others.
            "async_insert": 0,
            "insert_deduplicate": 1,
            "insert_deduplication_token": f"{topic}:{partition}:{offsets.lo}:{offsets.hi}",
            "input_format_null_as_default": 0,
            # One block gives a second thread nothing to do, but setting threads up is a tenth of a small insert.
            "max_threads": 1,
            **_CLUSTER_SETTINGS,
        }
        stream = body.getvalue()
        block = lz4.frame.compress(stream)
        what = f"insert of {topic_partition} {offsets} into {self.qualified(table)}"
        try:
            with self._errors_named(what):
                self._connected().raw_insert(
                    self.qualified(table),
                    column_names=rows.column_names,
                    insert_block=block,
                    fmt="ArrowStream",
                    compression="lz4",
                    settings=settings,
                )
        except SinkRejectedError as error:
            if error.code in _ROW_CODES:
                raise self._as_refusal(table, error) from error
            raise
        telemetry.SINK_INSERT_BYTES.labels(table.name, "arrow").inc(stream.size)
        telemetry.SINK_INSERT_BYTES.labels(table.name, "wire").inc(len(block))

    def _as_refusal(self, table: TableDefinition, error: SinkRejectedError) -> SinkRejectedError:
        """Whether it is the rows or the table: one whose shape was changed may refuse every row."""
        try:
            self._check_shape(table)
        except ClickHouseShapeError as shape:
            return SinkRejectedError(shape.message, code=error.code, hint=shape.hint)
        return RowsRefusedError(error.message, code=error.code, hint=error.hint)

    def arrow(self, sql: str, parameters: dict[str, Any], settings: dict[str, Any]) -> pa.Table:
        """The answer to a query. Raises SinkError, also for an answer that is cut short."""
        with self._errors_named("query"):
            try:
                return self._connected().query_arrow(sql, parameters=parameters, settings=settings)
            except pa.ArrowException as error:
                raise SinkUnavailableError(
                    f"ClickHouse at {self._address} sent an answer that cannot be read: {error}",
                    hint="it is asked again; is something between Pintail and ClickHouse cutting answers short?",
                ) from error

    def json_compact(self, sql: str, settings: dict[str, Any]) -> bytes:
        """The answer to a query in ClickHouse's format JSONCompact. Raises SinkError."""
        with self._errors_named("query"):
            return bytes(self._connected().raw_query(sql, settings=settings, fmt="JSONCompact"))

    def _check_calendar(self, topic_partition: TopicPartition, rows: pa.Table) -> None:
        """Before 26.8 ClickHouse shows a DateTime64 outside 1900 to 2299 as another one, and refuses or moves a Date32.
        Such rows are refused rather than arrive changed. Asked anew each time: an update counts at once."""
        beyond = beyond_the_short_calendar(rows)
        if beyond is None or self._holds_all_years():
            return
        column, offset = beyond
        raise RowsRefusedError(
            f"ClickHouse at {self._address} would change the record at offset {offset} of {topic_partition}: column "
            f"{column!r} holds a year outside 1900 to 2299",
            code=_OUT_OF_RANGE_CODE,
            hint="update ClickHouse to 26.8 or newer, which holds the years 1 to 9999",
        )

    def _holds_all_years(self) -> bool:
        try:
            (shown,) = self._rows(_CALENDAR_PROBE)
        except SinkRejectedError:
            return False
        return tuple(shown) == _CALENDAR_SHOWN

    def _ensure_table(self, table: TableDefinition) -> None:
        found = self.columns(table)
        if not found:
            for statement in create_table_statements(table, database=self.database, cluster=self._cluster):
                self.command(statement)
            log.info("%s: created %s", self, self.qualified(table))
            found = self.columns(table)
        for migration in table.migrations[1:]:
            if any(column.name not in found for column in migration.added_columns):
                for statement in migration_sql(table, migration.number, database=self.database, cluster=self._cluster):
                    self.command(statement)
                log.info("%s: applied %s to %s", self, migration.file, self.qualified(table))
                found = self.columns(table)
        self._check_shape(table)

    def _check_shape(self, table: TableDefinition) -> None:
        """Raises ClickHouseShapeError that shows every difference."""
        found = self._found(self.database, table.name)
        differences = column_differences(table, found)
        holder = found
        if found.distributed:
            differences += sharding_differences(found.distributed)
            holder = self._found(found.distributed.database or self.database, found.distributed.table)
            differences += column_differences(table, holder)
        differences += storage_differences(table, holder, default_window=self._default_window(holder))
        foreign = self._rows(f"SELECT _topic FROM {self.qualified(table)} LIMIT 1") if not differences else []
        if foreign and foreign[0][0] != table.topic:
            differences.append(Difference("_topic of its rows", table.topic, str(foreign[0][0])))
        if differences:
            raise ClickHouseShapeError(
                f"table {self.qualified(table)} in ClickHouse has another shape than table {table.name!r}:\n"
                + as_text(differences),
                hint=f"correct it with ALTER TABLE, or move it away (RENAME TABLE {self.qualified(table)} TO ...) and "
                "Pintail creates it anew",
            )

    def _found(self, database: str, name: str) -> FoundTable:
        columns = self._rows(
            "SELECT name, type, compression_codec FROM system.columns "
            "WHERE database = {database:String} AND table = {name:String}",
            database=database,
            name=name,
        )
        tables = self._rows(
            "SELECT engine_full, sorting_key, partition_key FROM system.tables "
            "WHERE database = {database:String} AND name = {name:String}",
            database=database,
            name=name,
        )
        engine, sorting_key, partition_key = tables[0] if tables else ("(there is no such table)", "", "")
        return FoundTable(
            columns={column: kind for column, kind, _ in columns},
            codecs={column: codec[len("CODEC(") : -1] for column, _, codec in columns if codec},
            engine=engine,
            sorting_key=sorting_key,
            partition_key=partition_key,
        )

    def _default_window(self, found: FoundTable) -> int:
        if found.window is not None or found.window_setting is None:
            return 0
        default = self._rows(
            "SELECT value FROM system.merge_tree_settings WHERE name = {name:String}", name=found.window_setting
        )
        return int(default[0][0]) if default else 0

    def columns(self, table: TableDefinition) -> dict[str, str]:
        """Name -> type of every column; empty if the table does not exist. Raises SinkError."""
        rows = self._rows(
            "SELECT name, type FROM system.columns WHERE database = {database:String} AND table = {name:String}",
            database=self.database,
            name=table.name,
        )
        return {str(name): str(kind) for name, kind in rows}

    def qualified(self, table: TableDefinition) -> str:
        """The table's name in SQL."""
        return f"{quote(self.database)}.{quote(table.name)}"

    def _rows(self, sql: str, **parameters: object) -> list[Any]:
        with self._errors_named("query"):
            return list(self._connected().query(sql, parameters=parameters).result_rows)

    def is_distributed(self, table: TableDefinition) -> bool:
        """True if the table's rows are elsewhere."""
        return self._found(self.database, table.name).distributed is not None

    def exists(self, name: str) -> bool:
        """Whether the database has a table of that name."""
        sql = "SELECT 1 FROM system.tables WHERE database = {database:String} AND name = {name:String}"
        return bool(self._rows(sql, database=self.database, name=name))

    def count(self, source: str) -> int:
        """How many rows `FROM source` has."""
        return int(self._rows(f"SELECT count() FROM {source}")[0][0])

    def command(self, sql: str) -> None:
        """A statement without an answer. Raises SinkError."""
        with self._errors_named("command"):
            self._connected().command(sql)

    def _connected(self) -> Client:
        with self._lock:
            if self._client is None:
                with self._errors_named("connection"):
                    self._client = clickhouse_connect.get_client(
                        **self._options,
                        # Sessions would forbid concurrent statements; every insert carries its own settings anyway.
                        autogenerate_session_id=False,
                        query_retries=0,
                        compress="lz4",
                        client_name="pintail",
                        show_clickhouse_errors="scrub",
                        pool_mgr=get_pool_manager(maxsize=self._connections_max, num_pools=1),
                    )
            return self._client

    @contextmanager
    def _errors_named(self, action: str) -> Iterator[None]:
        """Errors of the driver as SinkErrors."""
        try:
            yield
        except ClickHouseError as error:
            raise self._as_sink_error(action, error) from error

    def _as_sink_error(self, action: str, error: ClickHouseError) -> SinkError:
        code = getattr(error, "code", None)
        message = f"ClickHouse at {self._address}, {action}: {error}"
        if code == _TOO_MANY_PARTS_CODE:
            return SinkOverloadedError(message, hint="it is tried again, with fewer and larger inserts from then on")
        # Without a code it was the connection, or a proxy in between that answered.
        if code is None or code in _TRANSIENT_CODES or isinstance(error, OperationalError):
            return SinkUnavailableError(message, hint="it is tried again; see that ClickHouse is up and not overloaded")
        return SinkRejectedError(message, code=code, hint="an operator has to correct this in ClickHouse")
