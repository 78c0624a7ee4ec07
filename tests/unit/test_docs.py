"""The documentation keeps up with the code: what exists is documented, and what is documented exists."""

from __future__ import annotations

import json
import re
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer
from prometheus_client import Counter, Gauge, Histogram

from schemas import dead_letters
from schemas.messages import QueryRequest, RefusalCode, checked_request
from schemas.parser import parse_table
from schemas.table import ScalarKind
from streams import telemetry
from streams.cli.main import app
from streams.config import Settings
from streams.ports import ParkReason
from streams.processes.delivery import DeliveryState
from streams.processes.hosting import PartitionState
from tests.configuration_page import PAGE, page

ROOT = Path(__file__).resolve().parents[2]
README = ROOT / "README.md"
RECORDS = sorted((ROOT / "docs" / "adr").glob("*.md"))
PAGES = [README, ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md")), *RECORDS]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]

FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")


def commands() -> Iterator[tuple[str, ...]]:
    """Every command, such as ("tables", "show"); groups as well."""

    def below(command: Any, path: tuple[str, ...]) -> Iterator[tuple[str, ...]]:
        for name, child in getattr(command, "commands", {}).items():
            yield (*path, name)
            yield from below(child, (*path, name))

    yield from below(typer.main.get_command(app), ())


COMMANDS = sorted(commands())
CODE = "\n".join(block for each in PAGES for _, block in FENCE.findall(each.read_text()))
PROSE = "\n".join(each.read_text() for each in PAGES)


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_every_command_is_documented(command: tuple[str, ...]) -> None:
    # `pintail snapshots list` and `verify` name the second one by itself.
    spelled = rf"`{command[-1]}`" if len(command) > 1 else r"(?!)"
    assert re.search(rf"\bpintail {' '.join(command)}\b|{spelled}", README.read_text())


def test_every_documented_command_exists() -> None:
    groups = {path[0] for path in COMMANDS if len(path) > 1}
    documented = re.findall(r"(?:^|`)pintail ([a-z]+)(?: ([a-z]+)\b)?", f"{PROSE}\n{CODE}", re.MULTILINE)
    assert len(documented) > 10
    for first, second in documented:
        assert (first,) in COMMANDS, f"pintail {first}"
        if first in groups and second:
            assert (first, second) in COMMANDS, f"pintail {first} {second}"


def test_every_documented_option_of_dev_and_query_exists() -> None:
    root: Any = typer.main.get_command(app)
    for name in ("dev", "query"):
        known = {option for parameter in root.commands[name].params for option in parameter.opts}
        assert known
        for line in re.findall(rf"pintail {name} .*", PROSE):
            assert set(re.findall(r"(?<=\s)--[a-z-]+", line.partition("`")[0])) <= known, line


def test_every_verb_of_the_makefile_is_documented() -> None:
    verbs = re.findall(r"^([a-z-]+):.*## ", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert set(re.findall(r"^make ([a-z-]+)", CODE, re.MULTILINE)) >= set(verbs) - {"help"}


def test_the_page_of_settings_is_what_the_settings_say() -> None:
    assert PAGE.read_text() == page(), "run: python -m tests.configuration_page"


@pytest.mark.parametrize("name", Settings.model_fields)
def test_every_setting_says_what_it_means(name: str) -> None:
    assert Settings.model_fields[name].description


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_every_relative_link_resolves(path: Path) -> None:
    for target in LINK.findall(FENCE.sub("", path.read_text())):
        if re.match(r"[a-z]+:", target):
            continue
        file, _, anchor = target.partition("#")
        pointed_at = (path.parent / file).resolve() if file else path
        assert pointed_at.exists(), target
        assert not anchor or anchor in anchors(pointed_at), target


def anchors(path: Path) -> set[str]:
    """The anchors of a page's headings, as they are shown on the web."""
    headings = re.findall(r"^#+ (.+)$", FENCE.sub("", path.read_text()), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_the_version_is_that_of_the_newest_entry_of_the_changelog() -> None:
    entries = re.findall(r"^## \[(.+?)\] - \d{4}-\d\d-\d\d$", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert entries[0] == PROJECT["version"]


@pytest.mark.parametrize("group", ["dependencies", *PROJECT["optional-dependencies"]])
def test_every_dependency_has_its_reason(group: str) -> None:
    requirements = PROJECT["optional-dependencies"].get(group) or PROJECT[group]
    record = (ROOT / "docs" / "adr" / "0014-dependencies.md").read_text()
    names = [re.split(r"[<>=!~\[; ]", requirement)[0] for requirement in requirements]
    assert [name for name in names if f"`{name}`" not in record] == []


def test_no_reason_outlives_its_dependency() -> None:
    groups = (PROJECT["dependencies"], *PROJECT["optional-dependencies"].values())
    names = {re.split(r"[<>=!~\[; ]", requirement)[0] for group in groups for requirement in group}
    record = (ROOT / "docs" / "adr" / "0014-dependencies.md").read_text()
    assert set(re.findall(r"^\| `([\w-]+)` \|", record, re.MULTILINE)) <= names


def test_the_decision_records_are_numbered_and_listed() -> None:
    assert [int(path.name[:4]) for path in RECORDS] == list(range(1, len(RECORDS) + 1))
    index = (ROOT / "docs" / "architecture.md").read_text().partition("## Decision records")[2]
    for path in RECORDS:
        number, _, title = path.read_text().splitlines()[0].removeprefix("# ").partition(". ")
        assert int(number) == int(path.name[:4])
        assert f"[{number}. {title}](adr/{path.name})" in index


@pytest.mark.parametrize("path", RECORDS, ids=lambda path: path.name)
def test_a_decision_record_has_its_four_parts(path: Path) -> None:
    parts = re.findall(r"^## (.+)$", path.read_text(), re.MULTILINE)
    assert parts == ["Context", "Decision", "Consequences", "Measured"]


def test_the_tables_of_the_readme_can_be_used(tmp_path: Path) -> None:
    statements = [block for language, block in FENCE.findall(README.read_text()) if language == "sql"]
    folder = tmp_path / "orders"
    folder.mkdir()
    for statement in statements:
        name = re.search(r"orders/(\d\d\d_\w+\.sql)", statement)
        assert name
        (folder / name[1]).write_text(statement)
    table = parse_table(folder).table
    assert table.schema_version == len(statements) > 1
    assert table.is_keyed


@pytest.mark.parametrize("kind", ScalarKind)
def test_every_column_type_is_documented(kind: ScalarKind) -> None:
    assert re.search(rf"`{kind}(\(p, s\))?`", README.read_text())


def test_operations_knows_every_state_reason_header_and_metric() -> None:
    page = (ROOT / "docs" / "operations.md").read_text()
    names: list[str] = [*PartitionState, *DeliveryState, *ParkReason]
    names += [value for name, value in vars(dead_letters).items() if name.isupper()]
    names += metrics()
    assert [name for name in names if f"`{name}`" not in page] == []


def metrics() -> list[str]:
    """The workers' metrics, by the names under which they are scraped."""
    kinds = (Counter, Gauge, Histogram)
    found = [each for each in vars(telemetry).values() if isinstance(each, kinds)]
    assert found
    return [f"{each._name}_total" if isinstance(each, Counter) else each._name for each in found]


def test_the_wire_protocol_knows_every_refusal() -> None:
    page = (ROOT / "docs" / "wire-protocol.md").read_text().partition("## JSON Schema")[0]
    assert [code for code in RefusalCode if f"`{code}`" not in page] == []


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_pages_cite_no_line_numbers_and_files_that_exist(path: Path) -> None:
    text = path.read_text()
    assert not re.search(r"\.(py|sql|toml|yml):\d|\blines? \d", text)
    for file in re.findall(r"`((?:schemas|streams|agents|loadtest|tests|docs|deploy)/[\w/.-]+)`", text):
        assert (ROOT / file).exists(), file


def test_the_examples_in_other_languages_ask_what_a_worker_accepts() -> None:
    folder = ROOT / "docs" / "examples"
    (java,) = re.findall(r'"""\n(.*?)"""', (folder / "Ask.java").read_text(), re.DOTALL)
    assert checked_request(json.loads(java.replace("%s", "UA").replace("%d", "9500"))).key == "UA"
    (node,) = re.findall(r"const request = \{\n(.*?)^\};", (folder / "ask.mjs").read_text(), re.DOTALL | re.MULTILINE)
    assert set(re.findall(r"^  (\w+)", node, re.MULTILINE)) <= set(QueryRequest.model_fields)
