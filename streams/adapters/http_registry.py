"""SchemaRegistry over HTTP: Confluent's REST interface, which Karapace and Apicurio (ccompat) speak as well.

Only one answer means that there is no such schema: status 404 with the registry's own error code. Any other failure is
not the record's fault, so it is raised and decoding waits. It keeps nothing and tries nothing twice: callers do.
Once it has failed, one caller at a time finds out whether it is back; the others fail at once, so that a registry which
does not answer never ties up the threads that queries need as well.
"""

from __future__ import annotations

import json
from threading import Lock
from typing import Any
from urllib.parse import quote, urlsplit

import urllib3
from urllib3.exceptions import HTTPError

from streams import telemetry
from streams.config import Settings
from streams.errors import SchemaRegistryError, SchemaRegistryRejectedError, SchemaRegistryUnavailableError
from streams.ports import RegisteredSchema, SchemaRegistry

CONNECT_SECONDS_MAX = 3.0
REPLY_SECONDS_MAX = 10.0
CONNECTIONS_MAX = 4
SCHEMA_BYTES_MAX = 16 * 1024 * 1024
#: Schemas that one schema may name types of, directly and through others.
REFERENCES_MAX = 256
#: Subject, version, schema not found. Anything else with status 404 comes from somebody else, such as a proxy.
_NOT_FOUND_CODES = frozenset({40401, 40402, 40403})
_BUSY_STATUSES = frozenset({408, 425, 429})


class HttpSchemaRegistry(SchemaRegistry):
    """A registry at a URL. Connects when first used, and again after the registry was away."""

    def __init__(self, url: str, *, username: str = "", password: str = "") -> None:
        self._url = url.rstrip("/")
        self._lock = Lock()
        self._failure: SchemaRegistryError | None = None
        self._is_probed = False
        headers = {"Accept": "application/vnd.schemaregistry.v1+json, application/json"}
        if username or password:
            headers |= urllib3.make_headers(basic_auth=f"{username}:{password}")
        self._pool = urllib3.PoolManager(
            maxsize=CONNECTIONS_MAX,
            headers=headers,
            timeout=urllib3.Timeout(connect=CONNECT_SECONDS_MAX, read=REPLY_SECONDS_MAX),
            retries=False,
        )

    @classmethod
    def from_settings(cls, settings: Settings) -> HttpSchemaRegistry:
        """The configured registry. Raises ConfigurationError if there is none."""
        settings.require("schema_registry")
        return cls(
            settings.schema_registry,
            username=settings.schema_registry_username,
            password=settings.schema_registry_password.get_secret_value(),
        )

    def __repr__(self) -> str:
        return f"HttpSchemaRegistry({urlsplit(self._url).netloc})"

    def schema(self, schema_id: int) -> RegisteredSchema | None:
        """See SchemaRegistry."""
        with self._lock:
            if self._failure is not None and self._is_probed:
                raise type(self._failure)(self._failure.message, hint=self._failure.hint)
            self._is_probed = True
        failure = None
        try:
            return self._ask(schema_id)
        except SchemaRegistryError as error:
            telemetry.SCHEMA_REGISTRY_FAILURES.inc()
            failure = error
            raise
        finally:
            with self._lock:
                self._failure, self._is_probed = failure, False

    def close(self) -> None:
        """Idempotent; the next use connects again."""
        self._pool.clear()

    def _ask(self, schema_id: int) -> RegisteredSchema | None:
        found = self._get(f"/schemas/ids/{schema_id}")
        if found is None:
            return None
        references: dict[tuple[str, int], str] = {}
        try:
            self._collect(found, references)
        except (KeyError, TypeError, ValueError) as error:
            raise SchemaRegistryRejectedError(
                f"the schema registry at {self._url} gives schema {schema_id} references that are none: {error!r}",
                hint="is PINTAIL_SCHEMA_REGISTRY a registry? decoding goes on by itself once it is cured",
            ) from None
        return RegisteredSchema(str(found.get("schemaType") or "AVRO"), found["schema"], tuple(references.values()))

    def _collect(self, document: dict[str, Any], found: dict[tuple[str, int], str]) -> None:
        """Adds what a schema refers to, each after what it refers to itself; one that is gone is left out."""
        for reference in document.get("references") or ():
            subject, version = str(reference["subject"]), int(reference["version"])
            if (subject, version) in found or len(found) >= REFERENCES_MAX:
                continue
            referenced = self._get(f"/subjects/{quote(subject, safe='')}/versions/{version}?deleted=true")
            if referenced is not None:
                self._collect(referenced, found)
                found[subject, version] = referenced["schema"]

    def _get(self, path: str) -> dict[str, Any] | None:
        """The document at that path, None if the registry says that there is none. Raises SchemaRegistryError."""
        try:
            with self._pool.request("GET", self._url + path, preload_content=False) as response:
                status, body = response.status, response.read(SCHEMA_BYTES_MAX + 1)
        except HTTPError as error:
            raise SchemaRegistryUnavailableError(
                f"no answer from the schema registry at {self._url}: {error}",
                hint="decoding goes on by itself once it answers; is PINTAIL_SCHEMA_REGISTRY right?",
            ) from error
        if status >= 500 or status in _BUSY_STATUSES:
            raise SchemaRegistryUnavailableError(
                f"the schema registry at {self._url} answers {path} with status {status}",
                hint="decoding goes on by itself once it recovers",
            )
        document = _document(body)
        if status == 404 and document.get("error_code") in _NOT_FOUND_CODES:
            return None
        if status != 200 or not isinstance(document.get("schema"), str):
            raise SchemaRegistryRejectedError(
                f"the schema registry at {self._url} answers {path} with status {status} and no schema",
                hint="check PINTAIL_SCHEMA_REGISTRY and the user's rights; decoding goes on by itself once it is cured",
            )
        return document


def _document(body: bytes) -> dict[str, Any]:
    if len(body) > SCHEMA_BYTES_MAX:
        return {}
    try:
        document = json.loads(body)
    except ValueError:
        return {}
    return document if isinstance(document, dict) else {}
