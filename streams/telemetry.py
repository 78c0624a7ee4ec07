"""The metrics of a worker, in one place so that names and labels stay consistent. Served by the workers at /metrics."""

from __future__ import annotations

from prometheus_client import Counter, Gauge, Histogram

LATENCY_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)

RECORDS_APPLIED = Counter(
    "pintail_records_applied", "Records applied to the store (rows and deletes)", ["table", "partition"]
)
RECORDS_PARKED = Counter("pintail_records_parked", "Records parked in a dead-letter topic", ["table", "reason"])
TRANSACTION_SECONDS = Histogram(
    "pintail_transaction_seconds", "Decode, park and commit of one group of batches", buckets=LATENCY_BUCKETS
)
CHECKPOINT_SECONDS = Histogram(
    "pintail_checkpoint_seconds", "Folding a partition's write-ahead log into its file", buckets=LATENCY_BUCKETS
)
DECODE_BACKOFF_SECONDS = Gauge(
    "pintail_decode_backoff_seconds",
    "Delay before the store decodes again, for want of a schema; 0 while it goes on",
    ["partition"],
)
SCHEMA_REGISTRY_FAILURES = Counter(
    "pintail_schema_registry_failures", "Schemas that could not be had and are asked for again"
)
LAG_RECORDS = Gauge("pintail_lag_records", "Offsets between the store and the high watermark", ["topic", "partition"])
PARTITION_STATE = Gauge("pintail_partition_state", "1 for the state a partition is in", ["partition", "state"])
RECOVERY_SECONDS = Gauge("pintail_recovery_seconds", "Duration of the newest recovery", ["partition", "rung"])
RECOVERY_PROGRESS = Gauge(
    "pintail_recovery_progress_ratio", "How much of the step at hand of a recovery is done, 0 to 1", ["partition"]
)
DAMAGE_FOUND = Counter(
    "pintail_damage_found",
    "Local files and snapshot versions that recovery found damaged and did without",
    ["partition", "place"],
)
SNAPSHOT_SECONDS = Histogram("pintail_snapshot_seconds", "Duration of a snapshot", buckets=LATENCY_BUCKETS)
SNAPSHOT_BYTES = Counter("pintail_snapshot_bytes_sent", "Encoded bytes sent to Redis", ["partition"])
SNAPSHOT_MEMORY_BYTES = Gauge(
    "pintail_snapshot_memory_bytes", "Memory of Redis that the versions kept occupy", ["partition"]
)
DRILL_SUCCESS = Gauge(
    "pintail_snapshot_drill_success_timestamp_seconds",
    "When a restored snapshot last held what it should, in seconds since the epoch",
    ["partition"],
)
DRILL_FAILURES = Counter(
    "pintail_snapshot_drill_failures", "Drills in which a snapshot did not come back as it was", ["partition"]
)
SNAPSHOT_FAILURES = Counter("pintail_snapshot_failures", "Snapshots that could not be published", ["partition"])
PARTITION_FAULTS = Counter("pintail_partition_faults", "Faults that made a partition recover anew", ["partition"])
LOG_GAPS = Counter(
    "pintail_log_gaps",
    "Times a partition found that the log does not continue where its store ends",
    ["partition", "kind"],
)
REREADS = Counter(
    "pintail_rereads", "Times the log was read again because records were damaged or missing", ["topic", "partition"]
)
RETENTION_FAILURES = Counter("pintail_retention_failures", "Retention sweeps of a partition that failed", ["partition"])
STANDBY_LAG_RECORDS = Gauge(
    "pintail_standby_lag_records", "Offsets between a standby and the high watermarks", ["partition"]
)
STANDBY_FAULTS = Counter("pintail_standby_faults", "Faults that made a standby start anew", ["partition"])
REVOKE_SECONDS = Histogram(
    "pintail_revoke_seconds", "Letting go of partitions in a rebalance or at the end", buckets=LATENCY_BUCKETS
)
REVOKE_OVERRUNS = Counter(
    "pintail_revoke_overruns", "Partitions that were not let go of in time, so that their transaction was rolled back"
)
GROUP_SILENCE_SECONDS = Gauge(
    "pintail_group_silence_seconds", "Since the consumer group's last sign of life; at 60 the worker ends"
)
QUERIES = Counter("pintail_queries", "Queries by outcome (ok or the refusal's code)", ["outcome"])
QUERY_SECONDS = Histogram("pintail_query_seconds", "Request received to reply ready", buckets=LATENCY_BUCKETS)
SUBSCRIPTIONS = Gauge("pintail_subscriptions", "Subscriptions that are kept up to date now")
PUSHES = Counter("pintail_pushes", "Pushes of subscriptions: whole answers (full) or what changed (delta)", ["kind"])
SINK_LAG_RECORDS = Gauge(
    "pintail_sink_lag_records", "Offsets between what the sink has read and the high watermark", ["topic", "partition"]
)
ROWS_DELIVERED = Counter("pintail_rows_delivered", "Rows delivered to ClickHouse", ["table", "partition"])
DELIVERY_SECONDS = Histogram("pintail_delivery_seconds", "One micro-batch into ClickHouse", buckets=LATENCY_BUCKETS)
DELIVERY_FAILURES = Counter(
    "pintail_delivery_failures", "Steps of a delivery that failed and are tried again", ["table"]
)
DELIVERY_FAULTS = Counter("pintail_delivery_faults", "Faults that made a delivery start anew", ["topic", "partition"])
DELIVERY_CIRCUIT_OPEN = Gauge(
    "pintail_delivery_circuit_open", "1 from a failed try of a delivery to the next success", ["topic", "partition"]
)
SINK_GATHERING_SECONDS = Gauge(
    "pintail_sink_gathering_seconds", "Age at which micro-batches of a table are delivered at present", ["table"]
)
SINK_INSERT_BYTES = Counter(
    "pintail_sink_insert_bytes", "Bodies of inserts: as Arrow, and as sent (wire, in LZ4)", ["table", "form"]
)
DELIVERY_BACKOFF_SECONDS = Gauge(
    "pintail_delivery_backoff_seconds", "Delay before the next try; 0 while deliveries succeed", ["topic", "partition"]
)
