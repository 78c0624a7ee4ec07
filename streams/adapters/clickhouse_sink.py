"""ClickHouseSink: tables, positions and exactly-once inserts in ClickHouse, over HTTP. The only user of its driver.

An insert is ONE record batch in one LZ4 frame under the token `topic:partition:lo:hi`: ClickHouse writes it as one part
or not at all, and drops a second insert under the same token. The driver may send an insert again by itself after a
lost connection; the token makes that harmless. All methods block and are thread-safe; called by the delivery process
from worker threads.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator, Mapping, Sequence
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
from schemas.clickhouse_ddl import (
    PARTITION_KEYS,
    create_table_sql,
    expected_columns,
    has_position_projection,
    migration_sql,
    order_by,
    quote,
    ttl,
)
from schemas.table import TableDefinition
from streams import telemetry
from streams.adapters.clickhouse_rows import beyond_the_short_calendar
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

#: ClickHouse error codes that say "not now": time-outs, limits on load, memory and parts, read-only states, Keeper.
_TRANSIENT_CODES = frozenset(
    {3, 159, 160, 164, 198, 202, 203, 209, 210, 225, 236, 241, 242, 243, 244, 279, 285, 286, 289, 305, 319}
    | {373, 394, 415, 425, 439, 473, 499, 517, 521, 626, 667, 722, 999}
)
_TOO_MANY_PARTS_CODE = 252
#: Codes that may be about one row's values: text, numbers, dates and UUIDs that cannot be converted (6, 26, 27, 38, 41,
#: 70, 72, 117, 376, 407), what is out of range or too large (69, 128, 131, 321), a null where there is none (349), and
#: what the rules of the table or of a view behind it refuse (153, 190, 395, 469, 691).
_ROW_CODES = frozenset({6, 26, 27, 38, 41, 69, 70, 72, 117, 128, 131, 153, 190, 321, 349, 376, 395, 407, 469, 691})
#: VALUE_IS_OUT_OF_RANGE_OF_DATA_TYPE
_OUT_OF_RANGE_CODE = 321
_CALENDAR_SHOWN = ("0001-01-01", "9999-12-31", "0001-01-01 00:00:00.000000", "9999-12-31 23:59:59.000000")
_CALENDAR_PROBE = (
    "SELECT toString(toDate32('0001-01-01')), toString(toDate32('9999-12-31')), "
    "toString(toDateTime64('0001-01-01 00:00:00', 6, 'UTC')), toString(toDateTime64('9999-12-31 23:59:59', 6, 'UTC'))"
)
_MERGE_TREE = re.compile(r"(?:Replicated|Shared)?MergeTree\Z")
_REPLACING_MERGE_TREE = re.compile(r"(?:Replicated|Shared)?ReplacingMergeTree\(.*\b_offset\b\)")
#: What a table without a declared partition key may have: nothing that spreads one insert over several parts, which
#: would break "all rows or none".
_ATOMIC_PARTITION_KEYS = frozenset({"", "tuple()", "_partition", "(_partition)"})
_TTL = re.compile(r"\bTTL (.+?)(?= SETTINGS |\Z)")


class ClickHouseSink:
    """One ClickHouse database. Connects when first used, and again after ClickHouse was away."""

    def __init__(
        self,
        url: str,
        *,
        reply_seconds_max: int = REPLY_SECONDS_MAX,
        connections_max: int = CONNECTIONS_MAX,
    ) -> None:
        """`url` is http[s]://[user:password@]host:port[/database]. Raises ConfigurationError."""
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
            self._command(f"CREATE DATABASE IF NOT EXISTS {quote(self.database)}")
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
            self._check_shape(table, self.columns(table))
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
            self._command(create_table_sql(table, database=self.database))
            log.info("%s: created %s", self, self.qualified(table))
            found = self.columns(table)
        for migration in table.migrations[1:]:
            if any(column.name not in found for column in migration.added_columns):
                for statement in migration_sql(table, migration.number, database=self.database):
                    self._command(statement)
                log.info("%s: applied %s to %s", self, migration.file, self.qualified(table))
                found = self.columns(table)
        self._check_shape(table, found)

    def _check_shape(self, table: TableDefinition, found: Mapping[str, str]) -> None:
        """Raises ClickHouseShapeError that shows every difference."""
        differences = [
            (name, expected, found.get(name, "(missing)"))
            for name, expected in expected_columns(table)
            if found.get(name) != expected
        ]
        differences += self._codec_differences(table)
        differences += self._engine_differences(table)
        if differences:
            raise ClickHouseShapeError(
                f"table {self.qualified(table)} in ClickHouse has another shape than table {table.name!r}:\n"
                + _as_text([("", "expected", "found"), *differences]),
                hint=f"correct it with ALTER TABLE, or move it away (RENAME TABLE {self.qualified(table)} TO ...) and "
                "Pintail creates it anew",
            )

    def _codec_differences(self, table: TableDefinition) -> list[tuple[str, str, str]]:
        """Only where the definition names codecs; an argument that it leaves out may be anything."""
        declared = {column.name: column.codec for column in table.columns if column.codec}
        if not declared:
            return []
        rows = self._rows(
            "SELECT name, compression_codec FROM system.columns "
            "WHERE database = {database:String} AND table = {name:String}",
            database=self.database,
            name=table.name,
        )
        found = {str(name): str(codec).removeprefix("CODEC(").removesuffix(")") for name, codec in rows}
        return [
            (f"CODEC of {name}", ", ".join(codec), found.get(name) or "(none)")
            for name, codec in declared.items()
            if not _is_codec(found.get(name, ""), codec)
        ]

    def _engine_differences(self, table: TableDefinition) -> list[tuple[str, str, str]]:
        """What the engine must be for deliveries to be exact: kind, keys, deduplication window, a single topic."""
        ((engine, sorting_key, partition_key),) = self._rows(
            "SELECT engine_full, sorting_key, partition_key FROM system.tables "
            "WHERE database = {database:String} AND name = {name:String}",
            database=self.database,
            name=table.name,
        )
        kind = engine.split(" ", 1)[0]
        differences = []
        if table.is_keyed:
            if not _REPLACING_MERGE_TREE.match(engine):
                differences.append(("ENGINE", "ReplacingMergeTree(_offset)", kind))
        elif not _MERGE_TREE.match(kind.split("(")[0]):
            differences.append(("ENGINE", "MergeTree", kind))
        expected_key = ", ".join(_spelled(name) for name in order_by(table))
        # ClickHouse shows a key of one column in parentheses if it was created so.
        found_key = sorting_key.removeprefix("(").removesuffix(")")
        if found_key != expected_key:
            differences.append(("ORDER BY", expected_key, found_key or "(none)"))
        expected_partitions = PARTITION_KEYS[table.clickhouse.partition_by]
        if partition_key not in ({expected_partitions} if expected_partitions else _ATOMIC_PARTITION_KEYS):
            differences.append(("PARTITION BY", expected_partitions or "(none)", partition_key or "(none)"))
        found_ttl = _TTL.search(engine)
        if (found_ttl[1] if found_ttl else "") != ttl(table):
            differences.append(("TTL", ttl(table) or "(none)", found_ttl[1] if found_ttl else "(none)"))
        replicated = "replicated" if engine.startswith("Replicated") else "non_replicated"
        window = self._deduplication_window(engine, f"{replicated}_deduplication_window")
        if not window and not engine.startswith("Shared"):
            differences.append((f"{replicated}_deduplication_window", "10000", str(window)))
        foreign = self._rows(f"SELECT _topic FROM {self.qualified(table)} LIMIT 1") if not differences else []
        if foreign and foreign[0][0] != table.topic:
            differences.append(("_topic of its rows", table.topic, str(foreign[0][0])))
        return differences

    def _deduplication_window(self, engine: str, setting: str) -> int:
        stated = re.search(rf"\b(?<!_){setting} = (\d+)", engine)
        if stated:
            return int(stated[1])
        default = self._rows("SELECT value FROM system.merge_tree_settings WHERE name = {name:String}", name=setting)
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

    def _command(self, sql: str) -> None:
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


def _spelled(name: str) -> str:
    """An identifier as `system.tables.sorting_key` shows it."""
    return name if re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name) else quote(name)


def _is_codec(found: str, declared: Sequence[str]) -> bool:
    """`found` as `system.columns` shows it: every argument spelled out."""
    parts = re.findall(r"\w+(?:\([^)]*\))?", found)
    return len(parts) == len(declared) and all(
        shown == wanted or ("(" not in wanted and shown.partition("(")[0] == wanted)
        for shown, wanted in zip(parts, declared, strict=True)
    )


def _as_text(rows: list[tuple[str, str, str]]) -> str:
    widths = [max(len(row[column]) for row in rows) for column in range(2)]
    return "\n".join(f"  {name:<{widths[0]}}  {expected:<{widths[1]}}  {found}" for name, expected, found in rows)
