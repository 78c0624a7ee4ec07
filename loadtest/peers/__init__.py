"""What Pintail is measured against, each peer written as a competent user of it would, each in a process of its own.

Map
    store.py        one DuckDB file: rows and offsets in one transaction; what every peer writes to
    drain.py        the command line that peers share, and what they report
    raw.py          an aiokafka `getmany` loop
    plain_faust.py  a Faust agent over `take_events`
    quix.py         Quix Streams with a BatchingSink, in a virtual environment of its own (quix-requirements.txt)
    ceiling.py      Pintail's decoder and store on batches in memory: no Kafka, no Faust
    sink_insert.py  the CPU of one row into ClickHouse: Pintail's insert, and insert() of clickhouse-connect

Peers check nothing, park nothing, snapshot nothing and answer nothing. The last line of their output is a JSON object.
"""
