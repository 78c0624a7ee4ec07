"""How every Kafka client of Pintail connects: one place for addresses, security and versions."""

from __future__ import annotations

import ssl
from typing import Any

from streams.config import Settings


def kafka_client_options(settings: Settings) -> dict[str, Any]:
    """Keyword arguments that AIOKafkaConsumer, AIOKafkaProducer and AIOKafkaAdminClient share."""
    settings.require("kafka")
    options: dict[str, Any] = {
        "bootstrap_servers": [server.strip() for server in settings.kafka.split(",")],
        "security_protocol": settings.kafka_security_protocol,
    }
    if settings.kafka_security_protocol in ("SSL", "SASL_SSL"):
        options["ssl_context"] = ssl.create_default_context(
            cafile=str(settings.kafka_ca_file) if settings.kafka_ca_file else None
        )
    if settings.kafka_security_protocol.startswith("SASL"):
        options |= {
            "sasl_mechanism": settings.kafka_sasl_mechanism,
            "sasl_plain_username": settings.kafka_username,
            "sasl_plain_password": settings.kafka_password.get_secret_value(),
        }
    return options


def librdkafka_options(settings: Settings) -> dict[str, Any]:
    """The same for the clients of confluent-kafka."""
    settings.require("kafka")
    options: dict[str, Any] = {
        "bootstrap.servers": settings.kafka,
        "security.protocol": settings.kafka_security_protocol,
        "socket.nagle.disable": True,
        "reconnect.backoff.max.ms": 1_000,
        # A broker closes connections that nothing was sent over for a while.
        "log.connection.close": False,
    }
    if settings.kafka_ca_file:
        options["ssl.ca.location"] = str(settings.kafka_ca_file)
    if settings.kafka_security_protocol.startswith("SASL"):
        options |= {
            "sasl.mechanism": settings.kafka_sasl_mechanism,
            "sasl.username": settings.kafka_username,
            "sasl.password": settings.kafka_password.get_secret_value(),
        }
    return options
