"""Clients of a broker that takes nobody without TLS and a password, through both of the Kafka libraries."""

from __future__ import annotations

import asyncio
import datetime
import ipaddress
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import pytest
from confluent_kafka.admin import AdminClient, ScramCredentialInfo, ScramMechanism, UserScramCredentialUpsertion
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from streams.adapters.kafka_librdkafka import RdKafkaProducer, RdKafkaTail
from streams.adapters.kafka_topics import TopicSpecification, ensure_topics
from streams.batches import RecordBatch
from streams.config import Settings
from streams.errors import ConfigurationError, KafkaUnavailableError
from streams.localstack.kafka import server_properties
from streams.localstack.ports import HOST, choose_port
from streams.localstack.stack import LocalStack, StackOptions
from streams.positions import TopicPartition
from tests.conftest import unique_name

USER, PASSWORD = "ann", "of the sea"
MECHANISMS = ("PLAIN", "SCRAM-SHA-256", "SCRAM-SHA-512")


@dataclass(frozen=True)
class Secured:
    """A broker's guarded listener."""

    address: str
    #: The certificate that it shows, by which clients know it.
    certificate: Path

    def settings(self, *, mechanism: str = "PLAIN", password: str = PASSWORD, ca_file: Path | None = None) -> Settings:
        return Settings(
            kafka=self.address,
            kafka_security_protocol="SASL_SSL",
            kafka_sasl_mechanism=mechanism,
            kafka_username=USER,
            kafka_password=password,
            kafka_ca_file=ca_file or self.certificate,
        )


@pytest.fixture(scope="module")
def secured(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Secured]:
    folder, port = tmp_path_factory.mktemp("secured"), choose_port(server="the guarded listener")
    certificate, store = certificate_for(HOST, folder)

    def properties(log_dir: Path, **ports: int) -> str:
        text = server_properties(log_dir, **ports)
        text = text.replace("CONTROLLER:PLAINTEXT\n", "CONTROLLER:PLAINTEXT,GUARDED:SASL_SSL\n")
        text = text.replace("listeners=", f"listeners=GUARDED://{HOST}:{port},", 1)
        guarded = {
            "ssl.keystore.type": "PEM",
            "ssl.keystore.location": store,
            "sasl.enabled.mechanisms": ",".join(MECHANISMS),
            "plain.sasl.jaas.config": "org.apache.kafka.common.security.plain.PlainLoginModule required"
            f' user_{USER}="{PASSWORD}";',
        }
        scram = "org.apache.kafka.common.security.scram.ScramLoginModule required;"
        guarded |= {f"{each.lower()}.sasl.jaas.config": scram for each in MECHANISMS if each != "PLAIN"}
        return text + "".join(f"listener.name.guarded.{name}={value}\n" for name, value in guarded.items())

    with (
        mock.patch("streams.localstack.kafka.server_properties", properties),
        LocalStack(folder / "stack", StackOptions(services=("kafka",))) as stack,
    ):
        admin = AdminClient({"bootstrap.servers": stack.addresses["kafka"]})
        for mechanism in (ScramMechanism.SCRAM_SHA_256, ScramMechanism.SCRAM_SHA_512):
            change = UserScramCredentialUpsertion(USER, ScramCredentialInfo(mechanism, 4096), PASSWORD.encode())
            admin.alter_user_scram_credentials([change])[USER].result(timeout=30)
        yield Secured(f"{HOST}:{port}", certificate)


def certificate_for(host: str, folder: Path) -> tuple[Path, Path]:
    """A certificate that vouches for itself, alone and with its key, in PEM."""
    folder.mkdir(exist_ok=True)
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, host)])
    now = datetime.datetime.now(datetime.UTC)
    certificate = (
        x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address(host))]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    alone, with_key = folder / "certificate.pem", folder / "keystore.pem"
    alone.write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
    private = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    with_key.write_bytes(private + alone.read_bytes())
    return alone, with_key


@pytest.mark.parametrize("mechanism", MECHANISMS)
async def test_who_has_the_password_creates_topics_sends_and_reads(secured: Secured, mechanism: str) -> None:
    settings, topic = secured.settings(mechanism=mechanism), unique_name("guarded")
    await ensure_topics([TopicSpecification(topic, 1, exact=True, configuration={})], settings)
    came: asyncio.Queue[RecordBatch] = asyncio.Queue()
    producer = RdKafkaProducer(settings, client_id="a-producer", acks="all")
    tail = RdKafkaTail(settings, TopicPartition(topic, 0), client_id="a-tail", group="a-group", deliver=came.put_nowait)
    producer.start()
    try:
        await tail.start()
        await producer.send(topic, value=b"hello", partition=0)
        async with asyncio.timeout(30):
            assert (await came.get()).values == [b"hello"]
    finally:
        await asyncio.gather(producer.stop(), tail.stop())


@pytest.mark.parametrize("what", ["password", "broker"])
async def test_a_wrong_password_and_a_broker_that_nobody_vouches_for_are_no_connection(
    secured: Secured, what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("streams.adapters.kafka_librdkafka._START_SECONDS_MAX", 0.5)
    monkeypatch.setattr("streams.adapters.kafka_librdkafka._WATERMARK_SECONDS_MAX", 0.4)
    if what == "password":
        settings = secured.settings(password="guessed")
    else:
        settings = secured.settings(ca_file=certificate_for(HOST, tmp_path)[0])
    with pytest.raises((ConfigurationError, KafkaUnavailableError)):
        await ensure_topics([TopicSpecification("never", 1, exact=True, configuration={})], settings)
    tail = RdKafkaTail(settings, TopicPartition("never", 0), client_id="a-tail", group="a-group", deliver=print)
    with pytest.raises(KafkaUnavailableError, match="cannot be read"):
        await tail.start()
    await tail.stop()
