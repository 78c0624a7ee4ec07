"""How a table that ClickHouse has differs from what its definition needs: pure functions over what `system.*` says.

Deliveries are exact only into a table of the right engine, keys and partitions, with a deduplication window. A
Distributed table has to send a Kafka partition to one shard, and the table behind it is the one that is compared.
Called by clickhouse_sink, which asks and raises.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from schemas.clickhouse_ddl import (
    DEDUPLICATION_WINDOW,
    PARTITION_KEYS,
    SHARDING_KEY,
    expected_columns,
    order_by,
    quote,
    ttl,
)
from schemas.table import TableDefinition

_MERGE_TREE = re.compile(r"(?:Replicated|Shared)?MergeTree\b")
_REPLACING_MERGE_TREE = re.compile(r"(?:Replicated|Shared)?ReplacingMergeTree\(.*\b_offset\b\)")
_DISTRIBUTED = re.compile(
    r"Distributed\('?(?P<cluster>[^',]*)'?, '?(?P<database>[^',]*)'?, '?(?P<table>[^',)]*)'?(?:, (?P<key>[^,]+?))?"
    r"(?:, '[^']*')?\)(?: SETTINGS .*)?\Z"
)
#: What a table without a declared partition key may have: nothing that spreads one insert over several parts, which
#: would break "all rows or none".
_ATOMIC_PARTITION_KEYS = frozenset({"", "tuple()", "_partition", "(_partition)"})
_TTL = re.compile(r"\bTTL (.+?)(?= SETTINGS |\Z)")
_NONE = "(none)"


class Difference(NamedTuple):
    """One line of a refusal."""

    what: str
    expected: str
    found: str


@dataclass(frozen=True)
class FoundTable:
    """A table as `system.columns` and `system.tables` describe it."""

    #: Name -> type.
    columns: Mapping[str, str]
    #: Name -> codecs, of columns that have any.
    codecs: Mapping[str, str]
    #: `engine_full`
    engine: str
    sorting_key: str
    partition_key: str

    @property
    def distributed(self) -> Distributed | None:
        """What a Distributed table stands for; None for any other."""
        found = _DISTRIBUTED.match(self.engine)
        return Distributed(found["database"], found["table"], (found["key"] or "").strip()) if found else None

    @property
    def window_setting(self) -> str | None:
        """The setting of the deduplication window; None where ClickHouse always has one."""
        if self.engine.startswith("Shared"):
            return None
        replicated = "replicated" if self.engine.startswith("Replicated") else "non_replicated"
        return f"{replicated}_deduplication_window"

    @property
    def window(self) -> int | None:
        """The deduplication window that the table states; None if it states none."""
        stated = re.search(rf"\b(?<!_){self.window_setting} = (\d+)", self.engine)
        return int(stated[1]) if stated else None


class Distributed(NamedTuple):
    """The table on each shard, and what chooses the shard."""

    database: str
    table: str
    sharding_key: str


def column_differences(table: TableDefinition, found: FoundTable) -> list[Difference]:
    """Missing columns and other types. Columns that only ClickHouse has are no difference."""
    return [
        Difference(name, expected, found.columns.get(name, "(missing)"))
        for name, expected in expected_columns(table)
        if found.columns.get(name) != expected
    ]


def sharding_differences(distributed: Distributed) -> list[Difference]:
    """A Kafka partition's rows have to stay together: one insert, one shard."""
    if distributed.sharding_key == SHARDING_KEY:
        return []
    return [Difference("sharding key", SHARDING_KEY, distributed.sharding_key or _NONE)]


def storage_differences(table: TableDefinition, found: FoundTable, *, default_window: int) -> list[Difference]:
    """Of the table that holds the rows; `default_window` counts where it states none."""
    differences = _codec_differences(table, found)
    kind = found.engine.split(" ", 1)[0]
    if table.is_keyed and not _REPLACING_MERGE_TREE.match(found.engine):
        differences.append(Difference("ENGINE", "ReplacingMergeTree(_offset)", kind))
    elif not table.is_keyed and not _MERGE_TREE.match(kind):
        differences.append(Difference("ENGINE", "MergeTree", kind))
    expected_key = ", ".join(_spelled(name) for name in order_by(table))
    # ClickHouse shows a key of one column in parentheses if it was created so.
    found_key = found.sorting_key.removeprefix("(").removesuffix(")")
    if found_key != expected_key:
        differences.append(Difference("ORDER BY", expected_key, found_key or _NONE))
    partitions = PARTITION_KEYS[table.clickhouse.partition_by]
    if found.partition_key not in ({partitions} if partitions else _ATOMIC_PARTITION_KEYS):
        differences.append(Difference("PARTITION BY", partitions or _NONE, found.partition_key or _NONE))
    expires = _TTL.search(found.engine)
    found_ttl = expires[1] if expires else ""
    if found_ttl != ttl(table):
        differences.append(Difference("TTL", ttl(table) or _NONE, found_ttl or _NONE))
    window = default_window if found.window is None else found.window
    if found.window_setting and not window:
        differences.append(Difference(found.window_setting, str(DEDUPLICATION_WINDOW), str(window)))
    return differences


def as_text(differences: Sequence[Difference]) -> str:
    """As columns, with a heading."""
    rows = [Difference("", "expected", "found"), *differences]
    widths = [max(len(row[column]) for row in rows) for column in range(2)]
    return "\n".join(f"  {what:<{widths[0]}}  {expected:<{widths[1]}}  {found}" for what, expected, found in rows)


def _codec_differences(table: TableDefinition, found: FoundTable) -> list[Difference]:
    """Only where the definition names codecs; an argument that it leaves out may be anything."""
    return [
        Difference(f"CODEC of {column.name}", ", ".join(column.codec), found.codecs.get(column.name, _NONE))
        for column in table.columns
        if column.codec and not _is_codec(found.codecs.get(column.name, ""), column.codec)
    ]


def _is_codec(found: str, declared: Sequence[str]) -> bool:
    """`found` has every argument spelled out."""
    parts = re.findall(r"\w+(?:\([^)]*\))?", found)
    return len(parts) == len(declared) and all(
        shown == wanted or ("(" not in wanted and shown.partition("(")[0] == wanted)
        for shown, wanted in zip(parts, declared, strict=True)
    )


def _spelled(name: str) -> str:
    """An identifier as `system.tables.sorting_key` shows it."""
    return name if re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name) else quote(name)
