"""The sink's tables, positions and inserts on the real engine."""

from __future__ import annotations

import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
from clickhouse_connect.driver.client import Client

from schemas.catalog import Catalog
from schemas.table import (
    ArrayType,
    ClickHouseOptions,
    Column,
    Migration,
    PartitionBy,
    ScalarKind,
    ScalarType,
    StructField,
    StructType,
    TableDefinition,
)
from streams.adapters.clickhouse_rows import delivery_table
from streams.adapters.clickhouse_sink import ClickHouseSink
from streams.adapters.duckdb_decoder import DuckDBDecoder
from streams.errors import (
    ClickHouseShapeError,
    ConfigurationError,
    RowsRefusedError,
    SinkOverloadedError,
    SinkRejectedError,
    SinkUnavailableError,
)
from streams.positions import OffsetRange, TopicPartition
from tests.clickhouse_proxy import ClickHouseProxy, Fault, FaultKind
from tests.sink_log import PartitionLog, append_table, keyed_table

Named = Callable[[str], str]


def log_of(table: TableDefinition, *records: tuple[str | None, object]) -> PartitionLog:
    log = PartitionLog(TopicPartition(table.topic, 0))
    for key, value in records:
        log.append(None if value is None else json.dumps(value).encode(), key=None if key is None else key.encode())
    return log


def deliver(sink: ClickHouseSink, table: TableDefinition, log: PartitionLog, start: int = 0) -> None:
    batch = log.batch(start, log.next_offset)
    decoded = DuckDBDecoder().decode(table, batch)
    assert not decoded.parked, decoded.parked
    sink.insert(table, log.topic_partition, OffsetRange(start, log.next_offset), delivery_table([decoded]))


def test_creating_tables_is_safe_from_several_workers_at_once(clickhouse_url: str, unique_name: Named) -> None:
    catalog = Catalog((append_table(unique_name("a")), keyed_table(unique_name("k"))))
    sinks = [ClickHouseSink(clickhouse_url + "/" + unique_name("db")) for _ in range(2)] * 2
    with ThreadPoolExecutor(4) as threads:
        list(threads.map(lambda sink: sink.ensure_tables(catalog), sinks))
    for sink in sinks:
        sink.ensure_tables(catalog)
        sink.close()


def test_the_last_offset_is_that_of_the_partition(sink: ClickHouseSink, unique_name: Named) -> None:
    for table in (append_table(unique_name("a")), keyed_table(unique_name("k"))):
        sink.ensure_tables(Catalog((table,)))
        assert sink.last_offset(table, TopicPartition(table.topic, 0)) is None
        log = log_of(table, *(("1", {"id": n, "value": n}) for n in range(5)))
        deliver(sink, table, log)
        assert sink.last_offset(table, TopicPartition(table.topic, 0)) == 4
        assert sink.last_offset(table, TopicPartition(table.topic, 1)) is None


def test_the_same_range_inserted_again_is_dropped(sink: ClickHouseSink, clickhouse: Client, unique_name: Named) -> None:
    table = append_table(unique_name("a"))
    sink.ensure_tables(Catalog((table,)))
    log = log_of(table, *((None, {"id": n, "value": n}) for n in range(100)))
    with ThreadPoolExecutor(4) as threads:
        list(threads.map(lambda _: deliver(sink, table, log), range(8)))
    assert clickhouse.query(f"SELECT count(), uniqExact(_offset) FROM {table.name}").result_rows == [(100, 100)]


def test_an_insert_is_one_lz4_frame_with_a_token_and_named_columns(clickhouse_url: str, unique_name: Named) -> None:
    table = append_table(unique_name("a"))
    with ClickHouseProxy(clickhouse_url) as proxy:
        sink = ClickHouseSink(proxy.url)
        sink.ensure_tables(Catalog((table,)))
        deliver(sink, table, log_of(table, (None, {"id": 1, "value": 2})))
        (insert,) = proxy.inserts
        sink.close()
    assert insert.encoding == "lz4"
    assert insert.body[:4] == bytes.fromhex("04224d18")
    assert insert.settings["insert_deduplication_token"] == f"{table.topic}:0:0:1"
    assert insert.settings["async_insert"] == "0"
    assert "(`id`, `value`, `_topic`, `_partition`, `_offset`, `_timestamp`)" in insert.statement


def test_a_keyed_table_final_equals_the_upsert_result(
    sink: ClickHouseSink, clickhouse: Client, unique_name: Named
) -> None:
    table = replace(
        keyed_table(unique_name("k")),
        columns=(*keyed_table("k").columns, Column("note", ScalarType(ScalarKind.VARCHAR), nullable=False)),
    )
    sink.ensure_tables(Catalog((table,)))
    log = PartitionLog(TopicPartition(table.topic, 0))
    expected: dict[int, int] = {}
    for step in range(300):
        key = step * 7 % 40
        if step % 5 == 0:
            log.append(None, key=str(key).encode())
            expected.pop(key, None)
        else:
            row = {"id": key, "value": step, "note": "x"}
            log.append(json.dumps(row).encode(), key=str(key).encode())
            expected[key] = step
    for start in range(0, 300, 70):
        end = min(300, start + 70)
        decoded = DuckDBDecoder().decode(table, log.batch(start, end))
        assert not decoded.parked
        rows = delivery_table([decoded])
        assert rows.column("_offset").to_pylist() == list(range(start, end))
        sink.insert(table, log.topic_partition, OffsetRange(start, end), rows)
    query = f"SELECT id, value FROM {table.name} FINAL WHERE _deleted = 0 ORDER BY id"
    assert dict(clickhouse.query(query).result_rows) == expected
    clickhouse.command(f"OPTIMIZE TABLE {table.name} FINAL")
    assert dict(clickhouse.query(query).result_rows) == expected
    assert sink.last_offset(table, log.topic_partition) == 299


def every_kind() -> tuple[Column, ...]:
    scalars = [
        Column(f"c_{kind.value.lower()}", ScalarType(kind, 20, 4) if kind is ScalarKind.DECIMAL else ScalarType(kind))
        for kind in ScalarKind
    ]
    nested = StructType(
        (StructField("n", ScalarType(ScalarKind.BIGINT)), StructField("s", ScalarType(ScalarKind.UUID)))
    )
    return (
        *scalars,
        Column("c_list", ArrayType(ScalarType(ScalarKind.INTEGER))),
        Column("c_lists", ArrayType(ArrayType(ScalarType(ScalarKind.VARCHAR)))),
        Column("c_struct", nested),
        Column("c_structs", ArrayType(nested)),
    )


def test_every_type_arrives_unchanged(sink: ClickHouseSink, clickhouse: Client, unique_name: Named) -> None:
    name = unique_name("types")
    table = TableDefinition(name, topic=name, columns=every_kind())
    sink.ensure_tables(Catalog((table,)))
    uuid = "61f0c404-5cb3-11e7-907b-a6006ad3dba0"
    full = {
        "c_tinyint": -128,
        "c_smallint": -32768,
        "c_integer": -(2**31),
        "c_bigint": -(2**63),
        "c_utinyint": 255,
        "c_usmallint": 65535,
        "c_uinteger": 2**32 - 1,
        "c_ubigint": 2**64 - 1,
        "c_real": 0.5,
        "c_double": 1e300,
        "c_decimal": "1234567890123456.7891",
        "c_boolean": True,
        "c_varchar": "ä\n'",
        "c_date": "1969-07-20",
        "c_timestamp": "1900-01-01 00:00:00.000001",
        "c_timestamptz": "2262-04-11 23:47:16.854775+00:00",
        "c_uuid": uuid,
        "c_json": {"a": [1, None]},
        "c_list": [1, None],
        "c_lists": [["a", None], []],
        "c_struct": {"n": 1, "s": uuid},
        "c_structs": [{"n": None, "s": uuid}],
    }
    log = log_of(table, (None, full), (None, {}), (None, {"c_structs": [None], "c_lists": [None]}))
    deliver(sink, table, log)
    columns = ", ".join(f"toString({column.name})" for column in table.columns)
    whole, empty, hollow = clickhouse.query(f"SELECT {columns} FROM {name} ORDER BY _offset").result_rows
    assert (
        whole
        == (
            *("-128", "-32768", "-2147483648", "-9223372036854775808"),
            *("255", "65535", "4294967295", "18446744073709551615"),
            *("0.5", "1e300", "1234567890123456.7891", "true"),
            *("ä\n'", "1969-07-20", "1900-01-01 00:00:00.000001"),
            *("2262-04-11 23:47:16.854775", uuid, '{"a": [1, null]}'),
            *("[1,NULL]", "[['a',NULL],[]]", f"(1,'{uuid}')", f"[(NULL,'{uuid}')]"),
        )
        or whole[17].replace(" ", "") == '{"a":[1,null]}'
    )
    assert empty == (*[None] * 18, "[]", "[]", "(NULL,NULL)", "[]")
    assert hollow[-4:] == ("[]", "[[]]", "(NULL,NULL)", "[(NULL,NULL)]")


#: Makes the engine answer as one before 26.8: it shows the nearest day that it holds.
SHORT_CALENDAR = {b"'0001-01-01": b"'1900-01-01", b"'9999-12-31": b"'2299-12-31"}
WIDE_DATES = {
    "d": ("0001-01-01", "1899-12-31", "2300-01-01", "9999-12-31"),
    "t": (
        "0001-01-01 00:00:00.000000",
        "1899-12-31 23:59:59.999999",
        "2300-01-01 00:00:00.000000",
        "9999-12-31 23:59:59.999999",
    ),
}


def dated_table(name: str) -> TableDefinition:
    day, moment = ScalarType(ScalarKind.DATE), ScalarType(ScalarKind.TIMESTAMPTZ)
    nested = ArrayType(StructType((StructField("t", moment), StructField("n", ScalarType(ScalarKind.BIGINT)))))
    columns = (Column("d", day), Column("t", ScalarType(ScalarKind.TIMESTAMP)), Column("l", nested))
    return TableDefinition(name, topic=name, columns=columns)


def test_the_years_1_to_9999_arrive_unchanged(sink: ClickHouseSink, clickhouse: Client, unique_name: Named) -> None:
    table = dated_table(unique_name("years"))
    sink.ensure_tables(Catalog((table,)))
    records = [
        {"d": d, "t": t, "l": [None, {"t": f"{t}Z"}]} for d, t in zip(WIDE_DATES["d"], WIDE_DATES["t"], strict=True)
    ]
    deliver(sink, table, log_of(table, *((None, record) for record in records)))
    rows = clickhouse.query(
        f"SELECT toString(d), toString(t), toString(l[2].t) FROM {table.name} ORDER BY _offset"
    ).result_rows
    assert rows == [(record["d"], record["t"], record["t"]) for record in records]


@pytest.mark.parametrize(
    "record",
    [
        *({"d": day} for day in WIDE_DATES["d"]),
        *({"t": moment} for moment in WIDE_DATES["t"]),
        {"l": [None, {"t": "2026-01-01T00:00:00Z"}, {"t": "2300-01-01T00:00:00Z"}]},
    ],
)
def test_a_date_that_an_old_server_would_change_is_refused_before_it_is_sent(
    clickhouse_url: str, clickhouse: Client, unique_name: Named, record: dict[str, object]
) -> None:
    table = dated_table(unique_name("years"))
    fits = {"d": "1900-01-01", "t": "2299-12-31 23:59:59.999999", "l": [{"t": "1900-01-01T00:00:00Z"}]}
    with ClickHouseProxy(clickhouse_url) as proxy:
        sink = ClickHouseSink(proxy.url)
        sink.ensure_tables(Catalog((table,)))
        proxy.replacements = SHORT_CALENDAR
        log = log_of(table, (None, fits))
        deliver(sink, table, log)
        log.append(json.dumps(fits).encode())
        log.append(json.dumps(record).encode())
        with pytest.raises(RowsRefusedError, match=r"offset 2 .* outside 1900 to 2299") as refused:
            deliver(sink, table, log, start=1)
        assert "26.8" in refused.value.hint
        assert clickhouse.query(f"SELECT max(_offset) FROM {table.name}").result_rows == [(0,)]
        proxy.replacements = {}
        deliver(sink, table, log, start=1)
        assert clickhouse.query(f"SELECT max(_offset) FROM {table.name}").result_rows == [(2,)]
        sink.close()


def test_a_delete_fills_columns_that_cannot_be_null(
    sink: ClickHouseSink, clickhouse: Client, unique_name: Named
) -> None:
    name = unique_name("types")
    columns = (Column("id", ScalarType(ScalarKind.BIGINT), False), *(replace(c, nullable=False) for c in every_kind()))
    table = TableDefinition(name, topic=name, columns=columns, primary_key=("id",))
    sink.ensure_tables(Catalog((table,)))
    deliver(sink, table, log_of(table, ("7", None)))
    assert clickhouse.query(f"SELECT id, _deleted, _offset, c_varchar, c_list FROM {name}").result_rows == [
        (7, 1, 0, "", [])
    ]


def test_an_additive_migration_is_applied_and_older_workers_go_on(
    sink: ClickHouseSink, clickhouse: Client, unique_name: Named
) -> None:
    old = append_table(unique_name("m"))
    first = Migration(1, "001_create.sql", old.columns)
    note = Column("note", ScalarType(ScalarKind.VARCHAR))
    new = replace(old, columns=(*old.columns, note), migrations=(first, Migration(2, "002_note.sql", (note,))))
    old = replace(old, migrations=(first,))
    sink.ensure_tables(Catalog((old,)))
    deliver(sink, old, log_of(old, (None, {"id": 0})))
    sink.ensure_tables(Catalog((new,)))
    sink.ensure_tables(Catalog((old,)))
    log = log_of(new, (None, {"id": 0}), (None, {"id": 1, "note": "x"}))
    deliver(sink, new, log, start=1)
    log.append(b'{"id": 2}')
    deliver(sink, old, log, start=2)
    rows = clickhouse.query(f"SELECT id, note FROM {old.name} ORDER BY _offset").result_rows
    assert rows == [(0, None), (1, "x"), (2, None)]


def test_a_migration_is_safe_from_several_workers_at_once(clickhouse_url: str, unique_name: Named) -> None:
    table = append_table(unique_name("m"))
    first = Migration(1, "001_create.sql", table.columns)
    added = tuple(Column(f"note_{n}", ScalarType(ScalarKind.VARCHAR)) for n in range(4))
    later = tuple(Migration(n, f"00{n}_note.sql", (column,)) for n, column in enumerate(added, start=2))
    new = replace(table, columns=(*table.columns, *added), migrations=(first, *later))
    sinks = [ClickHouseSink(clickhouse_url) for _ in range(4)]
    sinks[0].ensure_tables(Catalog((table,)))
    with ThreadPoolExecutor(4) as threads:
        list(threads.map(lambda sink: sink.ensure_tables(Catalog((new,))), sinks))
    assert list(sinks[0].columns(new))[: len(new.columns)] == list(new.column_names)
    for sink in sinks:
        sink.close()


def laid_out(table: TableDefinition) -> TableDefinition:
    """With an order, parts by day, a life time and a codec."""
    columns = (Column("id", table.columns[0].type, False, ("Delta", "ZSTD(3)")), *table.columns[1:])
    options = ClickHouseOptions(("id",), PartitionBy.DAY, retention_seconds=36_500 * 86_400)
    return replace(table, columns=columns, retention_seconds=86_400 * 30_000, clickhouse=options)


def test_the_layout_of_a_definition_is_what_clickhouse_has_and_another_one_is_refused(
    sink: ClickHouseSink, clickhouse: Client, unique_name: Named
) -> None:
    plain = append_table(unique_name("l"))
    table = laid_out(plain)
    sink.ensure_tables(Catalog((table,)))
    sink.ensure_tables(Catalog((table,)))
    deliver(sink, table, log_of(table, *((None, {"id": n}) for n in range(5))))
    assert sink.last_offset(table, TopicPartition(table.topic, 0)) == 4
    assert sink.last_offset(table, TopicPartition(table.topic, 1)) is None
    ((shown,),) = clickhouse.query(
        f"SELECT create_table_query FROM system.tables WHERE name = '{table.name}'"
    ).result_rows
    for words in (
        "`id` Int64 CODEC(Delta(8), ZSTD(3))",
        "PARTITION BY toYYYYMMDD(_timestamp) ORDER BY (id, _partition, _offset)",
        "TTL _timestamp + toIntervalSecond(3153600000)",
    ):
        assert words in shown
    with pytest.raises(ClickHouseShapeError) as refused:
        sink.ensure_tables(Catalog((replace(table, clickhouse=ClickHouseOptions(), retention_seconds=None),)))
    for difference in ("ORDER BY", "PARTITION BY", "TTL"):
        assert f"  {difference} " in refused.value.message
    other = replace(table, columns=(replace(table.columns[0], codec=("LZ4",)), *table.columns[1:]))
    with pytest.raises(ClickHouseShapeError, match=r"CODEC of id +LZ4 +Delta\(8\), ZSTD\(3\)"):
        sink.ensure_tables(Catalog((other,)))
    one_setting_less = replace(table, columns=(replace(table.columns[0], codec=("Delta", "ZSTD")), *table.columns[1:]))
    sink.ensure_tables(Catalog((one_setting_less,)))


@pytest.mark.parametrize(
    ("ddl", "shown"),
    [
        ("(id Int64, value String) ENGINE = MergeTree ORDER BY id", "value +Nullable\\(Int64\\) +String"),
        ("(id Int64) ENGINE = MergeTree ORDER BY id", "_offset +UInt64 +\\(missing\\)"),
        (None, "ENGINE +MergeTree +Memory"),
        ("WINDOW 0", "non_replicated_deduplication_window +10000 +0"),
        ("PARTITION BY id", "PARTITION BY +\\(none\\) +id"),
    ],
)
def test_a_table_with_another_shape_is_refused(
    ddl: str | None, shown: str, sink: ClickHouseSink, clickhouse: Client, unique_name: Named
) -> None:
    table = append_table(unique_name("shape"))
    declared = (
        "(id Int64, value Nullable(Int64), _topic LowCardinality(String), _partition UInt32, _offset UInt64, "
        "_timestamp DateTime64(3, 'UTC'))"
    )
    if ddl is None:
        ddl = f"{declared} ENGINE = Memory"
    elif ddl == "WINDOW 0":
        ddl = f"{declared} ENGINE = MergeTree ORDER BY (_partition, _offset)"
    elif ddl == "PARTITION BY id":
        ddl = (
            f"{declared} ENGINE = MergeTree ORDER BY (_partition, _offset) PARTITION BY id "
            "SETTINGS non_replicated_deduplication_window = 10000"
        )
    clickhouse.command(f"CREATE TABLE {table.name} {ddl}")
    with pytest.raises(ClickHouseShapeError, match=shown) as refused:
        sink.ensure_tables(Catalog((table,)))
    assert "ALTER TABLE" in refused.value.hint


def test_a_keyed_table_with_another_key_is_refused(sink: ClickHouseSink, unique_name: Named) -> None:
    table = keyed_table(unique_name("k"))
    sink.ensure_tables(Catalog((table,)))
    not_null = tuple(replace(column, nullable=False) for column in table.columns)
    sink_of_other = replace(table, columns=not_null, primary_key=("id", "value"))
    with pytest.raises(ClickHouseShapeError, match=r"ORDER BY +id, value +id"):
        sink.ensure_tables(Catalog((sink_of_other,)))


def test_rows_of_another_topic_are_a_foreign_table(sink: ClickHouseSink, unique_name: Named) -> None:
    table = append_table(unique_name("t"))
    sink.ensure_tables(Catalog((table,)))
    deliver(sink, table, log_of(table, (None, {"id": 1})))
    with pytest.raises(ClickHouseShapeError, match="_topic"):
        sink.ensure_tables(Catalog((replace(table, topic="elsewhere"),)))


@pytest.mark.parametrize(
    ("fault", "error"),
    [
        (Fault(FaultKind.UNAVAILABLE), SinkUnavailableError),
        (Fault(FaultKind.SLOW, seconds=1.5), SinkUnavailableError),
        (Fault(FaultKind.CUT_REPLY), SinkUnavailableError),
        (Fault(FaultKind.EXCEPTION, code=252), SinkOverloadedError),
        (Fault(FaultKind.EXCEPTION, code=242), SinkUnavailableError),
        (Fault(FaultKind.EXCEPTION, code=53), SinkRejectedError),
        (Fault(FaultKind.EXCEPTION, code=497), SinkRejectedError),
    ],
    ids=str,
)
def test_errors_say_whether_to_try_again(
    fault: Fault, error: type[Exception], clickhouse_url: str, unique_name: Named
) -> None:
    table = append_table(unique_name("a"))
    with ClickHouseProxy(clickhouse_url) as proxy:
        sink = ClickHouseSink(proxy.url, reply_seconds_max=1)
        sink.ensure_tables(Catalog((table,)))
        # The driver repeats a request once by itself when the connection breaks.
        proxy.inject(fault, fault)
        with pytest.raises(error) as raised:
            deliver(sink, table, log_of(table, (None, {"id": 1})))
        sink.close()
        proxy.wait_idle()
    if isinstance(raised.value, SinkRejectedError):
        assert raised.value.code == fault.code


def test_a_refused_connection_and_a_wrong_address_are_told_apart() -> None:
    with pytest.raises(SinkUnavailableError):
        ClickHouseSink("http://127.0.0.1:1").connect()
    with pytest.raises(ConfigurationError):
        ClickHouseSink("127.0.0.1:8123")


def test_a_null_where_none_can_be_is_refused_rather_than_filled(sink: ClickHouseSink, unique_name: Named) -> None:
    table = append_table(unique_name("a"))
    sink.ensure_tables(Catalog((table,)))
    nullable = replace(table, columns=(Column("id", table.columns[0].type), table.columns[1]))
    with pytest.raises(SinkRejectedError) as refused:
        deliver(sink, nullable, log_of(nullable, (None, {"value": 1})))
    assert refused.value.code == 349


def test_a_rule_refuses_rows_and_a_changed_column_the_table(
    sink: ClickHouseSink, clickhouse: Client, unique_name: Named
) -> None:
    table = append_table(unique_name("a"))
    sink.ensure_tables(Catalog((table,)))
    clickhouse.command(f"ALTER TABLE {table.name} ADD CONSTRAINT rule CHECK id != 1")
    log = log_of(table, (None, {"id": 0}), (None, {"id": 1}))
    with pytest.raises(RowsRefusedError, match="rule") as refused:
        deliver(sink, table, log)
    assert refused.value.code == 469
    clickhouse.command(f"ALTER TABLE {table.name} MODIFY COLUMN value Int64 DEFAULT 0")
    with pytest.raises(SinkRejectedError, match=r"value +Nullable\(Int64\) +Int64") as changed:
        deliver(sink, table, log)
    assert not isinstance(changed.value, RowsRefusedError), "no row is parked for what is the table's fault"
    assert clickhouse.query(f"SELECT count() FROM {table.name}").result_rows == [(0,)]


def test_the_password_is_never_shown() -> None:
    sink = ClickHouseSink("http://writer:s3cret@127.0.0.1:1/history")
    assert "s3cret" not in repr(sink)
    with pytest.raises(SinkUnavailableError) as away:
        sink.connect()
    assert "s3cret" not in str(away.value)
