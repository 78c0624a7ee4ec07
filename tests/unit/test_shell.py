"""`pintail shell`, line by line, with a client that answers from a script."""

from __future__ import annotations

import io
from typing import Any

from rich.console import Console

from streams.cli.shell import Shell, completions
from streams.client import Answer
from streams.errors import QueryRefusedError
from tests.query_store import CATALOG
from tests.unit.test_cli_query import ANSWER


class Scripted:
    """Answers everything but what is wrong."""

    def __init__(self) -> None:
        self.asked: list[str] = []

    def query(self, sql: str, params: Any = None) -> Answer:
        del params
        self.asked.append(sql)
        if "flihgts" in sql:
            raise QueryRefusedError("there is no table 'flihgts'", code="unknown_table", hint="did you mean flights?")
        return ANSWER


def run(*lines: str) -> tuple[Scripted, Shell, str]:
    client, said = Scripted(), io.StringIO()
    shell = Shell(client, CATALOG, Console(file=said, width=200))
    shell.run(lines)
    return client, shell, said.getvalue()


def test_a_statement_may_have_several_lines_and_is_asked_at_its_end() -> None:
    client, shell, said = run("SELECT carrier,", "  count(*)", "FROM flights;", "SELECT 1")
    assert client.asked == ["SELECT carrier,\n  count(*)\nFROM flights", "SELECT 1"]
    assert "JFK" in said
    assert "round trip" in said
    assert "as of flights [0: 10, 1: 7]" in said
    assert not shell.failed


def test_a_refusal_is_said_and_the_next_statement_runs() -> None:
    client, shell, said = run("SELECT * FROM flihgts;", "SELECT 1;")
    assert len(client.asked) == 2
    assert "did you mean flights?" in said
    assert shell.failed


def test_tables_and_their_columns() -> None:
    _, _, said = run(r"\d", r"\d flights")
    assert "airlines" in said
    assert "DECIMAL(12,2)" in said.replace(", ", ",")
    assert "not null" in said
    _, shell, said = run(r"\d nothing")
    assert "tables: airlines, flights" in said
    assert shell.failed


def test_timing_can_be_turned_off_and_unknown_commands_are_named() -> None:
    _, _, said = run(r"\timing", "SELECT 1;", r"\what", r"\q", "SELECT 2;")
    assert "round trip" not in said
    assert r"there is no \what" in said


def test_a_statement_that_was_begun_can_be_dropped() -> None:
    shell = Shell(client := Scripted(), CATALOG, Console(file=io.StringIO()))
    shell.take("SELECT 1,")
    assert shell.is_within_statement
    shell.drop()
    shell.take("SELECT 2;")
    assert client.asked == ["SELECT 2"]


def test_tables_columns_and_keywords_complete() -> None:
    assert completions(CATALOG, "fl") == ["flights"]
    assert "carrier" in completions(CATALOG, "CAR")
    assert "SELECT" in completions(CATALOG, "sel")
