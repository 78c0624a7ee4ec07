"""Real servers on one machine, without Docker: what `pintail dev`, the demo, the load tests and the test suite run on.

Map
    stack.py           LocalStack: which processes, in which order; the stack file; start, stop, kill, restart
    processes.py       one child process: start, readiness, restart with back-off, orderly stop
    records.py         pid files, and the sweep of processes that a killed run left behind
    reaper.py          a tiny process that sweeps the moment its stack dies
    ports.py           ports that are free, or a clear word about one that is not
    kafka.py           Apache Kafka (KRaft, one node) as a process
    kafka_jars.py      Java, Maven and the jars: found, downloaded once, shared between stacks
    memory_broker.py   librdkafka's in-memory broker, for a first look without Java
    redis_server.py    a Redis-protocol server with append-only file and no eviction
    clickhouse_front.py  the ClickHouse HTTP interface over the embedded engine

Everything a stack writes is below its data folder, except the jars, which all stacks of a user share.
"""
