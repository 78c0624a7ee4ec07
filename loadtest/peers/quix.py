"""`python -m loadtest.peers.quix`: Quix Streams with a BatchingSink that writes DuckDB files; a transaction per batch.

Runs in a virtual environment of its own (quix-requirements.txt), so that Quix Streams does not constrain Pintail's
lock; it needs `schemas`, `loadtest.peers` and `loadtest.fingerprints` on its path and no other module of Pintail.
"""

from __future__ import annotations

from typing import Any

from quixstreams import Application
from quixstreams.sinks.base import BatchingSink, SinkBatch

from loadtest.peers.drain import Drained, DrainOptions, Progress, drain_options, say
from loadtest.peers.store import HandWrittenStore

#: Records between two checkpoints: large enough for DuckDB, small enough for a bounded memory.
_COMMIT_EVERY = 40_000
_LOOK_EVERY = 1_000


class DuckDBSink(BatchingSink):  # type: ignore[misc]
    """Writes each partition's batch with its next offset."""

    def __init__(self, store: HandWrittenStore, progress: Progress) -> None:
        super().__init__()
        self.added = 0
        self._store = store
        self._progress = progress

    def setup(self) -> None:
        """Nothing to connect to."""

    def add(self, *arguments: Any, **named: Any) -> None:
        """See BatchingSink; the first record starts the clock."""
        self._progress.start()
        self.added += 1
        super().add(*arguments, **named)

    def write(self, batch: SinkBatch) -> None:
        """One transaction."""
        rows = [
            self._store.row_of(item.value, partition=batch.partition, offset=item.offset, timestamp_ms=item.timestamp)
            for item in batch
        ]
        self._store.apply(rows, {batch.partition: rows[-1]["_offset"] + 1})
        self._progress.applied(len(rows))


def drain(options: DrainOptions) -> Drained:
    """From the start of the table's topic, as a new consumer group."""
    store, progress = HandWrittenStore(options.path, options.table), Progress(options)
    sink = DuckDBSink(store, progress)

    def stop_in_time(*_: object) -> None:
        if sink.added >= options.events or (sink.added % _LOOK_EVERY == 0 and progress.is_over):
            application.stop()  # what the sink holds is written on the way out

    application = Application(
        broker_address=options.kafka,
        consumer_group=options.group,
        auto_offset_reset="earliest",
        commit_every=_COMMIT_EVERY,
        state_dir=options.path.with_suffix(".state"),
        auto_create_topics=False,
        use_changelog_topics=False,
        loglevel="WARNING",
        on_message_processed=stop_in_time,
    )
    topic = application.topic(options.table.topic, value_deserializer="json")
    application.dataframe(topic).sink(sink)
    application.run()
    store.close()
    return progress.report()


if __name__ == "__main__":
    say(drain(drain_options()))
