"""Every way to connect that the settings know, told to librdkafka, which refuses what it does not know."""

from __future__ import annotations

from pathlib import Path
from typing import Any, get_args

import pytest
from confluent_kafka import KafkaException, Producer

from streams.adapters.kafka_options import kafka_client_options, librdkafka_options
from streams.config import Settings
from streams.errors import ConfigurationError

PROTOCOLS = get_args(Settings.model_fields["kafka_security_protocol"].annotation)
MECHANISMS = get_args(Settings.model_fields["kafka_sasl_mechanism"].annotation)


def settings(**given: Any) -> Settings:
    return Settings(kafka="127.0.0.1:9", kafka_username="ann", kafka_password="of the sea", **given)


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("mechanism", MECHANISMS)
def test_librdkafka_takes_every_protocol_and_mechanism(protocol: str, mechanism: str) -> None:
    options = librdkafka_options(
        settings(kafka_security_protocol=protocol, kafka_sasl_mechanism=mechanism), client_id="a-client"
    )
    Producer(options)
    assert (options["bootstrap.servers"], options["client.id"]) == ("127.0.0.1:9", "a-client")
    named = (options.get("sasl.mechanism"), options.get("sasl.username"), options.get("sasl.password"))
    assert named == ((mechanism, "ann", "of the sea") if protocol.startswith("SASL") else (None, None, None))


def test_librdkafka_refuses_what_it_does_not_know() -> None:
    for wrong in ({"sasl.mechanism": "GUESSING"}, {"security.protocol": "SMOKE"}, {"client.name": "a-client"}):
        with pytest.raises(KafkaException):
            Producer(
                {**librdkafka_options(settings(kafka_security_protocol="SASL_SSL"), client_id="a-client"), **wrong}
            )


@pytest.mark.parametrize("of", [kafka_client_options, lambda each: librdkafka_options(each, client_id="a-client")])
@pytest.mark.parametrize("content", [None, "no certificate\n"], ids=["missing", "of something else"])
def test_a_file_without_certificates_is_one_clear_error(of: Any, content: str | None, tmp_path: Path) -> None:
    path = tmp_path / "authorities.pem"
    if content is not None:
        path.write_text(content)
    with pytest.raises(ConfigurationError, match=r"authorities\.pem") as refused:
        of(settings(kafka_security_protocol="SSL", kafka_ca_file=path))
    assert "PINTAIL_KAFKA_CA_FILE" in refused.value.hint
