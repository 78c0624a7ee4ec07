"""ClickHouseAudit: counts and digests of what ClickHouse holds of one topic partition, by ranges of offsets.

Each question is one statement over one snapshot of the table. Of a keyed table it also says how far that snapshot goes:
the newest record of a partition is always the newest of its key, so FINAL keeps it, as a tombstone if need be. On a
cluster one shard has the partition and applies FINAL; a replica that lags is not asked, and a shard that is away is an
error rather than missing rows. All methods block and are thread-safe; called by the audit from worker threads.
"""

from __future__ import annotations

from typing import Any

import pyarrow as pa

from schemas.clickhouse_ddl import expected_columns
from schemas.row_text import sink_text_in_clickhouse
from schemas.table import TableDefinition
from streams.adapters.clickhouse_sink import ClickHouseSink
from streams.ports import AuditedRange, Digest, HeldRow, Holdings
from streams.positions import next_offset_after

_SETTINGS: dict[str, Any] = {
    "output_format_arrow_string_as_string": 1,
    "wait_end_of_query": 1,
    # Of Distributed tables only; others ignore them. 1 second is the least that ClickHouse knows as lag.
    "skip_unavailable_shards": 0,
    "max_replica_delay_for_distributed_queries": 1,
    "fallback_to_stale_replicas_for_distributed_queries": 0,
}


class ClickHouseAudit:
    """streams.ports.AuditedCopy over the sink's connection."""

    def __init__(self, sink: ClickHouseSink) -> None:
        self._sink = sink

    def fault(self, table: TableDefinition) -> str | None:
        """Why the table cannot be compared; None if it can."""
        found = self._sink.columns(table)
        if not found:
            return f"ClickHouse has no table {self._sink.qualified(table)}"
        differing = [name for name, expected in expected_columns(table) if found.get(name) != expected]
        return f"ClickHouse's columns {', '.join(differing)} have other types" if differing else None

    def holdings(self, table: TableDefinition, asked: AuditedRange) -> Holdings:
        """See the port."""
        sums = ", ".join(
            f"toString(sumIf(toUInt128(reinterpretAsUInt64(substring(digest, {first}, 8))), wanted)) AS {name}"
            for first, name in ((1, "upper"), (9, "lower"))
        )
        found = self._ask(
            table,
            asked,
            f"SELECT toInt64(intDiv(_offset, {asked.bucket})) AS bucket, toInt64(countIf(wanted)) AS count, "
            f"toString(sumIf(toUInt128(_offset), wanted)) AS offsets, {sums}, toInt64(max(_offset)) AS newest",
            "GROUP BY bucket",
        )
        newest = max(found["newest"].to_pylist(), default=None)
        buckets = {
            row["bucket"]: Digest(row["count"], int(row["offsets"]), int(row["upper"]), int(row["lower"]))
            for row in found.to_pylist()
            if row["count"]
        }
        return Holdings(0 if newest is None else next_offset_after(newest), buckets)

    def rows(self, table: TableDefinition, asked: AuditedRange) -> tuple[int, list[HeldRow]]:
        """See the port."""
        found = self._ask(
            table,
            asked,
            "SELECT toInt64(_offset) AS offset, toString(reinterpretAsUInt64(substring(digest, 1, 8))) AS upper, "
            "toInt64(countIf(wanted)) AS count, toInt64(max(max(_offset)) OVER ()) AS newest",
            "GROUP BY offset, upper",
        )
        newest = max(found["newest"].to_pylist(), default=None)
        rows = [HeldRow(row["offset"], int(row["upper"]), row["count"]) for row in found.to_pylist() if row["count"]]
        return 0 if newest is None else next_offset_after(newest), rows

    def _ask(self, table: TableDefinition, asked: AuditedRange, select: str, grouping: str) -> pa.Table:
        wanted = (
            f"_offset >= {asked.offsets.lo} AND _offset < {asked.offsets.hi} "
            f"AND toUnixTimestamp64Milli(_timestamp) >= {asked.since_ms}"
        )
        source = f"{self._sink.qualified(table)}{' FINAL' if table.is_keyed else ''}"
        conditions = "_partition = {partition:UInt32}"
        if table.is_keyed:
            wanted += " AND _deleted = 0"
        else:
            conditions += f" AND _offset >= {asked.offsets.lo} AND _offset < {asked.offsets.hi}"
        return self._sink.arrow(
            f"{select} FROM (SELECT _offset, {wanted} AS wanted, MD5({sink_text_in_clickhouse(table)}) AS digest "
            f"FROM {source} WHERE {conditions}) {grouping}",
            {"partition": asked.partition},
            _SETTINGS,
        )
