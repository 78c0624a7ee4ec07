"""Settings: where they come from, and that every fault is named at once."""

from __future__ import annotations

import json
import traceback
from collections.abc import Callable
from pathlib import Path

import pytest
from pydantic import ValidationError
from typer.testing import CliRunner

from streams.adapters.clickhouse_sink import ClickHouseSink
from streams.adapters.redis_snapshots import RedisSnapshotRepository
from streams.cli.main import app as application
from streams.config import _FORMS, STACK_FILE_NAME, Settings, load_settings
from streams.errors import ConfigurationError
from streams.urls import redacted

KEY = "ab" * 32


@pytest.fixture(autouse=True)
def no_surroundings(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Neither this machine's variables nor a stack that happens to run."""
    import os

    for name in list(os.environ):
        if name.startswith("PINTAIL_"):
            monkeypatch.delenv(name)
    monkeypatch.chdir(tmp_path)


def test_environment_over_file_over_running_stack_over_defaults(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / ".pintail").mkdir()
    stack = {"settings": {"kafka": "stack:1", "redis": "redis://stack", "clickhouse": "http://stack"}}
    (tmp_path / ".pintail" / STACK_FILE_NAME).write_text(json.dumps(stack))
    (tmp_path / "pintail.toml").write_text('redis = "redis://file"\nclickhouse = "http://file"\n')
    monkeypatch.setenv("PINTAIL_CLICKHOUSE", "http://environment")
    settings = load_settings()
    assert (settings.kafka, settings.redis, settings.clickhouse) == (
        "stack:1",
        "redis://file",
        "http://environment",
    )
    assert settings.snapshots_kept == 3


def test_the_first_of_several_snapshot_keys_seals(tmp_path: Path) -> None:
    new, old = "0a" * 32, "0b" * 32
    assert load_settings(snapshot_key=f"{new}, {old}").snapshot_keys == [bytes.fromhex(new), bytes.fromhex(old)]
    file = tmp_path / "keys"
    file.write_text(f"{new}\n{old}\n")
    assert load_settings(snapshot_key_file=file).snapshot_keys == [bytes.fromhex(new), bytes.fromhex(old)]
    with pytest.raises(ConfigurationError, match="64 hexadecimal digits"):
        load_settings(snapshot_key=f"{new},{old}0b")


def test_every_fault_is_reported_at_once_with_the_variable_to_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PINTAIL_KAFKA", "nowhere")
    monkeypatch.setenv("PINTAIL_STORE_THREADS", "many")
    monkeypatch.setenv("PINTAIL_SNAPSHOT_KEY", "secret-but-short")
    with pytest.raises(ConfigurationError) as failure:
        load_settings()
    message = str(failure.value)
    for name in ("PINTAIL_KAFKA", "PINTAIL_STORE_THREADS", "PINTAIL_SNAPSHOT_KEY"):
        assert name in message
    assert "secret-but-short" not in message


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("snapshots_keep = 9", "pintail.toml: snapshots_keep: no such setting; did you mean snapshots_kept?"),
        ('PINTAIL_KAFKA = "localhost:9092"', "pintail.toml: PINTAIL_KAFKA: no such setting; did you mean kafka?"),
        ("qqqq = 9", "pintail.toml: qqqq: no such setting"),
    ],
)
def test_an_unknown_setting_in_the_file_is_a_fault_and_not_ignored(tmp_path: Path, line: str, words: str) -> None:
    (tmp_path / "pintail.toml").write_text(f"{line}\nstore_threads = 0\n")
    with pytest.raises(ConfigurationError) as failure:
        load_settings()
    _, unknown, threads = str(failure.value.message).splitlines()
    assert unknown.strip() == words
    assert threads.strip().startswith("pintail.toml: store_threads: ")


def test_a_fault_names_the_place_that_wins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "pintail.toml").write_text('worker = "fine"\ndata_dir = 5\n')
    monkeypatch.setenv("PINTAIL_WORKER", "not fine")
    with pytest.raises(ConfigurationError) as failure:
        load_settings()
    assert "PINTAIL_WORKER: 'not fine' is not 1 to 64 letters" in failure.value.message
    assert "pintail.toml: data_dir: " in failure.value.message


def test_the_form_of_a_value_is_said_in_words(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PINTAIL_STORE_MEMORY_LIMIT", "lots")
    with pytest.raises(ConfigurationError) as failure:
        load_settings()
    assert "PINTAIL_STORE_MEMORY_LIMIT: 'lots' is not a number and a unit" in failure.value.message
    assert "512MB" in failure.value.message
    assert "pattern" not in failure.value.message


def test_every_pattern_has_its_form_in_words() -> None:
    patterned = {
        name
        for name, field in Settings.model_fields.items()
        if any(getattr(constraint, "pattern", None) for constraint in field.metadata)
    }
    assert patterned == _FORMS.keys()


@pytest.fixture
def shown() -> Callable[[], dict[str, str]]:
    """What `pintail config` prints: variable -> the rest of its line."""

    def run() -> dict[str, str]:
        result = CliRunner().invoke(application, ["config"], catch_exceptions=False)
        rows = (line.partition(" ") for line in result.output.splitlines())
        return {name: rest.strip() for name, _, rest in rows}

    return run


def test_config_cuts_neither_names_nor_values_at_any_width(
    shown: Callable[[], dict[str, str]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    folder = tmp_path / ("a" * 120) / "[bold]"
    monkeypatch.setenv("PINTAIL_DATA_DIR", str(folder))
    monkeypatch.setenv("COLUMNS", "30")
    lines = shown()
    assert lines.keys() == {"variable", *(f"PINTAIL_{name.upper()}" for name in Settings.model_fields)}
    assert lines["PINTAIL_DATA_DIR"].startswith(f"{folder} ")
    for name, field in Settings.model_fields.items():
        assert lines[f"PINTAIL_{name.upper()}"].endswith(field.description or "")


def test_config_is_blank_where_nothing_is_set(
    shown: Callable[[], dict[str, str]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "key").write_text(KEY)
    monkeypatch.setenv("PINTAIL_SNAPSHOT_KEY_FILE", str(tmp_path / "key"))
    lines = shown()
    assert lines["PINTAIL_KAFKA_CA_FILE"].startswith("Certificates")
    assert lines["PINTAIL_SNAPSHOT_KEY"].startswith("AES-256 key")
    assert lines["PINTAIL_SNAPSHOT_KEY_FILE"].startswith(str(tmp_path / "key"))
    assert load_settings().snapshot_key.get_secret_value() == KEY
    monkeypatch.setenv("PINTAIL_SNAPSHOT_KEY", KEY)
    assert shown()["PINTAIL_SNAPSHOT_KEY"].startswith("****")


def test_a_file_that_is_not_toml_is_named(tmp_path: Path) -> None:
    (tmp_path / "pintail.toml").write_text("kafka = = 1")
    with pytest.raises(ConfigurationError, match=r"pintail\.toml"):
        load_settings()


def test_what_is_missing_is_listed_together() -> None:
    with pytest.raises(ConfigurationError) as failure:
        load_settings().require("kafka", "redis", "snapshot_key")
    assert all(f"PINTAIL_{name}" in str(failure.value) for name in ("KAFKA", "REDIS", "SNAPSHOT_KEY"))


def test_secrets_never_print() -> None:
    settings = load_settings(snapshot_key=KEY, kafka_password="hunter2")
    assert KEY not in repr(settings)
    assert "hunter2" not in repr(settings)
    assert KEY not in str(settings)


SECRET_URLS = [
    "redis://:hunter2@host:6379/0",
    "redis://user:hunter2@host:6379/0",
    "redis://:%40hunter2@[::1]:6379/0",
    "redis://:hunter2@secret2@host:6379/0",
    "redis://host:6379/0?password=hunter2",
    "unix:///run/redis.sock?password=hunter2&db=1",
    "unix://:hunter2@/run/redis.sock",
    "http://user:hunter2@host:8123/database",
]
BROKEN_URLS = [
    "redis://:hunter2#secret2@host:6379/0",
    "redis://:hunter2/secret2@host:6379/0",
    "redis://:hunter2?secret2@host:6379/0",
    "redis://host:6379/0?password=hunter2@secret2",
    "redis://host:6379/0?password=hunter2#secret2",
    "redis://:hunter2",
    "redis://:hunter2@host:secret2/0",
    "redis://:hunter2@ho st/0",
    "redis://:hunter2@[::1/0",
    "user:hunter2@host:6379",
    "hunter2",
    "http://:hunter2@host:6379",
]


@pytest.mark.parametrize("url", [*SECRET_URLS, *BROKEN_URLS])
def test_a_url_is_shown_without_what_is_secret(url: str) -> None:
    shown = redacted(url)
    assert "hunter2" not in shown
    assert "secret2" not in shown


def test_a_url_without_secrets_is_shown_whole() -> None:
    for url in ("", "redis://host:6379/0", "redis://[::1]:6379/0", "unix:///run/redis.sock", "https://host/database"):
        assert redacted(url) == url
    assert redacted("redis://:pass@host:6379/0") == "redis://***@host:6379/0"


@pytest.mark.parametrize("url", SECRET_URLS)
def test_passwords_in_urls_never_print(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    name = "clickhouse" if url.startswith("http") else "redis"
    monkeypatch.setenv(f"PINTAIL_{name.upper()}", url)
    settings = load_settings()
    assert getattr(settings, name) == url
    command = CliRunner().invoke(application, ["config"])
    assert command.exit_code == 0
    for text in (repr(settings), str(settings), command.output):
        assert "hunter2" not in text
        assert "secret2" not in text


@pytest.mark.parametrize("url", BROKEN_URLS)
def test_a_url_that_cannot_be_used_is_refused_without_its_password(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PINTAIL_REDIS", url)
    with pytest.raises(ConfigurationError) as failure:
        load_settings()
    with pytest.raises(ValidationError) as unwrapped:
        Settings()
    with pytest.raises(ConfigurationError) as repository:
        RedisSnapshotRepository(url, application="pintail")
    for error in (failure, unwrapped, repository):
        assert "%23" in str(error.value)
        assert "PINTAIL_REDIS" in str(error.value) or "redis" in str(error.value)
        shown = "".join(traceback.format_exception(error.value))
        assert "hunter2" not in shown
        assert "secret2" not in shown


@pytest.mark.parametrize(
    "url", ["http://u:hunter2#secret2@h:8123/d", "http://u:hunter2/x@h:8123/d", "http://h:8123/d?password=hunter2"]
)
def test_a_clickhouse_url_that_cannot_be_used_is_refused_without_its_password(url: str) -> None:
    with pytest.raises(ConfigurationError) as failure:
        ClickHouseSink(url)
    assert "%23" in failure.value.hint
    assert "hunter2" not in "".join(traceback.format_exception(failure.value))


def test_credentials_among_the_brokers_are_refused_and_not_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PINTAIL_KAFKA", "user:hunter2@host:9092")
    with pytest.raises(ConfigurationError, match="PINTAIL_KAFKA") as failure:
        load_settings()
    assert "hunter2" not in str(failure.value)
