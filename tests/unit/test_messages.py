"""The wire protocol: what is written can be read, and what is wrong is named."""

from __future__ import annotations

import json
import re
from datetime import date
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from schemas.messages import (
    Answer,
    AnswerColumn,
    AnswerHead,
    AnswerTiming,
    ArrowAnswer,
    QueryRequest,
    Refusal,
    RefusalCode,
    RequestError,
    checked_request,
    protocol_json_schema,
    read_envelope,
    read_reply,
    serialise_answer,
    serialise_arrow_answer,
    serialise_refusal,
    serialise_request,
)
from streams.adapters.kafka_partitioner import partition_of

NESTED: list[Any] = []
NESTED.append(NESTED)
HEAD = AnswerHead(
    id="q1",
    columns=[AnswerColumn(name="a", type="BIGINT")],
    offsets={"flights": {"0": 3}},
    epoch={"0": 1},
    timing=AnswerTiming(queued_ms=1, waited_ms=0, executed_ms=2),
)


def test_a_request_survives_the_wire() -> None:
    request = QueryRequest.model_validate(
        {
            "id": "1",
            "sql": "SELECT $a",
            "params": {"a": [1, None, {"x": "ü"}]},
            "key": "k",
            "partition": 2,
            "deadline_ms": 5,
            "reply_to": "replies",
            "reply_partition": 3,
            "format": "arrow",
            "at_least": {"flights": {"0": 9}},
            "limits": {"rows": 7},
        }
    )
    assert read_envelope(serialise_request(request)).request() == request


def test_a_minimal_request_is_small() -> None:
    assert serialise_request(QueryRequest(id="1", sql="SELECT 1")) == b'{"id":"1","sql":"SELECT 1"}'


def test_answers_and_refusals_survive_the_wire() -> None:
    answer = read_reply(serialise_answer(HEAD, b'[[1],["x"]]'))
    assert isinstance(answer, Answer)
    assert (answer.rows, answer.offsets) == ([[1], ["x"]], HEAD.offsets)

    refusal = Refusal(id=None, code=RefusalCode.OVERLOADED, message="m", hint="h", retriable=True, retry_after_ms=5)
    assert read_reply(serialise_refusal(refusal)) == refusal

    table = pa.table({"a": [1, 2]})
    arrow = read_reply(serialise_arrow_answer(HEAD, table.to_batches(), table.schema), [("format", b"arrow")])
    assert isinstance(arrow, ArrowAnswer)
    assert arrow.head == HEAD
    assert arrow.table.to_pydict() == {"a": [1, 2]}


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        (b'{"sql": "SELECT 1"}', ["id"]),
        (b'{"id": "", "sql": ""}', ["id", "sql"]),
        (b'{"id": "1", "sql": "x", "dedline_ms": 1}', ["did you mean deadline_ms?", "known fields: id, sql, params"]),
        (b'{"id": "1", "sql": "x", "format": "xml"}', ["'json' or 'arrow'"]),
        (b'{"id": "1", "sql": "x", "at_least": {"t": {"-1": 3}}}', ["at_least.t.-1"]),
        (b'{"id": "1", "sql": "x", "at_least": {"t": {"0": "3"}}}', ["at_least.t.0"]),
        (b'{"id": "1", "sql": "x", "limits": {"rows": 0}}', ["limits.rows"]),
        (b'{"id": "1", "sql": "x", "limits": {"rws": 1}}', ["did you mean rows?"]),
        (b'{"id": "1", "sql": "x", "deadline_ms": 1.5}', ["deadline_ms"]),
    ],
)
def test_every_fault_of_a_request_is_named(fields: bytes, words: list[str]) -> None:
    with pytest.raises(RequestError) as caught:
        read_envelope(fields).request()
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize(
    ("value", "words"),
    [(None, "not JSON"), (b"", "not JSON"), (b"SELECT 1", "not JSON"), (b"[1]", "not an object")],
)
def test_a_value_that_is_no_object_keeps_the_reply_topic_of_its_header(value: bytes | None, words: str) -> None:
    envelope = read_envelope(value, [("reply_to", None), ("reply_to", b"replies")])  # type: ignore[list-item]
    assert (envelope.id, envelope.reply_to, envelope.reply_partition) == (None, "replies", None)
    with pytest.raises(RequestError, match=words):
        envelope.request()


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"sql": ""}, "sql: String should have at least 1 character"),
        ({"params": [date(2026, 1, 1)]}, "params.0: a date is not a JSON value"),
        ({"params": {"a": {"b": [1, b"x"]}}}, "params.a.b.1: a bytes is not a JSON value"),
        ({"params": {1: 2}}, "the name 1 is not text"),
        ({"params": [float("nan")]}, "params.0: nan is not a JSON value"),
        ({"params": [1 << 70]}, "params.0: Integer exceeds 64-bit range"),
        ({"params": ["\udc80"]}, "params.0: str is not valid UTF-8"),
        ({"params": NESTED}, "nest deeper"),
        ({"format": "xml"}, "format: Input should be 'json' or 'arrow'"),
        ({"at_least": {"t": {0: -1}}}, "at_least.t.0"),
    ],
)
def test_what_cannot_travel_is_named_before_it_is_sent(fields: dict[str, Any], words: str) -> None:
    with pytest.raises(RequestError) as caught:
        checked_request({"id": "1", "sql": "SELECT 1", **fields})
    assert words in str(caught.value)
    assert "json-or-python" not in str(caught.value)


@pytest.mark.parametrize("value", [b"", b"{}", b'{"status": "ok"}', b'{"status": "maybe"}', b"\xff"])
def test_garbage_on_a_reply_topic_is_no_reply(value: bytes) -> None:
    for headers in ([], [("format", b"arrow")]):
        with pytest.raises(RequestError):
            read_reply(value, headers)


def test_the_json_schema_knows_every_field() -> None:
    schema = protocol_json_schema()
    assert set(schema["request"]["properties"]) == set(QueryRequest.model_fields)
    assert schema["request"]["additionalProperties"] is False
    assert set(schema["answer"]["required"]) == set(Answer.model_fields)
    assert "retry_after_ms" in schema["refusal"]["properties"]


@pytest.mark.parametrize(
    ("key", "murmur2"),
    [
        ("21", -973932308),
        ("foobar", -790332482),
        ("a-little-bit-long-string", -985981536),
        ("a-little-bit-longer-string", -1486304829),
        ("abc", 479470107),
    ],
)
def test_keys_are_owned_as_in_kafka(key: str, murmur2: int) -> None:
    """The values are those of Kafka's own tests of its hash."""
    for partitions in (1, 4, 7, 1 << 31):
        assert partition_of(key.encode(), partitions) == (murmur2 & 0x7FFFFFFF) % partitions


def test_the_documentation_holds_the_schemas_the_codes_and_the_fields() -> None:
    text = (Path(__file__).resolve().parents[2] / "docs" / "wire-protocol.md").read_text()
    documented = [json.loads(block) for block in re.findall(r"```json\n(\{\n.*?\n\})\n```", text, re.DOTALL)]
    assert documented == list(protocol_json_schema().values()), "regenerate the JSON Schemas in docs/wire-protocol.md"
    for word in (*RefusalCode, *QueryRequest.model_fields):
        assert f"`{word}`" in text
