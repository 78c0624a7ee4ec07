"""All tables of a deployment, by name and by topic. Loaded once per process and never changed.

Partition p of every table lives in one store (D2), so all tables have the same number of partitions.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path
from types import MappingProxyType

from schemas.errors import ConfigurationError, TableFileError
from schemas.parser import ParsedTable, parse_table
from schemas.table import TableDefinition


@dataclass(frozen=True)
class Catalog:
    """The tables, in the order of their names. Topics are unique."""

    tables: tuple[TableDefinition, ...]
    by_topic: Mapping[str, TableDefinition] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        by_topic = {table.topic: table for table in self.tables}
        assert len(by_topic) == len(self.tables), "two tables share a topic"
        object.__setattr__(self, "by_topic", MappingProxyType(by_topic))

    @property
    def topics(self) -> tuple[str, ...]:
        """The tables' topics, in the order of the tables."""
        return tuple(self.by_topic)

    def by_name(self, name: str) -> TableDefinition:
        """The table of that name. Raises ConfigurationError that lists the known ones."""
        for table in self.tables:
            if table.name == name:
                return table
        known = [table.name for table in self.tables]
        near = get_close_matches(name, known, n=1)
        raise ConfigurationError(
            f"there is no table {name!r}",
            hint=(f"did you mean {near[0]!r}? " if near else "") + f"known tables: {', '.join(known) or 'none'}",
        )


def load_catalog(directory: Path) -> Catalog:
    """The catalog of a folder that holds one folder of SQL files per table. Raises TableFileError."""
    parsed = [parse_table(folder) for folder in table_folders(directory)]
    check_together(parsed)
    return Catalog(tuple(entry.table for entry in parsed))


def table_folders(directory: Path) -> list[Path]:
    """The folders of the tables, by name. Raises TableFileError if there are none."""
    folders = sorted(path for path in directory.iterdir() if _is_table_folder(path)) if directory.is_dir() else []
    if not folders:
        raise TableFileError(
            "there are no tables here",
            file=str(directory),
            hint="make a folder per table with a 001_create.sql, or set PINTAIL_TABLES_DIR to where they are",
        )
    return folders


def check_together(parsed: Iterable[ParsedTable]) -> None:
    """What only several tables can get wrong. Raises TableFileError at the later of two that disagree."""
    seen: list[ParsedTable] = []
    for entry in parsed:
        table = entry.table
        for other in (earlier.table for earlier in seen):
            if table.topic == other.topic:
                raise entry.topic_at.error(
                    f"topic {table.topic!r} already feeds table {other.name!r}",
                    hint="give each table a topic of its own: WITH (topic='...')",
                )
            if table.partitions != other.partitions:
                raise entry.partitions_at.error(
                    f"{table.partitions} partitions, but table {other.name!r} has {other.partitions}",
                    hint="give all tables the same number: partition p of every table lives in one store",
                )
        seen.append(entry)


def _is_table_folder(path: Path) -> bool:
    return path.is_dir() and not path.name.startswith((".", "__"))
