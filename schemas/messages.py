"""The wire protocol of queries: the request, the answer and the refusal, as models with one parser and one serialiser.

A request is a record on the query topic; each one gets exactly one reply (invariant 9): an answer or a refusal, on the
topic that it names. The models reject unknown fields, so that a misspelt option is refused instead of ignored. The
values of rows are mapped by `streams.adapters.duckdb_values`; docs/wire-protocol.md describes all of it for users of
other languages and contains the JSON Schema that `protocol_json_schema` generates.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from enum import StrEnum
from typing import Annotated, Any, Literal

import orjson
import pyarrow as pa
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    JsonValue,
    TypeAdapter,
    ValidationError,
    ValidationInfo,
    field_validator,
)

Headers = Sequence[tuple[str, bytes]]

#: The Arrow schema metadata key under which the answer without its rows travels.
ARROW_METADATA_KEY = b"pintail"
REPLY_TO_HEADER = "reply_to"
FORMAT_HEADER = "format"
STATUS_HEADER = "status"
ID_CHARS_MAX = 200
#: Of partitions' numbers in Kafka's protocol.
_PARTITION_MAX = 2**31 - 1
PARAMS_DEPTH_MAX = 200


class RefusalCode(StrEnum):
    """Why a request got no answer. Clients decide by the code; message and hint are for people."""

    NOT_A_REQUEST = "not_a_request"
    BAD_SQL = "bad_sql"
    NOT_ALLOWED = "not_allowed"
    UNKNOWN_TABLE = "unknown_table"
    UNKNOWN_COLUMN = "unknown_column"
    BAD_PARAMS = "bad_params"
    TOO_MANY_ROWS = "too_many_rows"
    TOO_MANY_BYTES = "too_many_bytes"
    DEADLINE_EXCEEDED = "deadline_exceeded"
    NOT_SERVING = "not_serving"
    WRONG_PARTITION = "wrong_partition"
    OVERLOADED = "overloaded"
    CANCELLED = "cancelled"
    LEASE_EXPIRED = "lease_expired"
    BAD_REPLY_TO = "bad_reply_to"
    INTERNAL = "internal"


class AnswerFormat(StrEnum):
    """How the rows of an answer are encoded. Refusals are always JSON."""

    JSON = "json"
    ARROW = "arrow"


class Consistency(StrEnum):
    """Which points of the partitions an answer shows."""

    PARTITION = "partition"
    SNAPSHOT = "snapshot"


class RequestError(Exception):
    """The value of a record is not a request; the message says which field and why."""


class _Message(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, json_schema_serialization_defaults_required=True)


class AnswerLimits(_Message):
    """What the asker is willing to receive; the smaller of this and the worker's settings wins."""

    rows: int | None = Field(default=None, ge=1, strict=True)
    bytes: int | None = Field(default=None, ge=1, strict=True)


_Position = Annotated[int, Field(ge=0, strict=True)]
_PartitionNumber = Annotated[int, Field(ge=0)]  # a JSON object's key, so text: lax on purpose


class QueryRequest(_Message):
    """One question."""

    id: str = Field(min_length=1, max_length=ID_CHARS_MAX, description="Chosen by the asker; the reply repeats it")
    sql: str = Field(min_length=1, description="One SELECT statement of the allowed dialect")
    params: list[JsonValue] | dict[str, JsonValue] = Field(
        default_factory=list, description="A list for ? and $1, an object for $name"
    )
    key: str | None = Field(
        default=None, description="Ask only the partition that owns this key (murmur2, as Kafka's default partitioner)"
    )
    partition: int | None = Field(
        default=None, ge=0, strict=True, description="Ask only this partition; without it and `key`, all are asked"
    )
    deadline_ms: int | None = Field(
        default=None, strict=True, description="Budget in milliseconds, counted from the record's Kafka timestamp"
    )
    caller: str | None = Field(
        default=None,
        max_length=ID_CHARS_MAX,
        description="Who asks: callers take turns; without it, the reply topic and its partition",
    )
    reply_to: str | None = Field(default=None, description="Reply topic; the record header reply_to is an alternative")
    reply_partition: int | None = Field(
        default=None, ge=0, le=_PARTITION_MAX, strict=True, description="Partition of the reply topic"
    )
    format: AnswerFormat = Field(default=AnswerFormat.JSON, description="Encoding of the answer")
    chunked: bool = Field(
        default=False, strict=True, description="A large answer may come in several records; Arrow then is in LZ4"
    )
    at_least: dict[str, dict[_PartitionNumber, _Position]] = Field(
        default_factory=dict, description="topic -> partition -> offset of a record that the answer must reflect"
    )
    consistency: Consistency = Field(
        default=Consistency.PARTITION,
        description="partition: each partition as of a point of its own; snapshot: all of one worker as of one point",
    )
    limits: AnswerLimits = Field(default_factory=AnswerLimits)
    subscribe: bool = Field(
        default=False, strict=True, description="Keep the answer up to date by pushes, until the lease runs out"
    )
    every_ms: int | None = Field(
        default=None, ge=1, strict=True, description="With `subscribe`: at most one push in this time"
    )
    lease_ms: int | None = Field(
        default=None, ge=1, strict=True, description="With `subscribe`: it ends unless it is renewed in this time"
    )

    @field_validator("subscribe")
    @classmethod
    def _is_pushed_as_json(cls, subscribe: bool, info: ValidationInfo) -> bool:
        if subscribe and (info.data.get("format") is AnswerFormat.ARROW or info.data.get("chunked")):
            raise ValueError("pushes are JSON in one record each; leave out format and chunked")
        return subscribe


class AnswerColumn(_Message):
    """A column of the result: its name and its DuckDB type. Names may repeat."""

    name: str
    type: str


class AnswerTiming(_Message):
    """Where the time went, in milliseconds."""

    queued_ms: float = Field(description="From the record's Kafka timestamp until the worker looked at it")
    waited_ms: float = Field(description="For at_least and for a free slot")
    executed_ms: float = Field(description="Guard, query, encoding")


class AnswerHead(_Message):
    """An answer without its rows: what an Arrow reply carries in its schema metadata."""

    id: str
    status: Literal["ok"] = "ok"
    columns: list[AnswerColumn]
    offsets: dict[str, dict[str, int]] = Field(
        description="topic -> partition -> next_offset: every record below it is reflected, none at or above it"
    )
    epoch: dict[str, int] = Field(description="partition -> number of the owner's assignment")
    timing: AnswerTiming


class Answer(AnswerHead):
    """An answer in JSON."""

    rows: list[list[JsonValue]]


class PushKind(StrEnum):
    """What the rows of a push are."""

    FULL = "full"
    DELTA = "delta"


class Push(Answer):
    """The answer of a subscription, or what has changed of it since the push before.

    `full`: `rows` are all rows. `delta`: `rows` are the new ones, which stand at the places `inserted` once those at
    the places `removed` are gone; see schemas.deltas."""

    sequence: int = Field(description="0, 1, 2 ...: a delta that does not follow the last push means that one was lost")
    kind: PushKind
    removed: list[int] = Field(description="Places, ascending, in the rows of the push before; of a delta")
    inserted: list[int] = Field(description="Places, ascending, in the rows as they are now; one for each of `rows`")


class Refusal(_Message):
    """No answer, and why. `retriable`: the same request may be answered later."""

    id: str | None = Field(description="The request's id; null if none could be read")
    status: Literal["refused"] = "refused"
    code: RefusalCode
    message: str
    hint: str = ""
    retriable: bool = False
    retry_after_ms: int | None = Field(default=None, description="Ask again after this long; set for overloaded")


@dataclass(frozen=True)
class RequestEnvelope:
    """What can be read from a record before it is known to be a whole request: enough to send a refusal."""

    id: str | None
    reply_to: str | None
    reply_partition: int | None
    fields: dict[str, Any]
    #: Why the value is no JSON object; empty if it is one.
    fault: str = ""

    @property
    def cancels(self) -> str | None:
        """The id of the request that this record ends, if that is what it is for."""
        wanted = self.fields.get("cancel")
        return wanted if isinstance(wanted, str) and "sql" not in self.fields else None

    @property
    def subscribes(self) -> bool:
        """Whether the record begins a subscription, or renews it."""
        return self.fields.get("subscribe") is True

    def request(self) -> QueryRequest:
        """The validated request. Raises RequestError that names every fault."""
        if self.fault:
            raise RequestError(self.fault)
        return _validated(self.fields)


def checked_request(fields: Mapping[str, Any]) -> QueryRequest:
    """The request with these fields, as an asker has them. Raises RequestError for what could not travel as JSON."""
    if fault := _json_fault("params", fields.get("params", [])):
        raise RequestError(fault)
    return _validated(fields)


def _validated(fields: Mapping[str, Any]) -> QueryRequest:
    try:
        return QueryRequest.model_validate(fields)
    except ValidationError as error:
        # Of a union, each branch has a fault of its own: one sentence says it.
        faults = [_fault(detail) for detail in error.errors() if detail["loc"][0] != "params"]
        if len(faults) < error.error_count():
            faults.append("params: must be a list or an object of JSON values")
        raise RequestError("; ".join(faults)) from None


def read_envelope(value: bytes | None, headers: Headers = ()) -> RequestEnvelope:
    """Reads a record of the query topic, whatever its value is; `RequestEnvelope.request` names what is wrong."""
    fields, fault = _read_fields(value)
    reply_to = fields.get("reply_to")
    if reply_to is None:
        named = (text for name, text in headers if name == REPLY_TO_HEADER and text)  # Kafka's headers may be null
        reply_to = next(named, b"").decode("utf-8", "replace")
    request_id, partition = fields.get("id"), fields.get("reply_partition")
    return RequestEnvelope(
        id=request_id if isinstance(request_id, str) and len(request_id) <= ID_CHARS_MAX else None,
        reply_to=reply_to if isinstance(reply_to, str) and reply_to else None,
        reply_partition=partition if type(partition) is int and 0 <= partition <= _PARTITION_MAX else None,
        fields=fields,
        fault=fault,
    )


def _read_fields(value: bytes | None) -> tuple[dict[str, Any], str]:
    """The object that a record's value holds, or why it holds none."""
    try:
        fields = orjson.loads(value or b"")
    except orjson.JSONDecodeError as error:
        return {}, f"the value is not JSON: {error}"
    return (fields, "") if isinstance(fields, dict) else ({}, "the value is JSON, but not an object")


def serialise_request(request: QueryRequest) -> bytes:
    """The value of a request's record; fields at their default are left out."""
    return orjson.dumps(request.model_dump(mode="json", exclude_defaults=True))


def serialise_cancellation(request: QueryRequest) -> bytes:
    """The value of a record that ends this request, for the partition that it was sent to."""
    return orjson.dumps(
        {"cancel": request.id, "reply_to": request.reply_to, "reply_partition": request.reply_partition}
    )


def serialise_answer(head: AnswerHead, rows_json: bytes) -> bytes:
    """The value of a JSON answer. `rows_json` is the array of rows, already encoded."""
    return orjson.dumps({**head.model_dump(mode="json"), "rows": orjson.Fragment(rows_json)})


def serialise_refusal(refusal: Refusal) -> bytes:
    """The value of a refusal."""
    return orjson.dumps(refusal.model_dump(mode="json", exclude_none=True) | {"id": refusal.id})


def serialise_arrow_answer(
    head: AnswerHead, batches: Sequence[pa.RecordBatch], schema: pa.Schema, *, compressed: bool = False
) -> bytes:
    """The value of an Arrow answer: one IPC stream, its buffers in LZ4 if `compressed`; the head is in the schema's
    metadata."""
    described = schema.with_metadata({ARROW_METADATA_KEY: orjson.dumps(head.model_dump(mode="json"))})
    sink = pa.BufferOutputStream()
    options = pa.ipc.IpcWriteOptions(compression="lz4" if compressed else None)
    with pa.ipc.new_stream(sink, described, options=options) as writer:
        for batch in batches:
            writer.write_batch(batch.replace_schema_metadata(described.metadata))
    return bytes(sink.getvalue())


@dataclass(frozen=True)
class ArrowAnswer:
    """An Arrow reply, read: the head and the rows as a table."""

    head: AnswerHead
    table: pa.Table


_JSON_REPLY: TypeAdapter[Answer | Refusal] = TypeAdapter(Annotated[Answer | Refusal, Field(discriminator="status")])


def read_reply(value: bytes, headers: Headers = ()) -> Answer | ArrowAnswer | Refusal:
    """Reads a record of a reply topic. Raises RequestError if it is none."""
    try:
        if dict(headers).get(FORMAT_HEADER) == AnswerFormat.ARROW.encode():
            table = pa.ipc.open_stream(value).read_all()
            return ArrowAnswer(AnswerHead.model_validate_json(table.schema.metadata[ARROW_METADATA_KEY]), table)
        return _JSON_REPLY.validate_json(value)
    except (ValidationError, pa.ArrowException, KeyError, TypeError) as error:
        raise RequestError(f"not a reply: {error}") from None


_JSON_PUSH: TypeAdapter[Push | Refusal] = TypeAdapter(Annotated[Push | Refusal, Field(discriminator="status")])


def read_push(value: bytes) -> Push | Refusal:
    """Reads what a subscription sends. Raises RequestError if it is none of it."""
    try:
        return _JSON_PUSH.validate_json(value)
    except ValidationError as error:
        raise RequestError(f"not a push: {error}") from None


def protocol_json_schema() -> dict[str, Any]:
    """The JSON Schemas of request, answer, refusal and push."""
    return {
        "request": QueryRequest.model_json_schema(),
        "answer": Answer.model_json_schema(mode="serialization"),
        "refusal": Refusal.model_json_schema(mode="serialization"),
        "push": Push.model_json_schema(mode="serialization"),
    }


def _fault(detail: Mapping[str, Any]) -> str:
    """One validation fault, in words for the asker."""
    path = [str(part) for part in detail["loc"]]
    field = ".".join(path)
    if detail["type"] != "extra_forbidden":
        return f"{field}: {detail['msg']}"
    model = AnswerLimits if path[0] == "limits" else QueryRequest
    known = list(model.model_fields)
    near = get_close_matches(path[-1], known, n=1)
    suggestion = f"did you mean {near[0]}? " if near else ""
    return f"{field}: no such field; {suggestion}known fields: {', '.join(known)}"


def _json_fault(path: str, value: object, depth: int = 0) -> str:
    """Why a value cannot travel as JSON, in words for the asker; empty if it can."""
    if depth > PARAMS_DEPTH_MAX:
        return f"params: nest deeper than {PARAMS_DEPTH_MAX} levels"
    if isinstance(value, list | dict):
        items = enumerate(value) if isinstance(value, list) else value.items()
        faults = (
            _json_fault(f"{path}.{name}", item, depth + 1)
            if isinstance(name, int if isinstance(value, list) else str)
            else f"{path}: the name {name!r} is not text"
            for name, item in items
        )
        return next(filter(None, faults), "")
    if value is not None and not isinstance(value, str | int | float):
        return f"{path}: a {type(value).__name__} is not a JSON value; send it as text or number, and cast it in SQL"
    try:
        written = orjson.dumps(value)
    except TypeError as error:
        return f"{path}: {error}"
    return f"{path}: {value} is not a JSON value" if written == b"null" and value is not None else ""
