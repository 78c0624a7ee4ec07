"""`pintail query`: how parameters are read and how answers are printed."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from pathlib import Path

import orjson
import pyarrow as pa
import pytest

from schemas.messages import Answer as JsonAnswer
from schemas.messages import AnswerColumn, AnswerTiming
from streams.cli.main import main
from streams.cli.query import _ENCODERS, OutputFormat, _write, footer, parse_params
from streams.client import Answer
from streams.errors import ConfigurationError

ANSWER = Answer.of(
    JsonAnswer(
        id="1",
        columns=[
            AnswerColumn(name="carrier", type="VARCHAR"),
            AnswerColumn(name="n", type="BIGINT"),
            AnswerColumn(name="stops", type="VARCHAR[]"),
        ],
        rows=[["AA", 14, ["JFK"]], [None, 2, None], ["[bold]x", 0, []]],
        offsets={"flights": {"1": 7, "0": 10}},
        epoch={"0": 1, "1": 1},
        timing=AnswerTiming(queued_ms=1, waited_ms=0.25, executed_ms=2),
    )
)


def encoded(output_format: OutputFormat) -> bytes:
    return _ENCODERS[output_format](ANSWER)


@pytest.mark.parametrize(
    ("texts", "params"),
    [
        ([], []),
        (
            ["5", "AA", "1.5", "null", "true", '"5"', "[1, 2]", "2026-01-01"],
            [5, "AA", 1.5, None, True, "5", [1, 2], "2026-01-01"],
        ),
        (["carrier=AA", "n=5", "text=a=b"], {"carrier": "AA", "n": 5, "text": "a=b"}),
        (['"a=b"'], ["a=b"]),
    ],
)
def test_params_are_json_where_they_parse_and_text_otherwise(texts: list[str], params: object) -> None:
    assert parse_params(texts) == params


def test_named_and_positional_params_do_not_mix() -> None:
    with pytest.raises(ConfigurationError, match="mixes"):
        parse_params(["a=1", "2"])


def test_json_is_an_array_of_objects() -> None:
    assert orjson.loads(encoded(OutputFormat.JSON))[:2] == [
        {"carrier": "AA", "n": 14, "stops": ["JFK"]},
        {"carrier": None, "n": 2, "stops": None},
    ]


def test_csv_has_a_header_and_empty_cells_for_null() -> None:
    assert encoded(OutputFormat.CSV).decode().splitlines() == [
        "carrier,n,stops",
        'AA,14,"[""JFK""]"',
        ",2,",
        "[bold]x,0,[]",
    ]


def test_arrow_is_an_ipc_stream() -> None:
    table = pa.ipc.open_stream(io.BytesIO(encoded(OutputFormat.ARROW))).read_all()
    assert table.column("n").to_pylist() == [14, 2, 0]


def test_a_table_shows_null_and_takes_no_value_for_markup() -> None:
    text = encoded(OutputFormat.TABLE).decode()
    assert "NULL" in text
    assert "[bold]x" in text
    assert '["JFK"]' in text


def test_the_footer_states_rows_time_and_positions() -> None:
    assert footer(ANSWER) == "3 rows · 3.2 ms · as of flights [0: 10, 1: 7]"


@pytest.mark.parametrize(
    ("output", "words"), [("missing/rows.csv", "there is no folder"), (".", "it is a folder"), ("file/x", "no folder")]
)
def test_an_output_that_cannot_be_written_is_refused_before_the_query_is_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], output: str, words: str
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PINTAIL_KAFKA", "127.0.0.1:1")  # asking would end in an error of its own
    monkeypatch.setattr(sys, "argv", ["pintail", "query", "SELECT 1", "-f", "csv", "-o", output])
    with pytest.raises(SystemExit, match="1"):
        main()
    said = capsys.readouterr().err
    assert words in said
    assert "what to do: give --output" in said


def test_an_output_that_fails_while_it_is_written_is_one_clear_error() -> None:
    with pytest.raises(ConfigurationError, match="/dev/full: No space left"):
        _write(Path("/dev/full"), b"rows")


def test_a_broker_that_is_away_is_said_once(tmp_path: Path) -> None:
    """Without the noise that the Kafka client logs before it gives up."""
    asked = subprocess.run(
        [sys.executable, "-m", "streams.cli.main", "query", "SELECT 1"],
        cwd=tmp_path,
        env={**os.environ, "PINTAIL_KAFKA": "127.0.0.1:1", "PYTHONPATH": str(Path(__file__).resolve().parents[2])},
        capture_output=True,
        text=True,
        check=False,
    )
    first, second = asked.stderr.splitlines()
    assert first.startswith("pintail: Kafka at 127.0.0.1:1")
    assert "PINTAIL_KAFKA" in second
    assert asked.returncode == 1
