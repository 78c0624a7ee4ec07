"""Settings: where they come from, and that every fault is named at once."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from streams.config import STACK_FILE_NAME, load_settings
from streams.errors import ConfigurationError

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


def test_an_unknown_setting_in_the_file_is_a_fault_and_not_ignored(tmp_path: Path) -> None:
    (tmp_path / "pintail.toml").write_text("snapshots_keep = 9\n")
    with pytest.raises(ConfigurationError, match="SNAPSHOTS_KEEP"):
        load_settings()


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
