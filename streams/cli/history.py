"""`pintail query --history`: the same question to ClickHouse, which keeps rows longer than the store (D11)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from schemas.catalog import load_catalog
from schemas.messages import AnswerColumn, AnswerTiming
from streams.adapters.clickhouse_queries import ClickHouseQueries
from streams.adapters.clickhouse_sink import ClickHouseSink
from streams.client.answer import Answer
from streams.config import load_settings


def ask_history(sql: str, params: Sequence[Any] | Mapping[str, Any], *, deadline_ms: int, as_arrow: bool) -> Answer:
    """The answer as the store would give it; its types are ClickHouse's. Raises HistoryRefusedError, SinkError."""
    settings = load_settings()
    settings.require("clickhouse")
    sink = ClickHouseSink(settings.clickhouse, reply_seconds_max=-(-deadline_ms // 1000) + 5)
    try:
        found = ClickHouseQueries(sink, load_catalog(settings.tables_dir)).ask(
            sql, params, deadline_ms=deadline_ms, rows_max=settings.query_rows_max, as_arrow=as_arrow
        )
    finally:
        sink.close()
    rows = (
        found.rows if found.table is None else zip(*(column.to_pylist() for column in found.table.columns), strict=True)
    )
    return Answer(
        columns=tuple(AnswerColumn(name=name, type=kind) for name, kind in found.columns),
        rows=[tuple(row) for row in rows],
        offsets=found.offsets,
        epoch={},
        timing=AnswerTiming(queued_ms=0, waited_ms=0, executed_ms=found.seconds * 1000),
        _table=found.table,
    )
