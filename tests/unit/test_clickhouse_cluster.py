"""Tables on a cluster: what is created there, and which Distributed tables are refused.

Nothing here runs on a cluster: the embedded engine has neither Keeper nor clusters. That it parses the statements is
tested in tests/integration/test_tables_clickhouse.py.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from schemas.clickhouse_ddl import SHARDING_KEY, create_table_statements, expected_columns, migration_sql
from schemas.table import TableDefinition
from streams.adapters.clickhouse_audit import ClickHouseAudit
from streams.adapters.clickhouse_shape import (
    Distributed,
    FoundTable,
    column_differences,
    sharding_differences,
    storage_differences,
)
from streams.adapters.clickhouse_sink import ClickHouseSink
from streams.ports import AuditedRange
from streams.positions import OffsetRange
from tests.sink_log import append_table, keyed_table
from tests.unit.tables_helpers import table_of

REPLICATED = "Replicated{}MergeTree('/clickhouse/tables/{{uuid}}/{{shard}}', '{{replica}}'{})"


def found_table(table: TableDefinition, engine: str, *, order: str = "_partition, _offset") -> FoundTable:
    return FoundTable(dict(expected_columns(table)), {}, engine, order, "")


def test_a_table_is_replicated_on_every_server_behind_a_distributed_one_that_keeps_partitions_together() -> None:
    local, distributed = create_table_statements(append_table("flights"), database="air", cluster="main")
    assert local.startswith("CREATE TABLE IF NOT EXISTS `air`.`flights_local` ON CLUSTER 'main' (")
    assert "ENGINE = ReplicatedMergeTree\n" in local
    assert "SETTINGS replicated_deduplication_window = 10000" in local
    assert distributed == (
        "CREATE TABLE IF NOT EXISTS `air`.`flights` ON CLUSTER 'main' AS `air`.`flights_local` "
        "ENGINE = Distributed('main', 'air', 'flights_local', _partition)"
    )
    keyed, _ = create_table_statements(keyed_table("flights"), database="air", cluster="main")
    assert "ENGINE = ReplicatedReplacingMergeTree(_offset)\n" in keyed
    assert len(create_table_statements(append_table("flights"), database="air")) == 1


def test_a_migration_changes_the_tables_with_the_rows_before_the_one_that_asks_them(tmp_path: Path) -> None:
    table = table_of(tmp_path, "CREATE TABLE things (id BIGINT)", "ALTER TABLE things ADD COLUMN b INT CODEC(T64)")
    assert migration_sql(table, 2, database="air", cluster="main") == [
        f"ALTER TABLE `air`.`{name}` ON CLUSTER 'main' "
        "ADD COLUMN IF NOT EXISTS `b` Nullable(Int32) CODEC(T64) AFTER `id`"
        for name in ("things_local", "things")
    ]


@pytest.mark.parametrize(
    ("engine", "sharding_key"),
    [
        ("Distributed('main', 'air', 'flights_local', _partition)", "_partition"),
        (
            "Distributed('main', 'air', 'flights_local', _partition, 'policy') SETTINGS fsync_after_insert = 1",
            "_partition",
        ),
        ("Distributed('main', 'air', 'flights_local', rand())", "rand()"),
        ("Distributed('main', 'air', 'flights_local')", ""),
    ],
)
def test_a_distributed_table_must_keep_a_partition_on_one_shard(engine: str, sharding_key: str) -> None:
    distributed = found_table(append_table("flights"), engine).distributed
    assert distributed == Distributed("air", "flights_local", sharding_key)
    differences = sharding_differences(distributed)
    assert [each.what for each in differences] == ([] if sharding_key == "_partition" else ["sharding key"])


@pytest.mark.parametrize(
    ("engine", "wrong"),
    [
        (f"{REPLICATED.format('', '')} ORDER BY (x) SETTINGS index_granularity = 8192", []),
        (f"{REPLICATED.format('', '')} SETTINGS replicated_deduplication_window = 100", []),
        (
            f"{REPLICATED.format('', '')} SETTINGS replicated_deduplication_window = 0",
            ["replicated_deduplication_window"],
        ),
        ("SharedMergeTree('/clickhouse/tables/{uuid}/{shard}', '{replica}') ORDER BY x", []),
        (f"{REPLICATED.format('Replacing', ', _offset')} ORDER BY x", ["ENGINE"]),
        ("MergeTree ORDER BY x SETTINGS index_granularity = 8192", ["non_replicated_deduplication_window"]),
        ("MergeTree TTL x + 1 SETTINGS non_replicated_deduplication_window = 7", ["TTL"]),
        ("(there is no such table)", ["ENGINE", "non_replicated_deduplication_window"]),
    ],
)
def test_what_makes_deliveries_exact_is_checked_where_the_rows_are(engine: str, wrong: list[str]) -> None:
    table = append_table("flights")
    found = found_table(table, engine)
    # The server's defaults: 10,000 where tables are replicated, none where they are not.
    default_window = 10_000 if found.window_setting == "replicated_deduplication_window" else 0
    assert column_differences(table, found) == []
    differences = storage_differences(table, found, default_window=default_window)
    assert [each.what for each in differences] == wrong


def test_a_replicated_table_that_replaces_rows_is_a_keyed_one() -> None:
    table = keyed_table("flights")
    engine = f"{REPLICATED.format('Replacing', ', _offset')} ORDER BY id"
    assert storage_differences(table, found_table(table, engine, order="id"), default_window=10_000) == []


class Asked(ClickHouseSink):
    """Keeps what it is asked, and answers that nothing is there."""

    def __init__(self) -> None:
        super().__init__("http://balancer:8123/air", cluster="main")
        self.questions: list[tuple[str, dict[str, Any], dict[str, Any]]] = []

    def arrow(self, sql: str, parameters: dict[str, Any], settings: dict[str, Any]) -> pa.Table:
        self.questions.append((sql, parameters, settings))
        return pa.table({"newest": pa.array([], pa.int64())})


@pytest.mark.parametrize("table", [append_table("flights"), keyed_table("flights")], ids=["append", "keyed"])
def test_an_audit_asks_the_shard_of_the_partition_through_the_distributed_table(table: TableDefinition) -> None:
    sink = Asked()
    asked = AuditedRange(partition=3, offsets=OffsetRange(10, 20), bucket=5, since_ms=0)
    ClickHouseAudit(sink).holdings(table, asked)
    ClickHouseAudit(sink).rows(table, asked)
    for sql, parameters, settings in sink.questions:
        # One shard has the sharding key's value, and with it every record of a key: so FINAL, which each shard applies
        # to its own rows, is the FINAL of the whole table.
        assert (
            f"FROM `air`.`flights`{' FINAL' if table.is_keyed else ''} WHERE {SHARDING_KEY} = {{partition:UInt32}}"
            in sql
        )
        assert parameters == {"partition": 3}
        assert settings["skip_unavailable_shards"] == 0
        assert settings["max_replica_delay_for_distributed_queries"] == 1
        assert settings["fallback_to_stale_replicas_for_distributed_queries"] == 0
        # A bound within FINAL's source would let an older record of a key pass for its newest.
        assert ("AND _offset >= 10 AND _offset < 20" in sql.partition(" WHERE ")[2]) is not table.is_keyed
    assert len(sink.questions) == 2
