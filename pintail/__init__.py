"""Ask queries over Kafka.

    import pintail

    with pintail.connect() as client:
        answer = client.query("SELECT carrier, count(*) FROM flights GROUP BY ALL ORDER BY 2 DESC")
        print(answer.to_dicts(), answer.offsets)

`connect_async` is the same with `await`; `pintail.dbapi` is DB-API 2.0. All of it is `streams.client`, under the name
that is installed.
"""

from typing import Any

from streams.client import Answer, AnswerLimits, AsyncClient, Change, Client, Written, dbapi
from streams.config import load_settings
from streams.errors import (
    ConfigurationError,
    PintailError,
    PublishingError,
    QueryRefusedError,
    RequestTimeoutError,
)

__all__ = [
    "Answer",
    "AnswerLimits",
    "AsyncClient",
    "Change",
    "Client",
    "ConfigurationError",
    "PintailError",
    "PublishingError",
    "QueryRefusedError",
    "RequestTimeoutError",
    "Written",
    "connect",
    "connect_async",
    "dbapi",
]


def connect(**settings: Any) -> Client:
    """A client that waits, shared by threads. `settings` are those of docs/configuration.md, such as `kafka=` and
    `application=`; the environment goes before them, and pintail.toml and the running local stack after.

    Raises ConfigurationError."""
    return Client.connect(load_settings(**settings))


async def connect_async(**settings: Any) -> AsyncClient:
    """The same for asyncio."""
    return await AsyncClient.connect(load_settings(**settings))
