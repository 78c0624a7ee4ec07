"""The engine. It knows Kafka, DuckDB, Redis and ClickHouse through ports, and does not know Faust.

Map (imports point downwards only)
    cli/, client/, localstack/   the edges: commands, the query client, the stack without Docker
    processes/                   what runs: ingestion, recovery, snapshotting, delivery, answering
    adapters/                    one technology each: duckdb_*, redis_*, kafka_*, clickhouse_*, memory_*
    ports.py                     the contracts between processes and adapters
    config.py, telemetry.py, retry.py, finishing.py          plumbing
    batches.py, positions.py, errors.py, limits.py, urls.py  vocabulary
"""
