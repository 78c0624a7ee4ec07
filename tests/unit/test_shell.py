"""`pintail shell`, line by line, with a client that answers from a script."""

from __future__ import annotations

import io
from collections.abc import Generator
from typing import Any

import pytest
from rich.console import Console

from streams.cli.shell import Shell, completions
from streams.client import Answer, Change
from streams.errors import QueryRefusedError, RequestTimeoutError
from tests.query_store import CATALOG
from tests.unit.test_cli_query import ANSWER


class Scripted:
    """Answers everything but what is wrong."""

    def __init__(self) -> None:
        self.asked: list[str] = []
        self.subscribed: list[tuple[str, int]] = []
        self.is_subscribed = False
        #: What a subscription ends with, after as many changes.
        self.end: tuple[int, BaseException] = (2, KeyboardInterrupt())

    def query(self, sql: str, params: Any = None) -> Answer:
        del params
        self.asked.append(sql)
        if "flihgts" in sql:
            raise QueryRefusedError("there is no table 'flihgts'", code="unknown_table", hint="did you mean flights?")
        return ANSWER

    def subscribe(self, sql: str, *, every_ms: int, deadline_ms: int) -> Generator[Change, None, None]:
        del deadline_ms
        self.subscribed.append((sql, every_ms))
        changes, end = self.end
        self.is_subscribed = True
        try:
            for _ in range(changes):
                yield Change(ANSWER, ANSWER.rows, [])
            raise end
        finally:
            self.is_subscribed = False


def run(*lines: str, client: Scripted | None = None) -> tuple[Scripted, Shell, str]:
    client, said = client or Scripted(), io.StringIO()
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


def test_watch_shows_what_a_subscription_gives_until_ctrl_c() -> None:
    client, shell, said = run("SELECT 1;", r"\watch 0.5", "SELECT 2;")
    assert client.subscribed == [("SELECT 1", 500)]
    assert said.count("as of flights") == 1 + 2 + 1
    assert client.asked == ["SELECT 1", "SELECT 2"], "nothing is asked beside the subscription"
    assert not client.is_subscribed
    assert not shell.failed


@pytest.mark.parametrize(
    "end",
    [
        QueryRefusedError("this worker serves 1 of 3 partitions", code="not_serving", retriable=True),
        RequestTimeoutError("no worker kept the subscription up to date"),
    ],
    ids=lambda end: type(end).__name__,
)
def test_watch_asks_again_and_again_where_no_subscription_is_to_be_had(
    end: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    pauses: list[float] = []

    def pause(seconds: float) -> None:
        pauses.append(seconds)
        if len(pauses) == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr("streams.cli.shell.time.sleep", pause)
    client = Scripted()
    client.end = (0, end)
    _, shell, _ = run("SELECT 1;", r"\watch", client=client)
    assert client.asked == ["SELECT 1"] * 4
    assert pauses == [2.0] * 3
    assert not shell.failed


def test_watch_ends_with_a_refusal_that_asking_again_does_not_mend() -> None:
    client = Scripted()
    client.end = (1, QueryRefusedError("subscriptions are not for you", code="not_allowed"))
    _, shell, said = run("SELECT 1;", r"\watch", client=client)
    assert "not for you" in said
    assert client.asked == ["SELECT 1"]
    assert shell.failed


@pytest.mark.parametrize("seconds", ["soon", "nan", "inf"])
def test_watch_takes_seconds(seconds: str) -> None:
    client, shell, said = run(r"\watch", "SELECT 1;", rf"\watch {seconds}")
    assert f"takes seconds, not {seconds}" in said
    assert client.subscribed == [], "nor is there anything to watch before the first statement"
    assert shell.failed


def test_tables_columns_and_keywords_complete() -> None:
    assert completions(CATALOG, "fl") == ["flights"]
    assert "carrier" in completions(CATALOG, "CAR")
    assert "SELECT" in completions(CATALOG, "sel")
