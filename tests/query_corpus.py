"""Statements that must never run, and statements that must: the guard's corpus, over the tables of `query_store`.

One statement a line.
"""

# ruff: noqa: E501

from __future__ import annotations

from itertools import pairwise

HOSTILE = """
SELECT * FROM 'secrets.csv'
SELECT * FROM "secrets.csv"
SELECT * FROM "/etc/passwd"
SELECT * FROM '/etc/passwd'
SELECT * FROM 's3://bucket/x.parquet'
SELECT * FROM read_csv('/etc/passwd')
SELECT * FROM read_csv_auto('/etc/passwd')
SELECT * FROM read_text('/etc/passwd')
SELECT * FROM read_blob('0.duckdb')
SELECT * FROM read_parquet('x.parquet')
SELECT * FROM read_json('x.json')
SELECT * FROM read_ndjson_objects('x.json')
SELECT * FROM parquet_metadata('x.parquet')
SELECT * FROM sniff_csv('/etc/passwd')
SELECT * FROM glob('*')
SELECT (SELECT content FROM read_text('/etc/passwd'))
SELECT * FROM flights WHERE carrier IN (SELECT file FROM glob('/*'))
SELECT * FROM (SELECT * FROM (SELECT * FROM read_text('/etc/hostname')))
WITH a AS (SELECT * FROM read_text('/etc/hostname')) SELECT * FROM a
SELECT id FROM flights UNION ALL SELECT size FROM read_text('/etc/hostname')
SELECT * FROM flights, LATERAL (SELECT * FROM read_text(carrier))
SELECT * FROM query('SELECT 1')
SELECT * FROM query_table('flights')
SELECT * FROM json_execute_serialized_sql(json_serialize_sql('SELECT 1'))
SELECT json_serialize_sql('SELECT 1')
SELECT json_deserialize_sql('{}')
SELECT json_serialize_plan('SELECT 1')
FROM checkpoint('partition_0')
SELECT * FROM force_checkpoint('partition_0')
SELECT * FROM duckdb_settings()
SELECT * FROM duckdb_settings
SELECT * FROM duckdb_databases()
SELECT * FROM duckdb_tables()
SELECT * FROM duckdb_secrets()
SELECT * FROM duckdb_functions()
SELECT * FROM duckdb_views
SELECT * FROM pragma_database_list
SELECT * FROM pragma_table_info('flights')
SELECT * FROM pragma_version()
SELECT * FROM sqlite_master
SELECT * FROM pg_tables
SELECT * FROM pg_catalog.pg_class
SELECT * FROM information_schema.tables
SELECT * FROM "information_schema"."tables"
SELECT * FROM _positions
SELECT * FROM p0._ledger
SELECT * FROM partition_0.main.flights
SELECT * FROM partition_0.pintail.ledger
SELECT * FROM memory.all_partitions.flights
SELECT * FROM all_partitions.flights
SELECT * FROM p0.flights
SELECT * FROM main.flights
SELECT * FROM system.main.duckdb_settings
SELECT * FROM temp.flights
SELECT partition_0.main.count(*) FROM flights
SELECT carrier.upper() FROM flights
SELECT current_setting('memory_limit')
SELECT getvariable('x')
SELECT getenv('HOME')
SELECT nextval('s')
SELECT currval('s')
SELECT current_user
SELECT current_schema
SELECT current_database()
SELECT current_query()
SELECT in_search_path('main', 'flights')
SELECT version()
SELECT txid_current()
SELECT pg_sleep(10)
SELECT sleep_ms(10000)
SELECT write_log('x')
SELECT error('x')
SELECT setseed(0.5)
SELECT pg_typeof(1)
SELECT pg_get_viewdef('flights')
SELECT stats(id) FROM flights
SELECT vector_type(id) FROM flights
SELECT make_type('INTEGER')
SELECT repeat('x', 1000000000)
SELECT lpad('x', 1000000000, 'y')
SELECT rpad('x', 1000000000, 'y')
SELECT bar(1, 0, 1, 100000000)
SELECT format('{:1000000000}', 1)
SELECT printf('%1000000000d', 1)
SELECT range(1000000000)
SELECT generate_series(1, 1000000000)
SELECT list_resize([1], 1000000000)
SELECT array_resize([1], 1000000000)
SELECT bitstring('1', 1000000000)
SELECT bitstring_agg(id, 0, 1000000000) FROM flights
SELECT levenshtein(carrier, carrier) FROM flights
SELECT damerau_levenshtein(carrier, carrier) FROM flights
SELECT jaro_winkler_similarity(carrier, carrier) FROM flights
SELECT factorial(1000)
SELECT * FROM range(1000000000)
SELECT * FROM generate_series(1, 1000000000)
SELECT * FROM repeat('x', 1000000000)
SELECT * FROM repeat_row(1, num_rows = 1000000000)
SELECT * FROM test_all_types()
SELECT * FROM summary((SELECT * FROM flights))
SELECT * FROM histogram(flights, id)
SELECT * FROM seq_scan('flights')
SELECT * FROM arrow_scan(1, 2, 3)
SELECT * FROM pandas_scan(1)
SELECT [1]::INTEGER[1000000]
SELECT NULL::INTEGER[100000][100000]
SELECT '1'::BIT
SELECT 'a'::ENUM('a')
SELECT 1::flights
SELECT NULL::STRUCT(a INTEGER[100000])
SELECT list_transform([1], x -> x + 1)
SELECT list_transform([1], lambda x: x + 1)
SELECT list_filter(stops, x -> true) FROM flights
SELECT list_reduce([1, 2], (x, y) -> x + y)
SELECT [x + 1 FOR x IN [1, 2]]
SELECT list_aggregate(stops, 'string_agg') FROM flights
SELECT list_aggr(stops, 'max') FROM flights
SELECT apply([1], x -> x)
SELECT COLUMNS(*) FROM flights
SELECT COLUMNS('i.*') FROM flights
SELECT sum(COLUMNS(*)) FROM flights
SELECT COLUMNS(c -> c LIKE 'i%') FROM flights
SELECT * RENAME (id AS x) FROM flights
DESCRIBE flights
DESCRIBE SELECT 1
SUMMARIZE flights
SHOW TABLES
SHOW ALL TABLES
SHOW DATABASES
SHOW flights
SELECT * FROM (DESCRIBE flights)
SELECT * FROM (SUMMARIZE flights)
SELECT * FROM (SHOW TABLES)
PIVOT flights ON carrier USING count(*)
UNPIVOT flights ON id, delay INTO NAME a VALUE b
SELECT * FROM flights PIVOT (count(*) FOR carrier IN ('AA'))
SELECT * FROM (PIVOT flights ON carrier IN ('AA') USING count(*))
WITH RECURSIVE r AS (SELECT 1 AS n UNION ALL SELECT n + 1 FROM r) SELECT * FROM r
WITH RECURSIVE r(n) USING KEY (n) AS (SELECT 1 UNION SELECT n + 1 FROM r) SELECT * FROM r
WITH flights AS (SELECT 1) SELECT * FROM flights
WITH FLIGHTS AS (SELECT 1) SELECT * FROM airlines
WITH a AS (SELECT * FROM b), b AS (SELECT 1) SELECT * FROM a
WITH a AS (SELECT * FROM a) SELECT * FROM a
WITH duckdb_settings AS (SELECT 1) SELECT * FROM duckdb_settings
WITH pg_tables AS (SELECT 1) SELECT * FROM pg_tables
WITH "x.csv" AS (SELECT 1) SELECT * FROM "x.csv"
SELECT * FROM (WITH hidden AS (SELECT 1) SELECT * FROM hidden) AS a, hidden
SELECT (WITH hidden AS (SELECT 1 AS x) SELECT x FROM hidden), x FROM hidden
WITH a AS (WITH inner_one AS (SELECT 1) SELECT * FROM inner_one) SELECT * FROM inner_one
WITH a AS (SELECT 1), a AS (SELECT 2) SELECT * FROM a
WITH a AS (INSERT INTO flights VALUES (1) RETURNING *) SELECT * FROM a
WITH a AS (DELETE FROM flights RETURNING *) SELECT * FROM a
WITH a AS (UPDATE flights SET id = 1 RETURNING *) SELECT * FROM a
SELECT * FROM flights AT (VERSION => 1)
SELECT * FROM flights AT (TIMESTAMP => now())
SELECT * FROM flights TABLESAMPLE 10%
SELECT * FROM flights USING SAMPLE 10 ROWS
SELECT 1; SELECT 2
SELECT 1; DROP TABLE flights
EXPLAIN SELECT 1
EXPLAIN ANALYZE SELECT * FROM flights
PRAGMA database_list
PRAGMA enable_profiling
SET memory_limit = '1TB'
SET VARIABLE x = 1
RESET memory_limit
USE partition_0
ATTACH 'x.duckdb'
DETACH partition_0
CREATE TABLE x (a INTEGER)
CREATE MACRO m(x) AS x
CREATE TEMP VIEW v AS SELECT 1
INSERT INTO flights (id) VALUES (1)
UPDATE flights SET id = 1
DELETE FROM flights
MERGE INTO flights USING airlines ON true WHEN MATCHED THEN DELETE
DROP VIEW flights
ALTER TABLE flights ADD COLUMN x INTEGER
TRUNCATE flights
COPY flights TO '/tmp/x.csv'
COPY (SELECT 1) TO '/tmp/x.csv'
EXPORT DATABASE 'x'
IMPORT DATABASE 'x'
INSTALL httpfs
LOAD httpfs
CALL pragma_version()
CHECKPOINT
FORCE CHECKPOINT partition_0
VACUUM
ANALYZE
BEGIN
COMMIT
ROLLBACK
PREPARE p AS SELECT 1
EXECUTE p
DEALLOCATE p
COMMENT ON TABLE flights IS 'x'
SELECT carrier COLLATE de FROM flights
SELECT finalize(sum(id)) FROM flights
SELECT icu_sort_key(carrier, 'de') FROM flights
SELECT getvariable('a') || current_setting('threads')
SELECT * FROM unnest(range(1000000000))
SELECT unnest(generate_series(1, 1000000000))
SELECT hex(carrier) FROM flights
SELECT list_string_agg(stops) FROM flights
SELECT reservoir_quantile(id, 0.5, 1000000000) FROM flights
SELECT equi_width_bins(0, 1000000000, 1000000000, false)
SELECT * FROM read_csv(['/etc/passwd', '/etc/group'])
SELECT * FROM read_text(getvariable('x'))
SELECT * FROM flights WHERE EXISTS (SELECT 1 FROM read_text('/etc/passwd'))
SELECT * FROM flights ORDER BY (SELECT size FROM read_text('/etc/hostname'))
SELECT * FROM flights LIMIT (SELECT size FROM read_text('/etc/hostname'))
SELECT * FROM flights LIMIT 1 OFFSET (SELECT size FROM read_blob('0.duckdb'))
SELECT count(*) FILTER (WHERE id IN (SELECT size FROM read_text('/etc/hostname'))) FROM flights
SELECT carrier FROM flights GROUP BY carrier HAVING count(*) > (SELECT count(*) FROM duckdb_settings())
SELECT sum(id) OVER (PARTITION BY (SELECT size FROM read_text('/etc/hostname'))) FROM flights
SELECT CASE WHEN id = 1 THEN (SELECT content FROM read_text('/etc/hostname')) END FROM flights
SELECT [(SELECT content FROM read_text('/etc/hostname'))]
SELECT {'a': (SELECT content FROM read_text('/etc/hostname'))}
SELECT * FROM (VALUES ((SELECT content FROM read_text('/etc/hostname')))) v
SELECT * FROM flights JOIN read_text('/etc/hostname') r ON r.size = id
SELECT * FROM flights NATURAL JOIN duckdb_tables()
SELECT * FROM flights ASOF JOIN duckdb_tables() t ON id >= t.table_oid
SELECT * FROM flights POSITIONAL JOIN read_text('/etc/hostname')
SELECT * FROM flights SEMI JOIN read_text('/etc/hostname') r ON r.size = id
SELECT id FROM flights EXCEPT SELECT size FROM read_text('/etc/hostname')
SELECT id FROM flights INTERSECT SELECT table_oid FROM duckdb_tables()
FROM read_text('/etc/hostname')
FROM 'secrets.parquet' SELECT *
FROM "s3://bucket/secrets.parquet"
FROM "https://example.com/x.csv" SELECT count(*)
SELECT * FROM 'x.json'
SELECT * FROM '0.duckdb'
SELECT * FROM "../0.duckdb"
SELECT * FROM parquet_scan('x.parquet')
SELECT * FROM parquet_schema('x.parquet')
SELECT * FROM parquet_file_metadata('x.parquet')
SELECT * FROM read_json_auto('x.json')
SELECT * FROM read_json_objects('x.json')
SELECT * FROM read_duckdb('0.duckdb')
SELECT * FROM duckdb_columns()
SELECT * FROM duckdb_constraints()
SELECT * FROM duckdb_extensions()
SELECT * FROM duckdb_keywords()
SELECT * FROM duckdb_logs()
SELECT * FROM duckdb_memory()
SELECT * FROM duckdb_optimizers()
SELECT * FROM duckdb_prepared_statements()
SELECT * FROM duckdb_schemas()
SELECT * FROM duckdb_secret_types()
SELECT * FROM duckdb_sequences()
SELECT * FROM duckdb_temporary_files()
SELECT * FROM duckdb_types()
SELECT * FROM duckdb_variables()
SELECT * FROM duckdb_views()
SELECT * FROM pragma_storage_info('flights')
SELECT * FROM pragma_metadata_info('partition_0')
SELECT * FROM pragma_database_size()
SELECT * FROM pragma_show('flights')
SELECT * FROM pragma_user_agent()
SELECT * FROM which_secret('x', 's3')
SELECT * FROM unnest(current_schemas(true))
SELECT * FROM information_schema.columns
SELECT * FROM information_schema.schemata
SELECT * FROM pg_catalog.pg_namespace
SELECT * FROM sqlite_schema
SELECT * FROM system.information_schema.tables
SELECT * FROM partition_1.main.airlines
SELECT * FROM "partition_0"."pintail"."meta"
SELECT * FROM p3.airlines
SELECT * FROM memory.p1._positions
SELECT * FROM _partitions
SELECT * FROM "all_partitions"."_partitions"
SELECT * FROM pintail_parts
SELECT flights.main.id FROM flights, pintail.flights
SELECT current_schemas(true)
SELECT has_table_privilege('flights', 'select')
SELECT obj_description(1, 'pg_class')
SELECT pg_get_constraintdef(1)
SELECT get_block_size('partition_0')
SELECT current_connection_id()
SELECT current_transaction_id()
SELECT parse_duckdb_log_message('x', 'y')
SELECT add_parquet_key('k', 'v')
SELECT read_text('/etc/passwd')
SELECT session_user
SELECT user
SELECT current_role
SELECT current_catalog
SELECT list_transform(stops, lambda s: (SELECT content FROM read_text(s))) FROM flights
SELECT array_filter(stops, s -> s = 'JFK') FROM flights
SELECT list_apply([1], lambda x: x)
SELECT reduce([1, 2], lambda a, b: a + b)
SELECT random()
SELECT uuid()
SELECT gen_random_uuid()
SELECT setseed(1) FROM flights
SELECT * FROM flights ORDER BY random()
WITH a AS MATERIALIZED (SELECT * FROM read_text('/etc/hostname')) SELECT * FROM a
WITH a AS (COPY flights TO 'x.csv') SELECT * FROM a
WITH a AS (MERGE INTO flights USING airlines ON true WHEN MATCHED THEN DELETE RETURNING *) SELECT * FROM a
SELECT * FROM (INSERT INTO flights (id) VALUES (1) RETURNING *)
SELECT 1 /* harmless */ ; /* not */ DELETE FROM flights
SELECT 1; ; SELECT 2
SELECT * INTO x FROM flights
SELECT 1::"x.y.z"
SELECT NULL::UNION(a INTEGER, b VARCHAR)
SELECT NULL::MAP(VARCHAR, INTEGER[100000])
SELECT try_cast('1' AS BIT)
SELECT bit_count('1'::BIT)
SELECT sum(id) OVER w FROM flights WINDOW w AS (ORDER BY (SELECT size FROM read_text('/etc/hostname')))
SELECT ntile(1000000000) OVER () FROM read_text('/etc/hostname')
CREATE SECRET s (TYPE s3)
CREATE SCHEMA x
CREATE SEQUENCE s
CREATE FUNCTION f(x) AS x
CREATE TYPE t AS ENUM ('a')
CREATE INDEX i ON flights (id)
DROP TABLE partition_0.main.flights
DROP SCHEMA all_partitions CASCADE
ALTER DATABASE memory RENAME TO x
ATTACH ':memory:' AS x
ATTACH OR REPLACE 'x.duckdb' AS memory
UPDATE EXTENSIONS
SET enable_external_access = true
SET SESSION threads = 1
SET GLOBAL TimeZone = 'Europe/Berlin'
PRAGMA memory_limit = '1TB'
CALL enable_logging()
CALL force_checkpoint('partition_0')
COPY flights FROM '/tmp/x.csv'
COPY DATABASE partition_0 TO memory
REFRESH MATERIALIZED VIEW x
""".strip().splitlines()

#: Small texts that build huge values, trees or plans.
BOMBS = {
    "doubling through aliases": "SELECT carrier AS a0"
    + "".join(f", a{n} || a{n} AS a{n + 1}" for n in range(40))
    + " FROM flights",
    "doubling through CTEs": "WITH c0 AS (SELECT 'x' AS s)"
    + "".join(f", c{n + 1} AS (SELECT s || s || s || s AS s FROM c{n})" for n in range(20))
    + " SELECT length(s) FROM c20",
    "doubling through subqueries": "SELECT length(s) FROM "
    + "(SELECT s || s || s || s AS s FROM " * 20
    + "(SELECT 'x' AS s)"
    + ")" * 20,
    "doubling through replace": "SELECT " + "replace(" * 12 + "'x'" + ", 'x', 'xxxxxxxx')" * 12,
    "doubling through regexp_replace": "SELECT " + "regexp_replace(" * 12 + "'x'" + ", 'x', 'xxxxxxxx', 'g')" * 12,
    "doubling through lists": "SELECT [[[[[[[[[[[[[[[[1]]]]]]]]]]]]]]]]" + " AS a, [a,a,a,a] AS b"
    ", [b,b,b,b] AS c, [c,c,c,c] AS d, [d,d,d,d] AS e, [e,e,e,e] AS f",
    "doubling through quoting": "SELECT " + "to_json(" * 20 + "'\"'" + ")" * 20,
    "doubling through lateral joins": "SELECT f.x FROM (SELECT carrier AS x) AS a"
    + "".join(f", LATERAL (SELECT {p}.x || {p}.x || {p}.x || {p}.x AS x) AS {n}" for p, n in pairwise("abcdefghi")),
    "doubling through correlated subqueries": "SELECT "
    + "(SELECT x || x || x || x FROM (SELECT " * 8
    + "carrier"
    + " AS x))" * 8
    + " FROM flights",
    "long separators": "SELECT array_to_string(string_split(string_agg(carrier, ''), ''), '"
    + "x" * 10_000
    + "') FROM flights",
    "deep parentheses of operators": "SELECT " + "(1 + " * 200 + "1" + ")" * 200,
    "deep subqueries": "SELECT * FROM " + "(SELECT * FROM " * 100 + "flights" + ")" * 100,
    "deeper than DuckDB parses": "SELECT " + "[" * 5_000 + "]" * 5_000,
    "long chain of unions": "SELECT 1" + " UNION SELECT 1" * 1_000,
    "many tables": "SELECT 1 FROM flights" + ", flights" * 100,
    "LIKE that backtracks": "SELECT '" + "a" * 5_000 + "' LIKE '%a%a%a%a_b'",
    "ILIKE that backtracks": "SELECT count(*) FROM flights WHERE carrier ILIKE '%a%a%a%b'",
    "LIKE with escape": "SELECT count(*) FROM flights WHERE carrier LIKE '%a%a%a%b' ESCAPE '!'",
    "GLOB that backtracks": "SELECT count(*) FROM flights WHERE carrier GLOB '*a*a*a*b'",
    "pattern from a row": "SELECT count(*) FROM flights WHERE carrier LIKE carrier",
    "pattern from a subquery": "SELECT count(*) FROM flights WHERE carrier LIKE (SELECT min(name) FROM airlines)",
    "like_escape as a function": "SELECT like_escape(carrier, '%a%a%a%b', '!') FROM flights",
    "regex that repeats": "SELECT regexp_matches(carrier, '(a?){1000}(a){1000}b') FROM flights",
    "regex from a row": "SELECT regexp_matches(carrier, carrier) FROM flights",
    "long list": "SELECT id IN (" + ", ".join(["1"] * 6_000) + ") FROM flights",
    "cube of many columns": "SELECT count(*) FROM flights GROUP BY CUBE (id, carrier, delay, fare, departed, day, stops)",
    "too long": "SELECT 1 -- " + "x" * 20_000,
}

_TEXT = "A" * 20_000

#: Statement and parameters: harmless with short values, gigabytes with these.
PARAMETER_BOMBS: dict[str, tuple[str, list[object] | dict[str, object]]] = {
    "a long replacement, replaced again": (
        "SELECT max(length(replace(replace(replace(carrier, 'A', $1), 'A', 'AAAAAAAAAA'), 'A', 'AAAAA'))) FROM flights",
        [_TEXT],
    ),
    "two replacements": (
        "SELECT max(length(replace(replace(carrier, 'A', $1), 'A', $2))) FROM flights",
        [_TEXT, "A" * 300],
    ),
    "a replacement in disguise": ("SELECT max(length(replace(carrier, 'A', upper($1)))) FROM flights", [_TEXT]),
    "a replacement with a pattern": ("SELECT regexp_replace(carrier, 'A', $1, 'g') FROM flights", [_TEXT]),
    "one text many times": (
        "SELECT max(length(concat(carrier, " + ", ".join(["$1"] * 100) + "))) FROM flights",
        [_TEXT],
    ),
    "one text in many expressions": (
        "SELECT " + ", ".join(f"max(length($1 || carrier || {n}))" for n in range(20)) + " FROM flights",
        [_TEXT],
    ),
    "many texts of medium length": (
        "SELECT concat(" + ", ".join(f"$p{n}" for n in range(50)) + ", carrier) FROM flights",
        {f"p{n}": "A" * 2_000 for n in range(50)},
    ),
    "one text in a list": ("SELECT ARRAY[carrier, " + ", ".join(["$1"] * 60) + "] FROM flights", [_TEXT]),
    "a long separator": ("SELECT string_agg(carrier, $1) FROM flights", [_TEXT]),
    "a separator of concat_ws": ("SELECT concat_ws($1, carrier, carrier, carrier) FROM flights", [_TEXT]),
    "a long list, once a row": ("SELECT list_append($1, id) FROM flights", [list(range(100_000))]),
    "a long list of a long list": ("SELECT list_slice($1, 1, id) FROM flights", [[list(range(100_000))]]),
    "a text hidden in a list": ("SELECT replace(carrier, 'A', unnest($1)) FROM flights", [[_TEXT]]),
    "a text hidden in an object": (
        "SELECT to_json($1) || carrier || to_json($1) FROM flights",
        [{"a": _TEXT, "b": _TEXT}],
    ),
}

#: Long parameters that are only looked at cost one copy, and stay allowed.
USEFUL_WITH_PARAMETERS: list[tuple[str, list[object] | dict[str, object]]] = [
    ("SELECT count(*) FROM flights WHERE id IN (SELECT unnest($1))", [list(range(50_000))]),
    ("SELECT count(*) FROM flights WHERE id = ANY($ids::BIGINT[])", {"ids": list(range(50_000))}),
    ("SELECT count(*) FROM flights WHERE list_contains($1::BIGINT[], id)", [list(range(50_000))]),
    ("SELECT count(*) FROM flights WHERE id IN $1", [list(range(50_000))]),
    ("WITH wanted AS (SELECT unnest($1) AS carrier) FROM flights SEMI JOIN wanted USING (carrier)", [["AA"] * 5_000]),
    ("SELECT count(*) FROM flights WHERE carrier = $1 OR (extra->>'note') = $1 OR starts_with($1, carrier)", [_TEXT]),
    (
        "SELECT $1 || carrier, concat($2, '-', carrier), replace(carrier, $3, $4) FROM flights",
        ["a" * 500, 7, "A", "B" * 100],
    ),
]

USEFUL = """
SELECT partition, topic, first_offset, next_offset, rows, deletes, parked FROM _ledger
SELECT max(next_offset) FROM _LEDGER WHERE topic = 'flights'
SELECT 1
SELECT 1 + 1 AS two, 'text' AS t, TRUE AS yes, NULL AS nothing
FROM flights
FROM flights SELECT id WHERE id < 5
TABLE airlines
VALUES (1, 'a'), (2, 'b')
SELECT * FROM flights LIMIT 3
SELECT id, carrier FROM flights ORDER BY id DESC NULLS LAST LIMIT 5 OFFSET 2
SELECT carrier, count(*) FROM flights GROUP BY ALL ORDER BY 2 DESC
SELECT carrier, count(*) AS n, avg(delay), max(fare) FROM flights GROUP BY carrier HAVING count(*) > 1 ORDER BY ALL
SELECT DISTINCT carrier FROM flights
SELECT DISTINCT ON (carrier) carrier, id FROM flights ORDER BY carrier, id DESC
SELECT count(DISTINCT carrier) FROM flights
SELECT count(*) FILTER (WHERE delay > 3), count(*) FILTER (carrier = 'AA') FROM flights
SELECT f.id, a.name FROM flights f JOIN airlines a USING (carrier)
SELECT f.id, a.name FROM flights f LEFT JOIN airlines a ON f.carrier = a.carrier WHERE a.name IS NULL
SELECT * FROM flights NATURAL JOIN airlines
SELECT * FROM flights SEMI JOIN airlines USING (carrier)
SELECT * FROM flights ANTI JOIN airlines USING (carrier)
SELECT count(*) FROM flights, airlines
SELECT f.id, g.id FROM flights f ASOF JOIN flights g ON f.carrier = g.carrier AND f.departed > g.departed
SELECT * FROM flights WHERE carrier IN ('AA', 'UA') AND id NOT IN (1, 2)
SELECT * FROM flights WHERE carrier IN (SELECT carrier FROM airlines)
SELECT * FROM flights f WHERE EXISTS (SELECT 1 FROM airlines a WHERE a.carrier = f.carrier)
SELECT id, (SELECT name FROM airlines a WHERE a.carrier = f.carrier) FROM flights f
SELECT * FROM flights WHERE id BETWEEN 3 AND 6 OR carrier LIKE 'A%' OR carrier ILIKE '%l' OR carrier NOT LIKE 'U_'
SELECT * FROM flights WHERE id >= ALL (SELECT id FROM flights) OR id = ANY (SELECT 3)
SELECT * FROM flights WHERE delay IS DISTINCT FROM 3 AND carrier IS NOT NULL AND NOT (id = 4)
WITH late AS (SELECT * FROM flights WHERE delay > 5), busy AS MATERIALIZED (SELECT carrier FROM late) SELECT * FROM busy
WITH a(x) AS (SELECT id FROM flights) SELECT x FROM a UNION ALL SELECT x + 1 FROM a ORDER BY 1 LIMIT 5
SELECT id FROM flights INTERSECT SELECT 4 EXCEPT SELECT 5
SELECT id AS a FROM flights UNION ALL BY NAME SELECT 1 AS b
SELECT id, row_number() OVER (PARTITION BY carrier ORDER BY delay DESC) AS n FROM flights QUALIFY n <= 2
SELECT id, lag(delay, 1, 0.0) OVER w, sum(delay) OVER w, rank() OVER w FROM flights WINDOW w AS (ORDER BY id)
SELECT avg(delay) OVER (ORDER BY id ROWS BETWEEN 2 PRECEDING AND CURRENT ROW EXCLUDE TIES) FROM flights
SELECT first_value(id IGNORE NULLS) OVER (ORDER BY id RANGE BETWEEN UNBOUNDED PRECEDING AND CURRENT ROW) FROM flights
SELECT ntile(4) OVER (ORDER BY id), percent_rank() OVER (ORDER BY id), cume_dist() OVER (ORDER BY id) FROM flights
SELECT carrier, day, count(*), grouping(carrier) FROM flights GROUP BY ROLLUP (carrier, day)
SELECT carrier, day, count(*) FROM flights GROUP BY GROUPING SETS ((carrier), (day), ())
SELECT CASE WHEN delay > 10 THEN 'late' WHEN delay > 5 THEN 'slow' ELSE 'ok' END AS class, count(*) FROM flights GROUP BY 1
SELECT CASE carrier WHEN 'AA' THEN 1 ELSE 2 END, if(id > 3, 'a', 'b'), coalesce(carrier, '?'), ifnull(delay, 0) FROM flights
SELECT id::VARCHAR, CAST(fare AS DOUBLE), TRY_CAST(carrier AS INTEGER), '2026-01-01'::DATE, fare::DECIMAL(18, 4) FROM flights
SELECT '{"a": 1}'::JSON, '[1]'::INTEGER[], {'a': 1}::STRUCT(a BIGINT), TRY('x'::INTEGER)
SELECT date_trunc('hour', departed), date_part('dow', departed), extract(year FROM day), strftime(day, '%Y-%m') FROM flights
SELECT departed + INTERVAL 1 DAY, departed - INTERVAL '2 hours', now() - departed, age(departed) FROM flights
SELECT * FROM flights WHERE departed >= TIMESTAMPTZ '2026-03-05 00:00:00Z' AND day < DATE '2026-03-20'
SELECT time_bucket(INTERVAL 7 DAY, day), count(*) FROM flights GROUP BY 1
SELECT epoch(departed), epoch_ms(departed), epoch_us(departed), to_timestamp(0), make_date(2026, 1, 2), current_date FROM flights
SELECT departed AT TIME ZONE 'America/New_York', date_diff('day', day, DATE '2026-04-01'), last_day(day) FROM flights
SELECT strptime('2026-01-01', '%Y-%m-%d'), dayname(day), monthname(day), week(day), quarter(day) FROM flights
SELECT upper(carrier), lower(carrier), length(carrier), carrier || '-' || id, concat(carrier, id), reverse(carrier) FROM flights
SELECT substring(carrier FROM 1 FOR 1), left(carrier, 1), trim(' x '), split_part('a-b', '-', 1), position('A' IN carrier) FROM flights
SELECT replace(carrier, 'A', 'B'), regexp_replace(carrier, 'A+', 'x', 'g'), regexp_extract(carrier, '(A)', 1) FROM flights
SELECT * FROM flights WHERE regexp_matches(carrier, '^A') OR carrier SIMILAR TO 'U.*' OR starts_with(carrier, 'D')
SELECT string_agg(carrier, ',' ORDER BY id), list(id ORDER BY id), array_agg(DISTINCT carrier) FROM flights
SELECT stops[1], stops[1:2], len(stops), list_contains(stops, 'JFK'), list_sort(stops), list_distinct(stops) FROM flights
SELECT stop, count(*) FROM (SELECT unnest(stops) AS stop FROM flights) GROUP BY 1
SELECT f.id, s.stop FROM flights f, unnest(f.stops) AS s(stop)
SELECT plane.tail, f.plane.tail, plane['tail'], struct_extract(plane, 'tail') FROM flights f
SELECT extra->>'meal', extra->'$.meal', json_extract(extra, '$.meal'), json_extract_string(extra, '$.meal') FROM flights
SELECT json_object('id', id, 'c', carrier), json_type(extra), json_valid('{}'), to_json(plane) FROM flights
SELECT [1, 2, 3], {'a': 1, 'b': 'x'}, MAP {'k': 1}, (1, 2), ARRAY[1, 2], ARRAY(SELECT id FROM flights)
SELECT * EXCLUDE (extra), * REPLACE (delay * 2 AS delay), f.* FROM flights f LIMIT 1
SELECT * FROM flights WHERE carrier LIKE '%A%A%A%' OR carrier ILIKE '%a%b%' OR carrier LIKE '%' || lower('A') || '%'
SELECT * FROM flights WHERE carrier GLOB 'A*' OR carrier LIKE '%!%%' ESCAPE '!' OR carrier NOT ILIKE '_a'
SELECT md5(carrier), sha256(carrier), hash(id, carrier) FROM flights
SELECT count(*), bit_xor(hash(f)), sum(hash(f)::HUGEINT) FROM flights f
SELECT bit_xor(md5_number(carrier || id)) FROM flights
SELECT stddev(delay), variance(delay), median(delay), quantile_cont(delay, [0.5, 0.99]), corr(delay, id), mode(carrier) FROM flights
SELECT approx_count_distinct(id), approx_quantile(delay, 0.9), arg_max(id, delay), min_by(id, delay), any_value(id) FROM flights
SELECT bool_and(id > 0), bool_or(id > 3), bit_or(id), product(id), kurtosis(delay), regr_slope(delay, id) FROM flights
SELECT abs(-1), round(2.567, 2), floor(2.5), ceil(2.5), sqrt(2), ln(2), pow(2, 10), 7 % 3, 7 // 2, greatest(1, 2), 2 ** 3
SELECT max(_offset), min(_partition), max(_timestamp) FROM flights
SELECT _partition, count(*), max(_offset) FROM flights GROUP BY ALL ORDER BY ALL
SELECT carrier COLLATE NOCASE = 'aa' FROM flights
SELECT * FROM flights POSITIONAL JOIN airlines
SELECT * FROM flights ORDER BY ALL LIMIT 10%
SELECT a.id FROM (SELECT id FROM flights WHERE id > 3) a JOIN (VALUES (4), (5)) v(id) USING (id)
SELECT carrier, max(n) FROM (SELECT carrier, day, count(*) AS n FROM flights GROUP BY ALL) GROUP BY ALL
/* comment */ SELECT id FROM flights -- another
SELECT typeof(id), x'00ff'::BLOB, 1e300 * 10, uuid FROM flights, (SELECT 'a0eebc99-9c0b-4ef8-bb6d-6bb9bd380a11'::UUID AS uuid)
""".strip().splitlines()
