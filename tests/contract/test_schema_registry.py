"""The registry's answers, over HTTP: a schema, none, or a failure that is never taken for either."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from streams.adapters.http_registry import HttpSchemaRegistry
from streams.config import Settings, load_settings
from streams.errors import ConfigurationError, SchemaRegistryRejectedError, SchemaRegistryUnavailableError
from streams.ports import RegisteredSchema
from tests.registry_server import RegistryServer
from tests.waiting import wait_for


@pytest.fixture
def server() -> Iterator[RegistryServer]:
    server = RegistryServer()
    server.start()
    yield server
    server.stop()


@pytest.fixture
def registry(server: RegistryServer) -> Iterator[HttpSchemaRegistry]:
    registry = HttpSchemaRegistry(server.url + "/")
    yield registry
    registry.close()


def test_a_schema_is_what_was_registered(server: RegistryServer, registry: HttpSchemaRegistry) -> None:
    number = server.register('{"type":"string"}')
    assert registry.schema(number) == RegisteredSchema("AVRO", '{"type":"string"}')
    other = server.register("syntax = ...", schemaType="PROTOBUF")
    assert registry.schema(other) == RegisteredSchema("PROTOBUF", "syntax = ...")


def test_references_come_before_what_refers_to_them(server: RegistryServer, registry: HttpSchemaRegistry) -> None:
    server.versions["a/1", 3] = {"schema": '"A"'}
    server.versions["b", 1] = {"schema": '"B"', "references": [{"name": "A", "subject": "a/1", "version": 3}]}
    references = [{"name": name, "subject": name.lower(), "version": 1} for name in "B"]
    references.append({"name": "A", "subject": "a/1", "version": 3})
    number = server.register('"C"', references=references)
    assert registry.schema(number) == RegisteredSchema("AVRO", '"C"', ('"A"', '"B"'))
    assert len(server.asked) == 3


def test_only_the_registrys_own_404_says_that_there_is_no_schema(
    server: RegistryServer, registry: HttpSchemaRegistry
) -> None:
    assert registry.schema(7) is None
    server.answer_all = (404, b"<html>not here</html>")
    with pytest.raises(SchemaRegistryRejectedError, match="status 404") as refusal:
        registry.schema(7)
    assert not refusal.value.retriable
    assert "PINTAIL_SCHEMA_REGISTRY" in refusal.value.hint


@pytest.mark.parametrize("body", [b"", b"[]", b"{}", b'{"schema": 5}', b"\xff", b'{"schema": "x", "references": [5]}'])
def test_an_answer_that_is_no_schema_is_refused(
    server: RegistryServer, registry: HttpSchemaRegistry, body: bytes
) -> None:
    server.answer_all = (200, body)
    with pytest.raises(SchemaRegistryRejectedError):
        registry.schema(1)


@pytest.mark.parametrize("status", [408, 429, 500, 502, 503, 504])
def test_a_registry_that_is_busy_or_broken_is_asked_again(
    server: RegistryServer, registry: HttpSchemaRegistry, status: int
) -> None:
    server.answer_all = (status, b"{}")
    with pytest.raises(SchemaRegistryUnavailableError) as failure:
        registry.schema(1)
    assert failure.value.retriable


def test_a_registry_that_is_away_is_asked_again_and_answers_once_it_is_back(
    server: RegistryServer, registry: HttpSchemaRegistry
) -> None:
    number = server.register('"string"')
    server.stop()
    with pytest.raises(SchemaRegistryUnavailableError, match=server.url) as failure:
        registry.schema(number)
    assert failure.value.retriable
    server.start()
    assert registry.schema(number) is not None


def test_a_registry_that_failed_and_then_does_not_answer_holds_up_one_thread_only(
    server: RegistryServer, registry: HttpSchemaRegistry
) -> None:
    number = server.register('"string"')
    server.answer_all = (503, b"{}")
    with pytest.raises(SchemaRegistryUnavailableError):
        registry.schema(number)
    server.answer_all = None
    server.gate.clear()
    with ThreadPoolExecutor(1) as threads:
        first = threads.submit(registry.schema, number)
        wait_for(lambda: len(server.asked) == 2, "the first thread asks")
        with pytest.raises(SchemaRegistryUnavailableError, match="503"):
            registry.schema(number)
        server.gate.set()
        assert first.result(timeout=30) is not None
    assert registry.schema(number) is not None


def test_the_password_is_sent_and_never_printed(server: RegistryServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PINTAIL_SCHEMA_REGISTRY", raising=False)
    server.credentials = "reader:open sesame"
    number = server.register('"string"')
    settings = Settings(
        schema_registry=server.url, schema_registry_username="reader", schema_registry_password="open sesame"
    )
    registry = HttpSchemaRegistry.from_settings(settings)
    assert registry.schema(number) is not None
    server.credentials = "reader:changed"
    with pytest.raises(SchemaRegistryRejectedError, match="status 401") as refusal:
        registry.schema(number)
    registry.close()
    assert "sesame" not in f"{settings!r} {registry!r} {refusal.value!r} {refusal.value}"


def test_a_registry_must_be_configured_and_its_url_names_no_user(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PINTAIL_SCHEMA_REGISTRY", raising=False)
    with pytest.raises(ConfigurationError, match="not set: PINTAIL_SCHEMA_REGISTRY"):
        HttpSchemaRegistry.from_settings(Settings())
    for url in ("registry:8081", "http://reader:sesame@registry:8081"):
        with pytest.raises(ConfigurationError, match="PINTAIL_SCHEMA_REGISTRY") as refusal:
            load_settings(schema_registry=url)
        assert "sesame" not in str(refusal.value)
