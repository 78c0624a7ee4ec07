"""A ClickHouse table beside another one, which takes its place: for a rebuild of what was delivered.

The new table has a deduplication log of its own. That is the point: in the old one, the tokens of ranges that were
delivered before would make ClickHouse drop them now. Called by the rebuilding process, from a worker thread.
"""

from __future__ import annotations

from collections.abc import Collection

from schemas.clickhouse_ddl import quote
from schemas.table import TableDefinition
from streams.adapters.clickhouse_sink import ClickHouseSink
from streams.errors import RebuildRefusedError
from streams.positions import TopicPartition

_SUFFIX = "_rebuild"


class ClickHouseReplacement:
    """The replacement of one table. The sink has to wait for the answer to a copy of the whole table."""

    def __init__(self, sink: ClickHouseSink, table: TableDefinition) -> None:
        self._sink = sink
        self._table = table
        self._name = table.name + _SUFFIX

    def last_offset(self, topic_partition: TopicPartition) -> int | None:
        """Of the table as it is. See streams.ports.Sink."""
        return self._sink.last_offset(self._table, topic_partition)

    def fill(self, partitions: Collection[int], from_offset: int) -> int:
        """Makes the new table and copies what stays: how many rows. Raises RebuildRefusedError, SinkError."""
        if self._sink.is_distributed(self._table):
            raise RebuildRefusedError(
                f"table {self._table.name!r} is Distributed in ClickHouse, and only one server's can be rebuilt",
                hint="delete the rows on every shard, change the table's deduplication window to 0 and back, and set "
                "the positions of the sink's group by hand",
            )
        if self._sink.exists(self._name):
            raise RebuildRefusedError(
                f"table {self._name!r} is there, left by a rebuild that was interrupted",
                hint=f"look at it, then DROP TABLE {self._qualified(self._name)}",
            )
        old, new = self._sink.qualified(self._table), self._qualified(self._name)
        numbers = ", ".join(map(str, sorted(partitions)))
        stays = f"NOT (_partition IN ({numbers}) AND _offset >= {int(from_offset)})"
        self._sink.command(f"CREATE TABLE {new} AS {old}")
        self._sink.command(f"INSERT INTO {new} SELECT * FROM {old} WHERE {stays} SETTINGS insert_deduplicate = 0")
        final = " FINAL" if self._table.is_keyed else ""
        counts = [self._sink.count(f"{old}{final} WHERE {stays}"), self._sink.count(f"{new}{final}")]
        if not self._table.is_keyed and counts[0] != counts[1]:
            self.drop()
            raise RebuildRefusedError(
                f"{counts[1]} of {counts[0]} rows of {self._table.name!r} were copied", hint="try again"
            )
        return counts[1]

    def switch(self, kept_as: str) -> None:
        """The new table takes the place of the old one, at once, which stays under the name `kept_as`."""
        self._sink.command(f"EXCHANGE TABLES {self._sink.qualified(self._table)} AND {self._qualified(self._name)}")
        self._sink.command(f"RENAME TABLE {self._qualified(self._name)} TO {self._qualified(kept_as)}")

    def drop(self) -> None:
        """Gives up before the switch."""
        self._sink.command(f"DROP TABLE IF EXISTS {self._qualified(self._name)} SYNC")

    def _qualified(self, name: str) -> str:
        return f"{quote(self._sink.database)}.{quote(name)}"
