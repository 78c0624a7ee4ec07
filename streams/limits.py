"""Every limit, named once, with the relations between them asserted at the end."""

from __future__ import annotations

KIB = 1024
MIB = 1024 * KIB

#: A snapshot block; DuckDB's own block size, so that one changed page changes one block.
SNAPSHOT_BLOCK_BYTES = 256 * KIB
#: Largest encoded block stored in Redis: one byte more would cost the next allocator size class.
REDIS_VALUE_BYTES_MAX = 262_080

#: A record with a larger value is parked, not decoded.
RECORD_BYTES_MAX = 8 * MIB
#: Nesting deeper than this is parked, not decoded.
JSON_DEPTH_MAX = 64
#: Dead-letter topics accept this much; larger payloads are parked truncated, with a header that says so.
DEAD_LETTER_BYTES_MAX = 16 * MIB
#: What one dead letter keeps of a payload that does not fit its topic.
DEAD_LETTER_TRUNCATED_BYTES = 64 * KIB

#: Bytes of fetched batches that may wait for their transaction, per worker.
INGEST_BUFFER_BYTES_MAX = 128 * MIB
#: Bytes of queued batches that one transaction takes.
TRANSACTION_BYTES_MAX = 32 * MIB
#: A fetch and a transaction wait for company, a short while, unless they have this many bytes.
GATHERED_BYTES = MIB
GATHERING_SECONDS = 0.005
#: Dead letters that are sent before the first of them is waited for.
PARKED_TOGETHER_MAX = 1_000
#: Records of a partition that ClickHouse may refuse one after another before that counts as the table's fault.
REFUSED_IN_A_ROW_MAX = 100
#: A partition's write-ahead log is folded into its file beyond this size. Each fold writes the last row group anew,
#: so a quarter of it makes the file of wide rows twice as large, for four times the CPU.
WAL_BYTES_MAX = 64 * MIB
#: The same once nothing has come to it for a while: rows in the log are not compressed, and scanned slowly.
IDLE_WAL_BYTES_MAX = 4 * MIB
IDLE_SECONDS = 5.0

#: A copy of a partition that is behind by no more than this is warm: it is replayed within a second or so.
WARM_LAG_RECORDS_MAX = 100_000
#: Bytes of fetched batches that may wait for a worker's standbys.
STANDBY_BUFFER_BYTES_MAX = 64 * MIB

#: What the client sends of a request; a topic takes a little more by default.
QUERY_REQUEST_BYTES_MAX = 900 * KIB
QUERY_SQL_CHARS_MAX = 20_000
QUERY_ROWS_MAX = 10_000
QUERY_ANSWER_BYTES_MAX = 900 * KIB
#: What an answer that may come in several records has at most, and each of these records.
QUERY_CHUNKED_BYTES_MAX = 64 * MIB
QUERY_CHUNK_BYTES_MAX = 900 * KIB
#: Bytes of Arrow, before compression, of what one partition contributes to an answer, and of all contributions.
QUERY_PART_BYTES_MAX = 16 * MIB
QUERY_GATHERED_BYTES_MAX = 64 * MIB
QUERY_DEADLINE_MS_DEFAULT = 5_000
QUERY_DEADLINE_MS_MAX = 120_000
#: Requests that one worker holds (waiting, queued, running); the next one is refused as overloaded.
QUERY_IN_FLIGHT_MAX = 2_000
#: A subscription is pushed at most once in this time, and ends unless it is renewed in that one.
SUBSCRIPTION_EVERY_MS_DEFAULT = 1_000
SUBSCRIPTION_EVERY_MS_MIN = 100
SUBSCRIPTION_LEASE_MS_DEFAULT = 30_000
SUBSCRIPTION_LEASE_MS_MAX = 300_000
#: Subscriptions that one worker keeps, each with its rows in memory, and those of one caller among them.
SUBSCRIPTIONS_MAX = 200
SUBSCRIPTIONS_PER_CALLER_MAX = 50
#: Memory of the rows of all subscriptions of one worker; one that needs more is refused, or ends.
SUBSCRIPTIONS_BYTES_MAX = 64 * MIB
#: Nodes, nesting, and tables plus SELECTs of one query's syntax tree.
QUERY_NODES_MAX = 5_000
QUERY_DEPTH_MAX = 64
QUERY_SOURCES_MAX = 64
#: How many times larger than a stored value a value that a query builds may become.
QUERY_GROWTH_MAX = 1_024
#: The same, over all values that its expressions build.
QUERY_GROWTH_TOTAL_MAX = 4 * QUERY_GROWTH_MAX
#: Characters that a refusal's message and hint have at most, and of a text of the asker's that they quote.
REFUSAL_TEXT_CHARS_MAX = 2_000
REFUSAL_QUOTE_CHARS_MAX = 200
#: Characters of one text among a query's parameters.
QUERY_PARAM_CHARS_MAX = QUERY_SQL_CHARS_MAX

assert GATHERED_BYTES < TRANSACTION_BYTES_MAX
assert TRANSACTION_BYTES_MAX <= INGEST_BUFFER_BYTES_MAX
assert RECORD_BYTES_MAX <= DEAD_LETTER_BYTES_MAX
assert DEAD_LETTER_TRUNCATED_BYTES < DEAD_LETTER_BYTES_MAX
assert QUERY_ANSWER_BYTES_MAX < MIB  # Kafka's default message.max.bytes, with room for headers
assert QUERY_ANSWER_BYTES_MAX <= QUERY_PART_BYTES_MAX <= QUERY_GATHERED_BYTES_MAX
assert QUERY_CHUNK_BYTES_MAX < MIB
assert QUERY_REQUEST_BYTES_MAX < MIB
assert SUBSCRIPTION_EVERY_MS_MIN <= SUBSCRIPTION_EVERY_MS_DEFAULT < SUBSCRIPTION_LEASE_MS_DEFAULT
assert SUBSCRIPTION_LEASE_MS_DEFAULT <= SUBSCRIPTION_LEASE_MS_MAX
assert SUBSCRIPTIONS_PER_CALLER_MAX <= SUBSCRIPTIONS_MAX
assert QUERY_ANSWER_BYTES_MAX < SUBSCRIPTIONS_BYTES_MAX
assert REFUSAL_QUOTE_CHARS_MAX < REFUSAL_TEXT_CHARS_MAX
assert QUERY_DEADLINE_MS_DEFAULT <= QUERY_DEADLINE_MS_MAX
