"""The Faust side: a batched transport driver and the agents that hand batches to the engine.

Map
    transport.py        Faust transport driver: one fetched partition batch is one event
    fetched_batches.py  what a consumer has fetched, as batches, and the bound on the bytes that wait
    log_consumer.py     a consumer outside the group: for standbys
    group_watch.py      ends a worker that has silently dropped out of its group
    assignor.py         partition p of every topic goes to one member; what members tell their group
    placement.py        which member owns a partition, and which ones keep a warm copy
    app.py              what both workers share: the Faust app and its status pages
    memory.py           when a worker looks for garbage, and gives freed memory back
    store_files.py      opens the store's files while the rest of the worker is loaded
    store_app.py        write, query and snapshot agents of the store worker
    query_requests.py   from where requests are read, and their way to an answer
    open_requests.py    where to go on with the query topic after a crash
    sink_app.py         the sink agent
    __main__.py         `python -m agents store|sink`: one worker process

Imports streams/ and schemas/; nobody imports agents/.
"""
