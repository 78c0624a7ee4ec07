"""Real servers for the whole test session, each started when the first test asks for it.

A server that cannot start is a failure, never a skip. Tests share the servers and keep apart by names of their own:
`new_topic` and `unique_name`.
"""

from __future__ import annotations

import itertools
import uuid
from collections.abc import Callable, Iterator, Mapping
from typing import Protocol, TypedDict

import pytest
from confluent_kafka.admin import AdminClient, NewTopic

from streams.localstack.stack import LocalStack, ServiceName, StackOptions

_serial = itertools.count()


def unique_name(prefix: str = "t") -> str:
    """A name that no other test uses; good for topics, consumer groups, Redis prefixes and databases."""
    return f"{prefix}_{next(_serial)}_{uuid.uuid4().hex[:8]}"


class NewTopicMaker(Protocol):
    """What the `new_topic` fixture gives."""

    def __call__(
        self, prefix: str = ..., *, partitions: int = ..., configuration: Mapping[str, str] | None = ...
    ) -> str:
        """Creates a topic with a name of its own and returns the name."""
        ...


def _service(name: ServiceName, factory: pytest.TempPathFactory) -> Iterator[str]:
    with LocalStack(factory.mktemp(name), StackOptions(services=(name,))) as stack:
        yield stack.addresses[name]


@pytest.fixture(scope="session")
def kafka(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Bootstrap servers of a real Apache Kafka."""
    yield from _service("kafka", tmp_path_factory)


@pytest.fixture(scope="session")
def redis_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """URL of a real Redis-protocol server with append-only file and noeviction."""
    yield from _service("redis", tmp_path_factory)


@pytest.fixture(scope="session")
def clickhouse_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """URL of a real ClickHouse engine behind its HTTP interface."""
    yield from _service("clickhouse", tmp_path_factory)


class Servers(TypedDict):
    """Where the session's servers are, by the names that `tests.system.running_system` has for them."""

    kafka: str
    redis_url: str
    clickhouse_url: str


@pytest.fixture(scope="session")
def servers(kafka: str, redis_url: str, clickhouse_url: str) -> Servers:
    """All that a whole system needs."""
    return Servers(kafka=kafka, redis_url=redis_url, clickhouse_url=clickhouse_url)


@pytest.fixture(scope="session", name="unique_name")
def unique_name_fixture() -> Callable[[str], str]:
    """`unique_name` for tests that import nothing."""
    return unique_name


@pytest.fixture(scope="session")
def new_topic(kafka: str) -> NewTopicMaker:
    """Creates topics on the session's Kafka."""
    admin = AdminClient({"bootstrap.servers": kafka})

    def create(prefix: str = "t", *, partitions: int = 1, configuration: Mapping[str, str] | None = None) -> str:
        name = unique_name(prefix)
        topic = NewTopic(name, num_partitions=partitions, replication_factor=1, config=dict(configuration or {}))
        admin.create_topics([topic])[name].result(timeout=30)
        return name

    return create
