"""Questions over the query topic: the client, kcat alone, and everything that is refused (invariants 3 and 9)."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from streams.client import AsyncClient
from streams.errors import QueryRefusedError
from tests.conftest import NewTopicMaker, Servers, unique_name
from tests.system import System, running_system, settings_of
from tests.waiting import wait_for

TABLES = {
    "airlines": """
        CREATE TABLE airlines (carrier VARCHAR, name VARCHAR, PRIMARY KEY (carrier))
        WITH (topic = '{prefix}.airlines', partitions = 3)
    """
}


@pytest.fixture(scope="module")
def system(tmp_path_factory: pytest.TempPathFactory, servers: Servers) -> Iterator[System]:
    folder: Path = tmp_path_factory.mktemp("query-path")
    with running_system(folder, TABLES, **servers) as system:
        yield system


def airlines(system: System) -> str:
    return f"{system.settings.application}.airlines"


def put(system: System, carrier: str, name: str) -> dict[str, dict[int, int]]:
    value = json.dumps({"carrier": carrier, "name": name})
    position = system.publish(airlines(system), value, key=carrier)
    return {position.topic: {position.partition: position.offset}}


@pytest.mark.invariant(3, place="input")
def test_an_answer_states_columns_rows_offsets_and_epoch(system: System) -> None:
    at_least = put(system, "UA", "United Air Lines Inc.")
    answer = system.client.query("SELECT name FROM airlines WHERE carrier = ?", ["UA"], at_least=at_least)
    assert answer.rows == [("United Air Lines Inc.",)]
    assert answer.column_names == ("name",)
    ((where, offsets),) = at_least.items()
    ((partition, offset),) = offsets.items()
    assert answer.offsets[where][partition] > offset
    assert set(answer.epoch) == {0, 1, 2}
    assert all(epoch >= 1 for epoch in answer.epoch.values())


def test_each_write_is_read_by_the_question_that_names_it(system: System) -> None:
    for number in range(30):
        at_least = put(system, "RW", f"version {number}")
        answer = system.client.query("SELECT name FROM airlines WHERE carrier = 'RW'", at_least=at_least)
        assert answer.rows == [(f"version {number}",)]


def test_a_question_with_a_key_asks_the_owning_partition_only(system: System) -> None:
    at_least = put(system, "KY", "Keyed")
    ((_, offsets),) = at_least.items()
    ((partition, _),) = offsets.items()
    answer = system.client.query("SELECT carrier FROM airlines WHERE carrier = 'KY'", key="KY", at_least=at_least)
    assert answer.rows == [("KY",)]
    assert set(answer.epoch) == {partition}


REFUSED = {
    "SELEC 1": "bad_sql",
    "SELECT * FROM nowhere": "unknown_table",
    "SELECT nothing FROM airlines": "unknown_column",
    "DELETE FROM airlines": "not_allowed",
    "SELECT * FROM read_csv('/etc/passwd')": "not_allowed",
    "SELECT * FROM range(1000000)": "not_allowed",
    "SELECT ? FROM airlines": "bad_params",
}


@pytest.mark.parametrize("sql", REFUSED)
def test_a_bad_question_is_refused_with_a_code_and_a_hint(system: System, sql: str) -> None:
    with pytest.raises(QueryRefusedError) as refused:
        system.client.query(sql)
    assert refused.value.code == REFUSED[sql]
    assert refused.value.message


def test_too_many_rows_and_a_spent_deadline_are_refused(system: System) -> None:
    put(system, "A1", "one")
    at_least = put(system, "A2", "two")
    from streams.client import AnswerLimits

    with pytest.raises(QueryRefusedError) as refused:
        system.client.query("SELECT * FROM airlines", limits=AnswerLimits(rows=1), at_least=at_least)
    assert refused.value.code == "too_many_rows"
    with pytest.raises(QueryRefusedError) as refused:
        system.client.query("SELECT repeat(name, 5000) FROM airlines", limits=AnswerLimits(bytes=1024))
    assert refused.value.code in ("too_many_bytes", "not_allowed")


@pytest.mark.invariant(9, place="input")
async def test_many_questions_at_once_each_get_their_own_answer(system: System) -> None:
    async with await AsyncClient.connect(system.settings) as client:
        answers = await asyncio.gather(*[client.query(f"SELECT {number}", deadline_ms=60_000) for number in range(200)])
    assert [answer.rows for answer in answers] == [[(number,)] for number in range(200)]


def kcat(*arguments: str, stdin: str | None = None) -> str:
    """Runs kcat; it must be installed (Debian, Ubuntu: apt-get install kcat)."""
    program = shutil.which("kcat") or shutil.which("kafkacat")
    assert program, "kcat is needed: apt-get install kcat, or brew install kcat"
    return subprocess.run(
        [program, *arguments], input=stdin, text=True, capture_output=True, check=True, timeout=60
    ).stdout


def test_kcat_alone_can_write_ask_and_read_the_reply(system: System, new_topic: NewTopicMaker) -> None:
    bootstrap, replies, name = system.settings.kafka, new_topic("replies"), unique_name("kcat")
    kcat("-P", "-b", bootstrap, "-t", airlines(system), "-K", "|", stdin=f'KC|{{"carrier": "KC", "name": "{name}"}}\n')

    def ask(number: int) -> list[object] | None:
        request = {"id": f"q{number}", "sql": "SELECT name FROM airlines WHERE carrier = 'KC'", "reply_to": replies}
        kcat("-P", "-b", bootstrap, "-t", system.settings.query_topic, stdin=json.dumps(request) + "\n")
        text = kcat("-C", "-b", bootstrap, "-t", replies, "-o", "beginning", "-c", str(number), "-q")
        reply = json.loads(text.splitlines()[-1])
        assert (reply["id"], reply["status"]) == (f"q{number}", "ok")
        rows: list[object] = reply["rows"]
        return rows or None

    numbers = iter(range(1, 100))
    assert wait_for(lambda: ask(next(numbers)), "the row is visible") == [[name]]


@pytest.mark.invariant(6, 9, 10, place="input")
def test_a_record_that_is_no_request_becomes_a_dead_letter(system: System) -> None:
    system.publish(system.settings.query_topic, "what is the time?")
    letters = wait_for(lambda: list(system.dead_letters(system.settings.query_topic)), "the dead letter", seconds=30)
    ((headers, _, value),) = letters
    assert headers["pintail.reason"] == "not_a_request"
    assert value == b"what is the time?"


def test_a_reply_topic_that_would_corrupt_tables_is_refused(system: System) -> None:
    request = {"id": "bad", "sql": "SELECT 1", "reply_to": airlines(system)}
    system.publish(system.settings.query_topic, json.dumps(request))
    at_least = put(system, "BR", "after")
    answer = system.client.query("SELECT count(*) FROM airlines WHERE name IS NULL", at_least=at_least)
    assert answer.rows == [(0,)]
    assert system.client.query("SELECT 1").rows == [(1,)]


def test_a_subscription_gives_rows_as_they_change(system: System) -> None:
    put(system, "SU", "first")
    changes = system.client.subscribe(
        "SELECT name FROM airlines WHERE carrier = 'SU'", every_ms=100, at_least=put(system, "SU", "second")
    )
    assert next(changes).answer.rows == [("second",)]
    put(system, "SX", "of no interest")
    put(system, "SU", "third")
    change = next(changes)
    assert (change.answer.rows, change.added, change.removed) == ([("third",)], [("third",)], [("second",)])
    changes.close()


def test_the_command_line_prints_the_rows_of_a_subscription_until_ctrl_c(system: System) -> None:
    put(system, "CL", "first")
    sql = "SELECT name FROM airlines WHERE carrier = 'CL'"
    wait_for(lambda: system.client.query(sql).rows, "the row is visible")
    command = [sys.executable, "-m", "streams.cli.main", "query", sql, "--subscribe", "100", "--format", "json"]
    environment = {**os.environ, **settings_of(system.stack)}
    with subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as printing:
        assert printing.stdout is not None
        assert json.loads(printing.stdout.readline()) == [{"name": "first"}]
        put(system, "CX", "of no interest")
        put(system, "CL", "second")
        assert json.loads(printing.stdout.readline()) == [{"name": "second"}]
        printing.send_signal(signal.SIGINT)
        rest, complaint = printing.communicate(timeout=30)
    assert (rest, printing.returncode) == ("", 0), complaint
    assert "Traceback" not in complaint


@pytest.mark.invariant(9, place="input")
def test_a_subscription_that_nobody_renews_ends_with_a_refusal_that_says_so(
    system: System, new_topic: NewTopicMaker
) -> None:
    replies = new_topic("replies")
    request = {"id": "s", "sql": "SELECT 1", "reply_to": replies, "subscribe": True, "lease_ms": 300}
    system.publish(system.settings.query_topic, json.dumps(request), partition=0)
    text = kcat("-C", "-b", system.settings.kafka, "-t", replies, "-o", "beginning", "-c", "2", "-q")
    first, end = map(json.loads, text.splitlines())
    assert (first["kind"], first["sequence"], first["rows"]) == ("full", 0, [[1]])
    assert (end["status"], end["code"]) == ("refused", "lease_expired")
