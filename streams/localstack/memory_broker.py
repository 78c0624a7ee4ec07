"""librdkafka's in-memory broker as a process of the local stack: a first look at Pintail without Java.

It forgets everything when it ends, keeps about 5 MB per partition, and cannot create or configure topics: a topic
appears with 4 partitions when it is first asked for. It chooses its own port and tells it in a file.
"""

from __future__ import annotations

import argparse
import signal
import sys
import threading
from pathlib import Path

from streams.errors import LocalStackError, MissingProgramError
from streams.localstack.processes import ProcessSpecification
from streams.localstack.records import write_atomically

LIMITS = "in-memory broker: nothing survives it, about 5 MB per partition, topics cannot be created or configured"


def memory_broker_process(data_dir: Path, *, topics: tuple[str, ...], log: Path) -> ProcessSpecification:
    """The broker; `address_of` tells where it listens once it is ready. It cannot be restarted: its log is gone."""
    data_dir.mkdir(parents=True, exist_ok=True)
    address_file = data_dir / "address"
    address_file.unlink(missing_ok=True)
    return ProcessSpecification(
        name="kafka",
        command=[sys.executable, "-m", __name__, "--address-file", str(address_file), *topics],
        log=log,
        ready=address_file.exists,
        restart=False,
    )


def address_of(data_dir: Path) -> str:
    """Where a ready broker listens."""
    return (data_dir / "address").read_text()


def main() -> None:
    """Serves until SIGTERM or SIGINT."""
    try:
        from confluent_kafka import KafkaException, Producer
    except ImportError:
        raise MissingProgramError("confluent-kafka is not installed", hint="pip install 'pintail[local]'") from None
    parser = argparse.ArgumentParser(description=LIMITS)
    parser.add_argument("--address-file", type=Path, required=True)
    parser.add_argument("topics", nargs="*", help="topics to create at once")
    arguments = parser.parse_args()
    stopped = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stopped.set())
    # The client that is configured with a mock cluster owns it; the cluster lives as long as the client.
    owner = Producer({"bootstrap.servers": "unused", "test.mock.num.brokers": 1})
    try:
        for topic in arguments.topics:
            owner.list_topics(topic, timeout=10)
        (broker,) = owner.list_topics(timeout=10).brokers.values()
    except KafkaException as error:
        raise LocalStackError(f"the in-memory broker did not start: {error}", hint="use --broker kafka") from error
    write_atomically(arguments.address_file, f"{broker.host}:{broker.port}")
    stopped.wait()


if __name__ == "__main__":
    main()
