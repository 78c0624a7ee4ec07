"""How every Kafka client of Pintail connects: one place for addresses, security and versions."""

from __future__ import annotations

import ssl
from pathlib import Path
from typing import Any

from streams.config import Settings
from streams.errors import ConfigurationError


def kafka_client_options(settings: Settings) -> dict[str, Any]:
    """Keyword arguments that AIOKafkaConsumer, AIOKafkaProducer and AIOKafkaAdminClient share. Raises
    ConfigurationError."""
    settings.require("kafka")
    options: dict[str, Any] = {
        "bootstrap_servers": [server.strip() for server in settings.kafka.split(",")],
        "security_protocol": settings.kafka_security_protocol,
    }
    if settings.kafka_security_protocol in ("SSL", "SASL_SSL"):
        options["ssl_context"] = _tls_context(settings.kafka_ca_file)
    if settings.kafka_security_protocol.startswith("SASL"):
        options |= {
            "sasl_mechanism": settings.kafka_sasl_mechanism,
            "sasl_plain_username": settings.kafka_username,
            "sasl_plain_password": settings.kafka_password.get_secret_value(),
        }
    return options


def librdkafka_options(settings: Settings, *, client_id: str) -> dict[str, Any]:
    """The same for the clients of confluent-kafka; brokers know a client by its id, in logs, metrics and quotas. Raises
    ConfigurationError."""
    settings.require("kafka")
    options: dict[str, Any] = {
        "bootstrap.servers": settings.kafka,
        "client.id": client_id,
        "security.protocol": settings.kafka_security_protocol,
        "socket.nagle.disable": True,
        "reconnect.backoff.max.ms": 1_000,
        # A broker closes connections that nothing was sent over for a while.
        "log.connection.close": False,
    }
    if settings.kafka_ca_file:
        _tls_context(settings.kafka_ca_file)  # librdkafka would not say what is wrong with it
        options["ssl.ca.location"] = str(settings.kafka_ca_file)
    if settings.kafka_security_protocol.startswith("SASL"):
        options |= {
            "sasl.mechanism": settings.kafka_sasl_mechanism,
            "sasl.username": settings.kafka_username,
            "sasl.password": settings.kafka_password.get_secret_value(),
        }
    return options


def _tls_context(ca_file: Path | None) -> ssl.SSLContext:
    try:
        return ssl.create_default_context(cafile=ca_file)
    except OSError as error:  # ssl.SSLError too
        raise ConfigurationError(
            f"{ca_file} cannot be read as certificates: {error.strerror or error}",
            hint="set PINTAIL_KAFKA_CA_FILE to a PEM file with the certificates of the brokers' authority",
        ) from None
