"""How a parked record looks in its dead-letter topic.

Key and value are the record's own bytes; where it came from and why it was parked are headers, all UTF-8 text. A crash
between parking and the transaction can repeat a letter: (topic, partition, offset) tells.
"""

from __future__ import annotations

TOPIC = "pintail.topic"
PARTITION = "pintail.partition"
OFFSET = "pintail.offset"
TIMESTAMP_MS = "pintail.timestamp_ms"
REASON = "pintail.reason"
DETAIL = "pintail.detail"
#: Present, with value "true", when the value is only the start of the payload; the whole of it is at the source offset.
TRUNCATED = "pintail.truncated"
#: Present, with value "true", when the record had neither key nor value; the letter's value is empty then, because not
#: every client can write a record of nothing.
VALUE_IS_NULL = "pintail.value_is_null"


def dead_letter_headers(
    *,
    topic: str,
    partition: int,
    offset: int,
    timestamp_ms: int,
    reason: str,
    detail: str,
    truncated: bool = False,
    value_is_null: bool = False,
) -> list[tuple[str, bytes]]:
    """The headers of a dead letter."""
    headers = {
        TOPIC: topic,
        PARTITION: str(partition),
        OFFSET: str(offset),
        TIMESTAMP_MS: str(timestamp_ms),
        REASON: reason,
        DETAIL: detail,
    }
    if truncated:
        headers[TRUNCATED] = "true"
    if value_is_null:
        headers[VALUE_IS_NULL] = "true"
    return [(name, text.encode("utf-8", "replace")) for name, text in headers.items()]
