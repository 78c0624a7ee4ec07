"""Ask queries over Kafka.

    import pintail

    with pintail.connect() as client:
        answer = client.query("SELECT carrier, count(*) FROM flights GROUP BY ALL ORDER BY 2 DESC")
        print(answer.to_dicts(), answer.offsets)

`AsyncClient` is the same with await. Both raise QueryRefusedError and RequestTimeoutError (streams.errors). The package
`pintail` names what its users need of this one.
"""

from schemas.messages import AnswerLimits
from streams.client.answer import Answer
from streams.client.async_client import AsyncClient
from streams.client.blocking import Client
from streams.client.subscription import Change
from streams.client.written import Written
from streams.errors import PublishingError, QueryRefusedError, RequestTimeoutError

__all__ = [
    "Answer",
    "AnswerLimits",
    "AsyncClient",
    "Change",
    "Client",
    "PublishingError",
    "QueryRefusedError",
    "RequestTimeoutError",
    "Written",
]
