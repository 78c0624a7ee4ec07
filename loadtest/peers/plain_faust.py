"""`python -m loadtest.peers.plain_faust`: a Faust agent that takes up to 5,000 events at a time, orjson, DuckDB.

`take_events` instead of `take`, because rows and offsets belong in one transaction and `take` hides the offsets. DuckDB
runs beside the event loop, so that Faust fetches meanwhile. The clock runs from the first event.
"""

from __future__ import annotations

import asyncio
from typing import Any

import faust

from loadtest.peers.drain import Drained, DrainOptions, Progress, drain_options, say
from loadtest.peers.store import HandWrittenStore

_TAKE_EVENTS = 5_000
_TAKE_SECONDS = 0.5


async def drain(options: DrainOptions) -> Drained:
    """From the start of the table's topic, as a new consumer group."""
    over = asyncio.Event()
    store, progress = HandWrittenStore(options.path, options.table), Progress(options)
    app = faust.App(
        options.group,
        broker=f"kafka://{options.kafka}",
        store="memory://",
        datadir=str(options.path.with_suffix(".faust")),
        web_enabled=False,
        topic_disable_leader=True,
        topic_allow_declare=False,
        stream_buffer_maxsize=2 * _TAKE_EVENTS,
        consumer_max_fetch_size=4 * 1024 * 1024,
    )
    topic = app.topic(options.table.topic, key_type=bytes, value_type=bytes, value_serializer="raw")

    @app.agent(topic)  # type: ignore[untyped-decorator]
    async def write(stream: Any) -> None:
        stream.add_processor(first_seen)
        async for events in stream.take_events(_TAKE_EVENTS, within=_TAKE_SECONDS):
            if not progress.is_over:
                await asyncio.to_thread(apply, events)
                progress.applied(len(events))
            if progress.is_over:
                over.set()

    def first_seen(value: bytes) -> bytes:
        progress.start()
        return value

    def apply(events: list[Any]) -> None:
        messages = [event.message for event in events]
        rows = [
            store.row(
                message.value,
                partition=message.partition,
                offset=message.offset,
                timestamp_ms=round(message.timestamp * 1000),
            )
            for message in messages
        ]
        store.apply(rows, {message.partition: message.offset + 1 for message in messages})

    await app.start()
    await over.wait()
    await app.stop()
    store.close()
    return progress.report()


if __name__ == "__main__":
    say(asyncio.run(drain(drain_options())))
