"""Asks ClickHouse what the store is asked, and gives the answer in the values of the wire protocol. Read-only."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import orjson
import pyarrow as pa

from schemas.catalog import Catalog
from schemas.clickhouse_query import SETTINGS, HistoryRefusedError, clickhouse_query
from streams.adapters.clickhouse_sink import ClickHouseSink
from streams.errors import SinkRejectedError
from streams.positions import TopicPartition, next_offset_after

_VALUES_OF_THE_PROTOCOL = {
    "output_format_json_quote_64bit_integers": 0,
    "output_format_json_quote_decimals": 1,
    "output_format_decimal_trailing_zeros": 1,
    "output_format_json_quote_denormals": 1,
    "output_format_json_named_tuples_as_objects": 1,
    "date_time_output_format": "iso",
    "output_format_arrow_string_as_string": 1,
    "wait_end_of_query": 1,
}


class HistoryAnswer(NamedTuple):
    """Rows of JSON values, or an Arrow table. The types are ClickHouse's."""

    columns: list[tuple[str, str]]
    rows: list[list[Any]]
    table: pa.Table | None
    #: topic -> partition -> next_offset: what lies below is reflected; what came meanwhile may be too.
    offsets: dict[str, dict[int, int]]
    seconds: float


class ClickHouseQueries:
    """The tables of a catalog, in the sink's database."""

    def __init__(self, sink: ClickHouseSink, catalog: Catalog) -> None:
        self._sink = sink
        self._catalog = catalog

    def ask(
        self,
        sql: str,
        params: Sequence[Any] | Mapping[str, Any],
        *,
        deadline_ms: int,
        rows_max: int,
        as_arrow: bool = False,
    ) -> HistoryAnswer:
        """Blocks. Raises HistoryRefusedError, SinkError."""
        started = time.perf_counter()
        translated, tables = clickhouse_query(sql, params, self._catalog, database=self._sink.database)
        limits = {"max_execution_time": deadline_ms / 1000, "max_result_rows": rows_max}
        settings = {**SETTINGS, **_VALUES_OF_THE_PROTOCOL, **limits}
        offsets: dict[str, dict[int, int]] = {}
        for table in tables:
            for partition in range(table.partitions):
                last = self._sink.last_offset(table, TopicPartition(table.topic, partition))
                if last is not None:
                    offsets.setdefault(table.topic, {})[partition] = next_offset_after(last)
        try:
            if as_arrow:
                found = self._sink.arrow(translated, {}, settings)
                columns, rows = [(field.name, str(field.type)) for field in found.schema], []
            else:
                reply = orjson.loads(self._sink.json_compact(translated, settings))
                found, rows = None, reply["data"]
                columns = [(column["name"], column["type"]) for column in reply["meta"]]
        except SinkRejectedError as error:
            raise HistoryRefusedError(
                error.message, hint="it was translated to: " + " ".join(translated.split())
            ) from error
        return HistoryAnswer(columns, rows, found, offsets, time.perf_counter() - started)
