"""What a client gets for a query: rows, and the position of the tables that they reflect."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any

import pyarrow as pa

from schemas.errors import ConfigurationError
from schemas.messages import Answer as JsonAnswer
from schemas.messages import AnswerColumn, AnswerTiming, ArrowAnswer


@dataclass(frozen=True)
class Answer:
    """The rows of an answer. With format="arrow" they are typed Python values; with "json", the values of JSON."""

    columns: tuple[AnswerColumn, ...]
    rows: Sequence[tuple[Any, ...]]
    #: topic -> partition -> next_offset: every record below it is reflected, none at or above it.
    offsets: dict[str, dict[int, int]]
    #: partition -> number of the assignment under which its owner answered.
    epoch: dict[int, int]
    timing: AnswerTiming
    _table: pa.Table | None = field(default=None, repr=False)

    @classmethod
    def of(cls, reply: JsonAnswer | ArrowAnswer) -> Answer:
        """From a reply as it came over the wire."""
        head = reply.head if isinstance(reply, ArrowAnswer) else reply
        table = reply.table if isinstance(reply, ArrowAnswer) else None
        return cls(
            columns=tuple(head.columns),
            rows=_rows_of(reply.table) if isinstance(reply, ArrowAnswer) else [tuple(row) for row in reply.rows],
            offsets={
                topic: {int(partition): offset for partition, offset in partitions.items()}
                for topic, partitions in head.offsets.items()
            },
            epoch={int(partition): epoch for partition, epoch in head.epoch.items()},
            timing=head.timing,
            _table=table,
        )

    def __len__(self) -> int:
        return len(self.rows)

    def __iter__(self) -> Iterator[tuple[Any, ...]]:
        return iter(self.rows)

    @property
    def column_names(self) -> tuple[str, ...]:
        """In the order of the query; names may repeat."""
        return tuple(column.name for column in self.columns)

    def to_dicts(self) -> list[dict[str, Any]]:
        """One dictionary a row; of columns that share a name, the last one stays."""
        return [dict(zip(self.column_names, row, strict=True)) for row in self.rows]

    def to_arrow(self) -> pa.Table:
        """A table; exact for format="arrow", with types inferred from the JSON values otherwise."""
        if self._table is not None:
            return self._table.replace_schema_metadata(None)
        columns = zip(*self.rows, strict=True) if self.rows else [() for _ in self.columns]
        return pa.Table.from_arrays([pa.array(values) for values in columns], names=list(self.column_names))

    def to_pandas(self) -> Any:
        """A pandas DataFrame. Raises ConfigurationError if pandas is not installed."""
        _installed("pandas")
        return self.to_arrow().to_pandas()

    def to_polars(self) -> Any:
        """A polars DataFrame. Raises ConfigurationError if polars is not installed."""
        return _installed("polars").from_arrow(self.to_arrow())


def _installed(name: str) -> Any:
    """A library that only those need who ask for its tables."""
    try:
        return import_module(name)
    except ImportError:
        raise ConfigurationError(f"{name} is not installed", hint="pip install 'pintail[frames]'") from None


def _rows_of(table: pa.Table) -> list[tuple[Any, ...]]:
    if table.num_columns == 0:
        return []
    return list(zip(*(column.to_pylist() for column in table.columns), strict=True))
