"""An answer as tuples, dicts, Arrow, pandas and polars: the same rows with the types of the columns."""

from __future__ import annotations

from datetime import UTC, datetime
from decimal import Decimal
from typing import Any

import pandas
import polars
import pyarrow as pa
import pytest

import pintail
from schemas.messages import Answer as JsonAnswer
from schemas.messages import AnswerColumn, AnswerHead, AnswerTiming, ArrowAnswer
from streams.client import answer as answers

HEAD: dict[str, Any] = {
    "id": "1",
    "columns": [AnswerColumn(name=name, type=kind) for name, kind in (("id", "BIGINT"), ("fare", "DECIMAL(12,2)"))],
    "offsets": {"flights": {"0": 3}},
    "epoch": {"0": 1},
    "timing": AnswerTiming(queued_ms=0, waited_ms=0, executed_ms=0),
}
TABLE = pa.table(
    {"id": [1, 2], "fare": pa.array([Decimal("1.50"), None], pa.decimal128(12, 2))},
)
TYPED = pintail.Answer.of(ArrowAnswer(AnswerHead(**HEAD), TABLE.replace_schema_metadata({b"pintail": b"{}"})))
OF_JSON = pintail.Answer.of(JsonAnswer(**HEAD, rows=[[1, "1.50"], [2, None]]))


def test_rows_are_tuples_and_dicts() -> None:
    assert list(TYPED) == [(1, Decimal("1.50")), (2, None)]
    assert OF_JSON.to_dicts() == [{"id": 1, "fare": "1.50"}, {"id": 2, "fare": None}]


def test_arrow_has_the_rows_and_nothing_of_the_protocol() -> None:
    assert TYPED.to_arrow().equals(TABLE, check_metadata=True)
    assert OF_JSON.to_arrow().to_pydict() == {"id": [1, 2], "fare": ["1.50", None]}


def test_pandas_has_the_rows_in_their_types() -> None:
    frame = TYPED.to_pandas()
    assert isinstance(frame, pandas.DataFrame)
    assert list(frame.itertuples(index=False, name=None)) == [(1, Decimal("1.50")), (2, None)]
    assert OF_JSON.to_pandas()["fare"].isna().tolist() == [False, True]


def test_polars_has_the_rows_in_their_types() -> None:
    frame = TYPED.to_polars()
    assert isinstance(frame, polars.DataFrame)
    assert frame.rows() == [(1, Decimal("1.50")), (2, None)]
    assert frame.schema["fare"] == polars.Decimal(12, 2)
    assert OF_JSON.to_polars().rows() == [(1, "1.50"), (2, None)]


def test_times_keep_their_zone_in_both() -> None:
    moment = datetime(2026, 3, 1, 10, tzinfo=UTC)
    table = pa.table({"at": pa.array([moment], pa.timestamp("us", "UTC"))})
    columns = [AnswerColumn(name="at", type="TIMESTAMP WITH TIME ZONE")]
    answer = pintail.Answer.of(ArrowAnswer(AnswerHead(**{**HEAD, "columns": columns}), table))
    assert answer.to_polars().rows() == [(moment,)]
    assert answer.to_pandas()["at"][0] == moment


@pytest.mark.parametrize("name", ["pandas", "polars"])
def test_what_is_not_installed_is_named_with_the_way_to_get_it(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(_: str) -> Any:
        raise ImportError

    monkeypatch.setattr(answers, "import_module", missing)
    with pytest.raises(pintail.ConfigurationError, match=f"{name} is not installed"):
        getattr(TYPED, f"to_{name}")()
