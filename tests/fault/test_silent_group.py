"""A worker whose consumer has silently dropped out of its group ends with a failure, so that it is started again."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from tests.conftest import unique_name

#: A store worker whose group task ends, as after an error that aiokafka does not expect, once it has joined.
WORKER = """
import sys
from agents.__main__ import main
from agents.transport import BatchConsumer

perform_seek = BatchConsumer.perform_seek

async def drop_out(consumer):
    await perform_seek(consumer)
    coordinator = consumer._thread._consumer._coordinator
    consumer._thread.thread_loop.call_soon_threadsafe(coordinator._coordination_task.cancel)

BatchConsumer.perform_seek = drop_out
sys.exit(main(["store"]))
"""


def test_the_worker_ends_with_a_failure_that_names_the_group(tmp_path: Path, kafka: str, redis_url: str) -> None:
    application = unique_name("app")
    folder = tmp_path / "tables" / "events"
    folder.mkdir(parents=True)
    (folder / "001_create.sql").write_text(
        f"CREATE TABLE events (id BIGINT) WITH (topic = '{application}.events', partitions = 1)"
    )
    worker = subprocess.run(
        [sys.executable, "-c", WORKER],
        env={
            **os.environ,
            "PINTAIL_KAFKA": kafka,
            "PINTAIL_REDIS": redis_url,
            "PINTAIL_SNAPSHOT_KEY": "00" * 32,
            "PINTAIL_APPLICATION": application,
            "PINTAIL_DATA_DIR": str(tmp_path / "data"),
            "PINTAIL_TABLES_DIR": str(tmp_path / "tables"),
        },
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert worker.returncode == 1, worker.stderr[-4000:]
    assert f"the group task of {application}-store has ended" in worker.stderr
