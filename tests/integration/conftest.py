"""What several integration tests need of ClickHouse."""

from __future__ import annotations

from collections.abc import Iterator

import clickhouse_connect
import pytest
from clickhouse_connect.driver.client import Client

from streams.adapters.clickhouse_sink import ClickHouseSink


@pytest.fixture
def sink(clickhouse_url: str) -> Iterator[ClickHouseSink]:
    """Over the session's ClickHouse."""
    sink = ClickHouseSink(clickhouse_url)
    yield sink
    sink.close()


@pytest.fixture(scope="module")
def clickhouse(clickhouse_url: str) -> Iterator[Client]:
    """A client of the session's ClickHouse, for tests that look behind the adapters."""
    client = clickhouse_connect.get_client(dsn=clickhouse_url, autogenerate_session_id=False)
    yield client
    client.close()
