"""Apache Kafka as a process of the local stack: one KRaft node that is broker and controller.

Settings differ from a production broker where one machine and quick tests ask for it: single replicas, few internal
partitions, no rebalance delay, and topics that appear when first used. The first run also writes an archive of the
loaded classes next to the jars; with it a broker starts in less than half the time.
"""

from __future__ import annotations

import base64
import logging
import shutil
import subprocess
import uuid
from collections.abc import Callable
from pathlib import Path

from schemas.table import TableDefinition
from streams.errors import LocalStackError
from streams.limits import DEAD_LETTER_BYTES_MAX, MIB
from streams.localstack.kafka_jars import FILES, Java, find_java, kafka_jars
from streams.localstack.ports import HOST, choose_port
from streams.localstack.processes import ProcessSpecification

HEAP = "512m"
#: Topics made by first use get what a table gets that does not say otherwise.
PARTITIONS_DEFAULT: int = TableDefinition.partitions


def kafka_process(data_dir: Path, *, port: int, log: Path, progress: Callable[[str], None]) -> ProcessSpecification:
    """The broker, listening on `port`, with all its data below `data_dir`. Prepares what is missing.

    Raises MissingProgramError without Java or Maven.
    """
    java = find_java()
    jars = kafka_jars(progress)
    data_dir.mkdir(parents=True, exist_ok=True)
    properties = data_dir / "server.properties"
    properties.write_text(
        server_properties(data_dir / "log", port=port, controller_port=choose_port(server="Kafka's controller"))
    )
    if not (data_dir / "log" / "meta.properties").exists():
        progress("preparing Kafka's storage")
        _format_storage(java, jars, properties)
    archive = jars / f"classes-{java.fingerprint}.jsa"
    recorded = data_dir / "classes.jsa"
    recorded.unlink(missing_ok=True)
    return ProcessSpecification(
        name="kafka",
        command=[*_java(java, jars, recorded), "kafka.Kafka", str(properties)],
        log=log,
        port=port,
        ready=lambda: broker_answers(f"{HOST}:{port}"),
        # Writing the class archive takes the first broker a few seconds when it ends.
        stop_deadline_seconds=30,
        after_stop=lambda: _keep_archive(recorded, archive),
    )


def broker_answers(bootstrap_servers: str) -> bool:
    """True if a broker there answers a metadata request, which it does only once it serves clients."""
    from confluent_kafka import KafkaException
    from confluent_kafka.admin import AdminClient

    quiet = logging.getLogger("pintail.localstack.probe")
    quiet.addHandler(logging.NullHandler())
    quiet.propagate = False
    admin = AdminClient({"bootstrap.servers": bootstrap_servers, "reconnect.backoff.ms": 20}, logger=quiet)
    try:
        return bool(admin.list_topics(timeout=0.5).brokers)
    except KafkaException:
        return False


def server_properties(log_dir: Path, *, port: int, controller_port: int) -> str:
    """The broker's configuration file."""
    settings = {
        "process.roles": "broker,controller",
        "node.id": 1,
        "controller.quorum.voters": f"1@{HOST}:{controller_port}",
        "listeners": f"BROKER://{HOST}:{port},CONTROLLER://{HOST}:{controller_port}",
        "listener.security.protocol.map": "BROKER:PLAINTEXT,CONTROLLER:PLAINTEXT",
        "controller.listener.names": "CONTROLLER",
        "inter.broker.listener.name": "BROKER",
        "log.dirs": log_dir.resolve(),
        # One machine: one replica of everything, few internal partitions to create and to load.
        "offsets.topic.replication.factor": 1,
        "offsets.topic.num.partitions": 4,
        "transaction.state.log.replication.factor": 1,
        "transaction.state.log.min.isr": 1,
        "transaction.state.log.num.partitions": 4,
        "share.coordinator.state.topic.replication.factor": 1,
        "share.coordinator.state.topic.min.isr": 1,
        "share.coordinator.state.topic.num.partitions": 1,
        # Members join at once; a member that was killed may be declared dead within a second, if it asks for that.
        "group.initial.rebalance.delay.ms": 0,
        "group.min.session.timeout.ms": 1000,
        # Any Kafka client may name a new topic and use it, a reply topic for instance.
        "auto.create.topics.enable": "true",
        "num.partitions": PARTITIONS_DEFAULT,
        # Large records must reach Pintail to be parked; the broker is not the one to refuse them.
        "message.max.bytes": DEAD_LETTER_BYTES_MAX + MIB,
        "replica.fetch.max.bytes": DEAD_LETTER_BYTES_MAX + MIB,
    }
    # Java reads the file as Latin-1 with escapes; a folder's name may hold anything.
    return "".join(f"{name}={str(value).encode('unicode_escape').decode()}\n" for name, value in settings.items())


def _java(java: Java, jars: Path, recorded: Path | None = None) -> list[str]:
    archive = jars / f"classes-{java.fingerprint}.jsa"
    # The quick compiler and the serial collector start in half the time and leave the second core to the workers.
    options = [f"-Xmx{HEAP}", "-XX:+UseSerialGC", "-XX:TieredStopAtLevel=1", "-Xshare:auto", "-Xlog:cds=off"]
    options += ["-Xlog:cds+dynamic=off", f"-Dlog4j2.configurationFile={FILES / 'log4j2.properties'}"]
    if archive.exists():
        options.append(f"-XX:SharedArchiveFile={archive}")
    elif recorded:
        options.append(f"-XX:ArchiveClassesAtExit={recorded}")
    return [java.program, *options, "-cp", f"{jars}/*"]


def _format_storage(java: Java, jars: Path, properties: Path) -> None:
    command = [*_java(java, jars), "kafka.tools.StorageTool", "format", "--ignore-formatted"]
    command += ["--cluster-id", _new_cluster_id(), "--config", str(properties)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise LocalStackError(
            f"Kafka could not prepare its storage:\n{done.stdout}{done.stderr}",
            hint="see that the data folder can be written to and has room",
        )


def _new_cluster_id() -> str:
    while (identifier := base64.urlsafe_b64encode(uuid.uuid4().bytes).decode().rstrip("=")).startswith("-"):
        pass  # a leading dash would read as an option
    return identifier


def _keep_archive(recorded: Path, archive: Path) -> None:
    """Puts a class archive that is complete where every later broker finds it."""
    if recorded.exists() and not archive.exists():
        partial = archive.with_suffix(f".{uuid.uuid4().hex}")
        shutil.move(recorded, partial)
        partial.replace(archive)
