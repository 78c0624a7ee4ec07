"""WITH (...) of a table: topic, partitions, retention, format, extra fields. Called by the parser.

All are optional: the topic is the table's name, partitions are 4, rows are kept for ever, the format is JSON, and
fields that are no column are ignored.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from enum import StrEnum
from typing import TypeVar

from schemas.sql_tokens import Kind, Position, Token, TokenReader
from schemas.table import ExtraFields, RecordFormat

PARTITIONS_DEFAULT = 4
PARTITIONS_MAX = 1024
#: Kafka allows 249 characters; the dead-letter topic's suffix needs some of them.
TOPIC_CHARS_MAX = 230
#: Beyond this, keeping rows for ever is meant.
RETENTION_DAYS_MAX = 36_500

_UNIT_SECONDS = {"second": 1, "minute": 60, "hour": 3_600, "day": 86_400, "week": 604_800}
_CLICKHOUSE = ("clickhouse_order_by", "clickhouse_partition_by", "clickhouse_retention")
_KNOWN = ("topic", "partitions", "retention", "format", "extra_fields", "extra_column", *_CLICKHOUSE)
_HINT = "write WITH (topic='flights', partitions=4, retention='30 days', format='json')"

Choice = TypeVar("Choice", bound=StrEnum)


@dataclass(frozen=True)
class Options:
    """The options of one table; the places are those of the table's name where an option is left out."""

    topic: str
    topic_at: Position
    partitions: int
    partitions_at: Position
    retention_seconds: int | None
    format: RecordFormat
    extra_fields: ExtraFields
    extra_column: str | None
    extra_column_at: Position
    #: Options about ClickHouse's copy, by name; see schemas.clickhouse_options.
    clickhouse: Mapping[str, Token]


def parse_options(reader: TokenReader, table_name: str, name_at: Position) -> Options:
    """Reads WITH (...) if it comes next. Raises TableFileError."""
    given = _parse_assignments(reader) if reader.accept("WITH") else {}
    topic, partitions, retention = (given.get(name) for name in ("topic", "partitions", "retention"))
    extra_fields = _choice(given.get("extra_fields"), ExtraFields.IGNORE, "extra_fields")
    extra_column = given.get("extra_column")
    _check_extra(given.get("extra_fields"), extra_fields, extra_column)
    return Options(
        topic=_topic(topic) if topic else table_name,
        topic_at=topic.at if topic else name_at,
        partitions=_partitions(partitions) if partitions else PARTITIONS_DEFAULT,
        partitions_at=partitions.at if partitions else name_at,
        retention_seconds=parse_retention(retention) if retention else None,
        format=_choice(given.get("format"), RecordFormat.JSON, "format"),
        extra_fields=extra_fields,
        extra_column=extra_column.text if extra_column else None,
        extra_column_at=extra_column.at if extra_column else name_at,
        clickhouse={name: given[name] for name in _CLICKHOUSE if name in given},
    )


def _parse_assignments(reader: TokenReader) -> dict[str, Token]:
    reader.expect("(", hint=_HINT)
    given: dict[str, Token] = {}
    while not given or reader.accept(","):
        name = reader.take()
        if name.kind not in (Kind.WORD, Kind.QUOTED, Kind.STRING):
            raise name.at.error(f"expected an option, found {name}", hint=_HINT)
        if name.text.lower() not in _KNOWN:
            near = get_close_matches(name.text.lower(), _KNOWN, n=1)
            raise name.at.error(
                f"there is no option {name}",
                hint=(f"did you mean {near[0]}? " if near else "") + f"options: {', '.join(_KNOWN)}",
            )
        reader.expect("=", hint=_HINT)
        value = reader.take()
        if value.kind not in (Kind.STRING, Kind.NUMBER):
            raise value.at.error(f"expected a value in single quotes or a number, found {value}", hint=_HINT)
        if given.setdefault(name.text.lower(), value) is not value:
            raise name.at.error(f"option {name} is there already", hint="remove one")
    reader.expect(")", hint=_HINT)
    return given


def _choice(value: Token | None, default: Choice, name: str) -> Choice:
    """The choice that the option makes among the values of its enumeration."""
    if value is None:
        return default
    choices = type(default)
    if value.text not in [each.value for each in choices]:
        raise value.at.error(
            f"{name} {value} is not known", hint="write " + " or ".join(f"{name}='{each}'" for each in choices)
        )
    return choices(value.text)


def _check_extra(given: Token | None, extra_fields: ExtraFields, extra_column: Token | None) -> None:
    if given is not None and extra_fields is ExtraFields.KEEP and extra_column is None:
        raise given.at.error(
            "extra fields are to be kept, but not where",
            hint="declare a column of type JSON for them and name it: extra_column='extra'",
        )
    if extra_column is not None and extra_fields is not ExtraFields.KEEP:
        raise extra_column.at.error(
            f"column {extra_column} for extra fields, which are not kept", hint="write extra_fields='keep' as well"
        )


def _topic(value: Token) -> str:
    topic = value.text
    if not re.fullmatch(rf"[A-Za-z0-9._-]{{1,{TOPIC_CHARS_MAX}}}", topic) or topic in (".", ".."):
        raise value.at.error(
            f"{value} cannot be a topic",
            hint=f"use letters, digits, '.', '_' and '-', at most {TOPIC_CHARS_MAX} of them",
        )
    if topic.endswith(".dead-letters"):
        raise value.at.error(f"{value} is the name of a dead-letter topic", hint="end the topic's name differently")
    return topic


def _partitions(value: Token) -> int:
    if not re.fullmatch(r"[0-9]{1,4}", value.text) or not 1 <= int(value.text) <= PARTITIONS_MAX:
        raise value.at.error(
            f"partitions={value.text} is not a whole number from 1 to {PARTITIONS_MAX}", hint="write partitions=4"
        )
    return int(value.text)


def parse_retention(value: Token) -> int:
    """Seconds of '30 days'. Raises TableFileError."""
    match = re.fullmatch(r"([0-9]{1,12}) ?(second|minute|hour|day|week)s?", value.text.strip().lower())
    seconds = int(match[1]) * _UNIT_SECONDS[match[2]] if match else 0
    if not 0 < seconds <= RETENTION_DAYS_MAX * 86_400:
        raise value.at.error(
            f"{value} is not a retention",
            hint="write a number above 0 and seconds, minutes, hours, days or weeks, such as '30 days'; "
            "leave retention out to keep rows for ever",
        )
    return seconds


def format_retention(seconds: int) -> str:
    """Seconds as `retention` spells them, in the largest unit that divides them: 2592000 -> 30 days."""
    for unit in ("day", "hour", "minute", "second"):
        count, rest = divmod(seconds, _UNIT_SECONDS[unit])
        if not rest:
            break
    return f"{count} {unit}{'' if count == 1 else 's'}"
