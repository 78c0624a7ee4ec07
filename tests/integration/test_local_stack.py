"""The local stack as a whole: data survives a second start, a killed run leaves nothing, errors say what to do."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest
import redis
from confluent_kafka import Consumer, Producer

from streams.config import load_settings
from streams.errors import LocalStackError, MissingProgramError
from streams.localstack.ports import is_free
from streams.localstack.reaper import remove_stack_file
from streams.localstack.redis_server import redis_answers
from streams.localstack.stack import LocalStack, StackOptions

REDIS_ONLY = StackOptions(services=("redis",))
HOLD_A_STACK = """
import pathlib, signal, sys
from streams.localstack.stack import LocalStack, StackOptions
stack = LocalStack(pathlib.Path(sys.argv[1]), StackOptions(services=("redis",)))
stack.start()
print(stack._reaper.pid, flush=True)
signal.pause()
"""


def test_a_second_start_finds_the_data_at_the_same_addresses(tmp_path: Path) -> None:
    options = StackOptions(services=("kafka", "redis"))
    with LocalStack(tmp_path, options) as stack:
        first = dict(stack.addresses)
        pids = [process.pid for process in stack.processes.values()]
        producer = Producer({"bootstrap.servers": first["kafka"], "acks": "all"})
        producer.produce("events", b"kept")
        assert producer.flush(30) == 0
        with redis.Redis.from_url(first["redis"]) as client:
            client.set("key", "kept")
    assert not any(psutil.pid_exists(pid) for pid in pids if pid)
    assert not stack.stack_file.exists()

    with LocalStack(tmp_path, options) as stack:
        assert stack.addresses == first
        assert _first_record(first["kafka"], "events") == b"kept"
        with redis.Redis.from_url(first["redis"]) as client:
            assert client.get("key") == b"kept"


@pytest.mark.parametrize("with_reaper", [True, False], ids=["reaper lives", "reaper killed too"])
def test_a_killed_run_leaves_no_orphans(tmp_path: Path, with_reaper: bool) -> None:
    with subprocess.Popen([sys.executable, "-c", HOLD_A_STACK, str(tmp_path)], stdout=subprocess.PIPE) as holder:
        assert holder.stdout is not None
        reaper = psutil.Process(int(holder.stdout.readline()))
        orphan = psutil.Process(_stack_file(tmp_path)["processes"]["redis"]["pid"])
        if not with_reaper:
            reaper.kill()
        holder.kill()
    if not with_reaper:
        assert orphan.is_running()
        with LocalStack(tmp_path, REDIS_ONLY) as stack:
            assert stack.process("redis").pid != orphan.pid
            assert _gone(orphan)
    _eventually(lambda: _gone(orphan) and _gone(reaper))
    assert not (tmp_path / "stack.json").exists()


def test_after_a_kill_the_stack_file_goes_before_what_it_names(tmp_path: Path) -> None:
    """Redis is paused, so that it cannot end: the file must be gone while it still runs."""
    with subprocess.Popen([sys.executable, "-c", HOLD_A_STACK, str(tmp_path)], stdout=subprocess.PIPE) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline()
        orphan = psutil.Process(_stack_file(tmp_path)["processes"]["redis"]["pid"])
        orphan.suspend()
        holder.kill()
    _eventually(lambda: not (tmp_path / "stack.json").exists())
    assert not _gone(orphan)
    orphan.resume()
    _eventually(lambda: _gone(orphan))


def test_the_stack_file_of_a_later_run_is_left_alone(tmp_path: Path) -> None:
    with LocalStack(tmp_path, REDIS_ONLY) as stack:
        remove_stack_file(stack.stack_file, "an earlier run")
        assert stack.stack_file.exists()
        remove_stack_file(stack.stack_file, _stack_file(tmp_path)["run"])
        assert not stack.stack_file.exists()


def test_two_stacks_in_one_folder_are_refused_with_the_holders_pid(tmp_path: Path) -> None:
    with LocalStack(tmp_path, REDIS_ONLY) as stack:
        with pytest.raises(LocalStackError, match=rf"another local stack runs in .*process {os.getpid()}") as refused:
            LocalStack(tmp_path, REDIS_ONLY).start()
        assert "--data-dir" in refused.value.hint
        assert redis_answers(stack.process("redis").specification.port)


def test_a_given_port_is_used_and_a_taken_one_is_named(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        with pytest.raises(LocalStackError, match=f"port {port} for redis is taken"):
            LocalStack(tmp_path, StackOptions(services=("redis",), ports={"redis": port})).start()
    with LocalStack(tmp_path, StackOptions(services=("redis",), ports={"redis": port})) as stack:
        assert stack.addresses["redis"] == f"redis://127.0.0.1:{port}/0"
        assert redis_answers(port)
    assert is_free(port)


def test_a_server_that_is_killed_comes_back_with_its_data(tmp_path: Path) -> None:
    with LocalStack(tmp_path, REDIS_ONLY) as stack, redis.Redis.from_url(stack.addresses["redis"]) as client:
        client.set("key", "kept")
        client.bgrewriteaof()
        _eventually(lambda: not client.info("persistence")["aof_rewrite_in_progress"])
        stack.kill("redis")
        stack.wait_until_ready("redis")
        assert client.get("key") == b"kept"
        assert _stack_file(tmp_path)["processes"]["redis"]["pid"] == stack.process("redis").pid


def test_services_that_are_given_are_used_and_not_started(tmp_path: Path) -> None:
    given = {"kafka": "broker:9092", "clickhouse": "http://history:8123"}
    with LocalStack(tmp_path, StackOptions(given=given)) as stack:
        assert list(stack.processes) == ["redis"]
        settings = load_settings(tmp_path / "none.toml", data_dir=tmp_path)
        assert (settings.kafka, settings.clickhouse) == ("broker:9092", "http://history:8123")
        assert settings.redis == stack.addresses["redis"]


def test_the_snapshot_key_is_made_once_and_only_its_owner_can_read_it(tmp_path: Path) -> None:
    keys = []
    for _ in range(2):
        with LocalStack(tmp_path, REDIS_ONLY) as stack:
            keys.append(load_settings(tmp_path / "none.toml", data_dir=tmp_path).snapshot_key.get_secret_value())
            assert stack.stack_file.stat().st_mode & 0o077 == 0
    assert keys[0] == keys[1]
    assert len(bytes.fromhex(keys[0])) == 32
    assert (tmp_path / "snapshot.key").stat().st_mode & 0o077 == 0


def test_the_in_memory_broker_serves_clients_and_says_it_is_lost_when_it_dies(tmp_path: Path) -> None:
    options = StackOptions(services=("kafka",), broker="memory", memory_topics=("events",))
    with LocalStack(tmp_path, options) as stack:
        producer = Producer({"bootstrap.servers": stack.addresses["kafka"]})
        assert len(producer.list_topics("events", timeout=10).topics["events"].partitions) == 4
        producer.produce("events", b"seen")
        assert producer.flush(30) == 0
        assert _first_record(stack.addresses["kafka"], "events") == b"seen"
        stack.kill("kafka")
        with pytest.raises(LocalStackError, match="what it held is gone"):
            stack.wait()


@pytest.mark.parametrize("says", [None, 'openjdk version "11.0.2"'], ids=["no java", "old java"])
def test_without_a_java_that_is_new_enough_the_error_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, says: str | None
) -> None:
    _only_program(tmp_path / "bin", monkeypatch, "java", says)
    with pytest.raises(MissingProgramError, match="Java 17 or newer") as missing:
        LocalStack(tmp_path / "data", StackOptions(services=("kafka",))).start()
    for way_out in ("apt-get install openjdk-17", "brew install"):
        assert way_out in missing.value.hint
    assert "PINTAIL_KAFKA" not in missing.value.hint  # not everything that starts a stack takes another broker


def test_without_java_pintail_dev_names_what_it_can_do_instead(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _only_program(tmp_path / "bin", monkeypatch, "java", None)
    command = [sys.executable, "-m", "streams.cli.main", "dev", "--data-dir", str(tmp_path / "data")]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ended.returncode == 1
    for way_out in ("apt-get install openjdk-17", "PINTAIL_KAFKA", "--broker memory"):
        assert way_out in ended.stderr


def test_without_maven_the_first_start_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _only_program(tmp_path / "bin", monkeypatch, "java", 'openjdk version "17.0.1"')
    monkeypatch.setenv("PINTAIL_CACHE", str(tmp_path / "cache"))
    with pytest.raises(MissingProgramError, match="`mvn`") as missing:
        LocalStack(tmp_path / "data", StackOptions(services=("kafka",))).start()
    assert "maven" in missing.value.hint


def test_a_download_that_fails_leaves_no_half_filled_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _only_program(tmp_path / "bin", monkeypatch, "java", 'openjdk version "17.0.1"')
    _program(tmp_path / "bin" / "mvn", "[ERROR] Unknown host", status=1)
    monkeypatch.setenv("PINTAIL_CACHE", str(tmp_path / "cache"))
    with pytest.raises(LocalStackError, match="Unknown host"):
        LocalStack(tmp_path / "data", StackOptions(services=("kafka",))).start()
    assert [path for path in (tmp_path / "cache").iterdir() if path.is_dir()] == []


def test_pintail_dev_serves_until_sigterm_and_leaves_nothing(tmp_path: Path) -> None:
    with _pintail_dev(tmp_path) as (process, output):
        stack = _stack_file(tmp_path)
        port = stack["processes"]["redis"]["port"]
        assert redis_answers(port)
        assert stack["settings"]["kafka"] == "127.0.0.1:1"
        assert f"redis://127.0.0.1:{port}/0" in output
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 0
    assert not redis_answers(port)
    assert not (tmp_path / "stack.json").exists()
    assert list((tmp_path / "run").iterdir()) == []


def test_pintail_dev_never_shows_a_password(tmp_path: Path) -> None:
    with _pintail_dev(tmp_path, PINTAIL_CLICKHOUSE="http://sink:hunter2@127.0.0.1:1/db") as (process, output):
        assert "http://***@127.0.0.1:1/db" in output
        assert "hunter2" not in output
        process.send_signal(signal.SIGINT)
        assert process.wait(30) == 0


@contextmanager
def _pintail_dev(data_dir: Path, **environment: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """`pintail dev --services-only` with only Redis to start, and what it printed until it was ready."""
    given = {"PINTAIL_KAFKA": "127.0.0.1:1", "PINTAIL_CLICKHOUSE": "http://127.0.0.1:1", **environment}
    command = [sys.executable, "-m", "streams.cli.main", "dev", "--services-only", "--data-dir", str(data_dir)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env={**os.environ, **given}) as process:
        assert process.stdout is not None
        try:
            printed = []
            for line in process.stdout:
                printed.append(line)
                if line.startswith("Ctrl-C"):
                    break
            yield process, "".join(printed)
        finally:
            process.kill()


def _first_record(kafka: str, topic: str) -> bytes | None:
    consumer = Consumer({"bootstrap.servers": kafka, "group.id": os.urandom(8).hex(), "auto.offset.reset": "earliest"})
    try:
        consumer.subscribe([topic])
        message = consumer.poll(30)
        return message.value() if message else None
    finally:
        consumer.close()


def _stack_file(data_dir: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((data_dir / "stack.json").read_text())
    return content


def _gone(process: psutil.Process) -> bool:
    try:
        return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def _eventually(condition: Callable[[], bool], seconds: float = 20.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def _only_program(folder: Path, monkeypatch: pytest.MonkeyPatch, name: str, says: str | None) -> None:
    """PATH with nothing but, if it `says` something, one program."""
    folder.mkdir()
    if says:
        _program(folder / name, says)
    monkeypatch.setenv("PATH", str(folder))
    monkeypatch.delenv("JAVA_HOME", raising=False)


def _program(path: Path, says: str, *, status: int = 0) -> None:
    path.write_text(f"#!/bin/sh\necho '{says}' >&2\nexit {status}\n")
    path.chmod(0o755)
