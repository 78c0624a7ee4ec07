"""Typed settings: environment (`PINTAIL_*`) over `pintail.toml` over the running local stack over defaults.

All faults are reported at once, with the variable to set. Secrets never print.
"""

from __future__ import annotations

import json
import tomllib
from collections.abc import Collection, Iterator, Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal, Self
from urllib.parse import urlsplit

from pydantic import Field, SecretStr, ValidationError, ValidationInfo, field_validator, model_validator
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource, SettingsConfigDict

from streams.errors import ConfigurationError
from streams.limits import (
    INGEST_BUFFER_BYTES_MAX,
    MIB,
    QUERY_ANSWER_BYTES_MAX,
    QUERY_CHUNKED_BYTES_MAX,
    QUERY_ROWS_MAX,
    REFUSED_IN_A_ROW_MAX,
    SUBSCRIPTION_EVERY_MS_MIN,
    SUBSCRIPTIONS_BYTES_MAX,
    SUBSCRIPTIONS_MAX,
    SUBSCRIPTIONS_PER_CALLER_MAX,
)
from streams.urls import parse_url, redacted

ENVIRONMENT_PREFIX = "PINTAIL_"
SETTINGS_FILE = Path("pintail.toml")
#: Written by `pintail dev`, below the data directory: the addresses of the running local stack.
STACK_FILE_NAME = "stack.json"
#: Settings that are URLs, which may hold a password -> how to write one, and with which schemes.
URL_SETTINGS = {
    "redis": ("redis://:password@host:6379/0", ("redis", "rediss", "unix")),
    "clickhouse": ("http://user:password@host:8123/database", ("http", "https")),
}
PACKAGED_TABLES = Path(__file__).resolve().parent.parent / "schemas" / "tables"

#: What the patterns below mean, in words.
_FORMS = {
    "worker": "1 to 64 letters, digits, dots, underscores and hyphens, such as store-0",
    "store_memory_limit": "a number and a unit (KB, MB, GB, KiB, MiB or GiB), such as 512MB",
}


class Settings(BaseSettings):
    """Everything that can be configured. Durations carry their unit in the name."""

    model_config = SettingsConfigDict(env_prefix=ENVIRONMENT_PREFIX, extra="forbid", hide_input_in_errors=True)

    # Where things are
    kafka: str = Field(default="", description="Bootstrap servers, host:port, several with commas")
    redis: str = Field(default="", description="Redis URL, redis://:password@host:port/0")
    clickhouse: str = Field(default="", description="ClickHouse URL, http://user:password@host:8123/database")
    data_dir: Path = Field(default=Path(".pintail"), description="Folder of the local stack, of stores and of state")
    tables_dir: Path = Field(default=PACKAGED_TABLES, description="Folder with one folder of SQL files per table")

    # Schema registry
    schema_registry: str = Field(default="", description="Schema registry URL, http://host:8081, for tables in Avro")
    schema_registry_username: str = Field(default="", description="User of the schema registry (basic authentication)")
    schema_registry_password: SecretStr = Field(default=SecretStr(""), description="Password of the schema registry")

    # Kafka
    application: str = Field(default="pintail", description="Prefix of consumer groups, topics and Redis keys")
    kafka_security_protocol: Literal["PLAINTEXT", "SSL", "SASL_PLAINTEXT", "SASL_SSL"] = Field(
        default="PLAINTEXT", description="How clients connect to the brokers"
    )
    kafka_sasl_mechanism: Literal["PLAIN", "SCRAM-SHA-256", "SCRAM-SHA-512"] = Field(
        default="PLAIN", description="Mechanism of the SASL protocols"
    )
    kafka_username: str = Field(default="", description="User of the SASL protocols")
    kafka_password: SecretStr = Field(default=SecretStr(""), description="Password of the SASL protocols")
    kafka_ca_file: Path | None = Field(
        default=None, description="Certificates (PEM) to check the brokers against; without it, the system's"
    )
    topic_replication_factor: int = Field(default=1, ge=1, description="Replicas of the topics that Pintail creates")

    # Store worker
    worker: str = Field(
        default="store-0",
        pattern=r"^[A-Za-z0-9._-]{1,64}$",
        description="Name of this worker: unique in its group, and the same after a restart",
    )
    store_memory_limit: str = Field(
        default="512MB",
        pattern=r"^\d+(\.\d+)?\s?(KB|MB|GB|KiB|MiB|GiB)$",
        description="Memory of DuckDB's buffer pool, over all partitions of a worker",
    )
    store_threads: int = Field(
        default=1,
        ge=1,
        description="Threads of DuckDB for one statement; several run at once anyway. More make a large query faster "
        "where cores are idle, and every lookup and commit dearer",
    )
    ingest_buffer_bytes_max: int = Field(
        default=INGEST_BUFFER_BYTES_MAX, ge=MIB, description="Bytes fetched but not yet durable, per worker"
    )
    session_timeout_seconds: int = Field(
        default=10, ge=6, le=45, description="How long a worker may be away before its partitions move"
    )
    standby: int = Field(default=0, ge=0, le=9, description="Warm copies of each partition that other workers keep")
    revoke_seconds_max: float = Field(
        default=8.0,
        gt=0,
        le=25,
        description="Time to let partitions go, and at the end for a last snapshot; then transactions are rolled back",
    )
    metrics_port: int = Field(
        default=0, ge=0, le=65535, description="Port of /metrics, /health and /ready; 0 serves none of them"
    )
    metrics_host: str = Field(default="127.0.0.1", description="Address on which that port listens")

    # Queries
    query_rows_max: int = Field(default=QUERY_ROWS_MAX, ge=1, description="Rows of one answer")
    query_answer_bytes_max: int = Field(
        default=QUERY_ANSWER_BYTES_MAX, ge=1024, description="Bytes of one answer; keep it below max.message.bytes"
    )
    query_chunked_bytes_max: int = Field(
        default=QUERY_CHUNKED_BYTES_MAX, ge=1, description="Bytes of one answer that may come in several records"
    )
    query_concurrency_max: int = Field(default=4, ge=1, description="Queries that one worker runs at once")
    subscription_every_ms_min: int = Field(
        default=SUBSCRIPTION_EVERY_MS_MIN,
        ge=1,
        description="Shortest time between two pushes of a subscription",
    )
    subscriptions_max: int = Field(default=SUBSCRIPTIONS_MAX, ge=0, description="Subscriptions that one worker keeps")
    subscriptions_per_caller_max: int = Field(
        default=SUBSCRIPTIONS_PER_CALLER_MAX, ge=0, description="Of these, those of one caller"
    )
    subscriptions_bytes_max: int = Field(
        default=SUBSCRIPTIONS_BYTES_MAX, ge=0, description="Memory, in bytes, of the rows of all of them"
    )

    # Snapshots
    snapshot_key: SecretStr = Field(
        default=SecretStr(""),
        description="AES-256 key, 64 hexadecimal digits; older keys behind it, with commas, open what they sealed",
    )
    snapshot_key_file: Path | None = Field(
        default=None, description="File with the AES-256 key, if no key is given; older keys on lines of their own"
    )
    snapshot_interval_seconds: float = Field(
        default=30.0, gt=0, description="How often partitions that moved are snapshotted"
    )
    snapshot_after_bytes: int = Field(
        default=256 * MIB, ge=MIB, description="Bytes of new records after which a partition is snapshotted sooner"
    )
    snapshots_kept: int = Field(default=3, ge=1, description="Newest versions kept in Redis, per partition")
    snapshot_hours_kept: int = Field(
        default=0, ge=0, description="Past hours of which the newest version is kept besides, per partition"
    )
    snapshot_drill_interval_seconds: float = Field(
        default=86_400.0, ge=0, description="How often a partition's newest snapshot is restored as a drill; 0 is never"
    )
    snapshot_unsafe_redis_allowed: bool = Field(
        default=False, description="Accept a Redis that evicts or does not persist"
    )

    # Sink
    clickhouse_cluster: str = Field(
        default="",
        description="ClickHouse cluster to create tables on, replicated and distributed; without it, one server",
    )
    sink_flush_rows_max: int = Field(default=50_000, ge=1, description="Rows at which a micro-batch is delivered")
    sink_flush_bytes_max: int = Field(
        default=16 * MIB, ge=1024, description="Bytes of records at which a micro-batch is delivered"
    )
    sink_refused_in_a_row_max: int = Field(
        default=REFUSED_IN_A_ROW_MAX,
        ge=1,
        description="Records of a partition that ClickHouse refuses one after another before its delivery waits",
    )
    sink_flush_interval_ms: int = Field(
        default=200, ge=1, description="Age at which a micro-batch is delivered, from the one before"
    )

    @field_validator("snapshot_key")
    @classmethod
    def _snapshot_key_is_aes256(cls, key: SecretStr) -> SecretStr:
        for text in _keys_in(key):
            try:
                length = len(bytes.fromhex(text))
            except ValueError:
                length = 0
            if length != 32:
                raise ValueError("must be 64 hexadecimal digits (openssl rand -hex 32)")
        return key

    @field_validator("snapshot_key_file")
    @classmethod
    def _snapshot_key_file_holds_a_key(cls, path: Path | None) -> Path | None:
        if path is not None:
            cls._snapshot_key_is_aes256(_read_key(path))
        return path

    @model_validator(mode="after")
    def _take_snapshot_key_from_its_file(self) -> Self:
        if self.snapshot_key_file is not None and not self.snapshot_key.get_secret_value():
            self.snapshot_key = _read_key(self.snapshot_key_file)
            self.model_fields_set.discard("snapshot_key")  # it was not given itself
        return self

    @field_validator("kafka")
    @classmethod
    def _kafka_is_host_port(cls, servers: str) -> str:
        for server in filter(None, servers.split(",")):
            host, _, port = server.strip().rpartition(":")
            if not host or not port.isdigit() or "@" in host:
                shown = "what it names" if "@" in server else repr(server)
                raise ValueError(f"{shown} is not host:port")
        return servers

    @field_validator("schema_registry")
    @classmethod
    def _schema_registry_is_a_url(cls, url: str) -> str:
        parts = urlsplit(url)
        if url and (parts.scheme not in ("http", "https") or not parts.hostname):
            raise ValueError("must be a URL such as http://host:8081")
        if "@" in parts.netloc:
            raise ValueError("must not name a user: set PINTAIL_SCHEMA_REGISTRY_USERNAME and _PASSWORD instead")
        return url

    @field_validator(*URL_SETTINGS)
    @classmethod
    def _is_a_url(cls, url: str, info: ValidationInfo) -> str:
        assert info.field_name is not None
        example, schemes = URL_SETTINGS[info.field_name]
        if url:
            parse_url(url, schemes=schemes, example=example)
        return url

    def __repr_args__(self) -> Iterator[tuple[str, Any]]:
        """What `repr` and `str` show: no secrets."""
        return ((name, self.shown(name)) for name in type(self).model_fields)

    def shown(self, name: str) -> Any:
        """The value of a setting, fit to be shown."""
        value = getattr(self, name)
        return redacted(value) if name in URL_SETTINGS else value

    @property
    def snapshot_keys(self) -> list[bytes]:
        """The key that seals snapshots, then older ones."""
        return [bytes.fromhex(text) for text in _keys_in(self.snapshot_key)]

    @property
    def query_topic(self) -> str:
        """Where queries are asked."""
        return f"{self.application}.query"

    @property
    def query_dead_letter_topic(self) -> str:
        """Where requests go that cannot even be refused (nowhere to reply to)."""
        return f"{self.query_topic}.dead-letters"

    @property
    def reply_topic(self) -> str:
        """Where the client has its replies sent."""
        return f"{self.application}.replies"

    @property
    def part_topic(self) -> str:
        """Where store workers have the parts of an answer sent that they put together."""
        return f"{self.query_topic}.parts"

    @property
    def store_group(self) -> str:
        """Consumer group of the store workers."""
        return f"{self.application}-store"

    @property
    def sink_group(self) -> str:
        """Consumer group of the sink workers."""
        return f"{self.application}-sink"

    @property
    def store_dir(self) -> Path:
        """Where this worker keeps its partition files."""
        return self.data_dir / "stores" / self.worker

    def require(self, *names: Literal["kafka", "redis", "clickhouse", "snapshot_key", "schema_registry"]) -> None:
        """ConfigurationError that names every one of `names` that is not set."""
        missing = []
        for name in names:
            value = getattr(self, name)
            if not (value.get_secret_value() if isinstance(value, SecretStr) else value):
                missing.append(f"{ENVIRONMENT_PREFIX}{name.upper()}")
        if missing:
            raise ConfigurationError(
                f"not set: {', '.join(missing)}",
                hint="set them in the environment or in pintail.toml, or start a local stack with `pintail dev`",
            )

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Explicit arguments and the environment only; `load_settings` merges the files beneath them."""
        del settings_cls, dotenv_settings, file_secret_settings
        return env_settings, init_settings


def load_settings(settings_file: Path = SETTINGS_FILE, *, running_stack: bool = True, **overrides: Any) -> Settings:
    """Environment over `overrides` over the settings file over the running local stack over defaults.

    `running_stack=False` leaves out the local stack, for the one who is about to start it. Raises ConfigurationError
    that lists every fault.
    """
    in_file = _read_toml(settings_file)
    unknown = [name for name in in_file if name not in Settings.model_fields]
    values = {**{name: value for name, value in in_file.items() if name not in unknown}, **overrides}
    data_dir = Path(_from_environment("data_dir") or str(values.get("data_dir") or ".pintail"))
    if running_stack:
        values = {**read_stack_file(data_dir), **values}
    faults = [f"{settings_file}: {name}: no such setting{_did_you_mean(name)}" for name in unknown]
    try:
        settings = Settings(**values)
    except ValidationError as error:
        faults += [_fault(detail, settings_file, in_file) for detail in error.errors()]
    if faults:
        raise ConfigurationError(
            "settings that cannot be used:\n  " + "\n  ".join(faults),
            hint="correct them in the environment or in pintail.toml; `pintail config` shows all settings",
        )
    return settings


def read_stack_file(data_dir: Path) -> dict[str, str]:
    """The settings that a running local stack left for other processes; empty if none runs."""
    settings = _read_stack(data_dir).get("settings", {})
    return {name: value for name, value in settings.items() if name in Settings.model_fields}


def read_stack_processes(data_dir: Path) -> dict[str, dict[str, Any]]:
    """Name -> `pid`, `port` and `log` of each process of the running local stack; empty if none runs."""
    return dict(_read_stack(data_dir).get("processes", {}))


def _read_stack(data_dir: Path) -> dict[str, Any]:
    try:
        stack: dict[str, Any] = json.loads((data_dir / STACK_FILE_NAME).read_text())
    except FileNotFoundError:
        return {}
    return stack


def _fault(detail: Mapping[str, Any], settings_file: Path, in_file: Collection[str]) -> str:
    """One validation fault: where the value was set, and what it must be."""
    name = str(detail["loc"][0]) if detail["loc"] else "settings"
    from_file = name in in_file and _from_environment(name) is None
    where = f"{settings_file}: {name}" if from_file else f"{ENVIRONMENT_PREFIX}{name.upper()}"
    if detail["type"] == "string_pattern_mismatch":
        return f"{where}: {detail['input']!r} is not {_FORMS[name]}"
    return f"{where}: {str(detail['msg']).removeprefix('Value error, ')}"


def _did_you_mean(name: str) -> str:
    """The setting that an unknown key resembles, also if it is spelt as its variable."""
    plain = name.lower().removeprefix(ENVIRONMENT_PREFIX.lower())
    near = get_close_matches(plain, list(Settings.model_fields), n=1)
    return f"; did you mean {near[0]}?" if near else ""


def _keys_in(key: SecretStr) -> list[str]:
    return key.get_secret_value().replace(",", " ").split()


def _read_key(path: Path) -> SecretStr:
    try:
        return SecretStr(path.read_text().strip())
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror}") from None


def _read_toml(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text())
    except FileNotFoundError:
        return {}
    except tomllib.TOMLDecodeError as error:
        raise ConfigurationError(f"{path}: {error}", hint="correct the TOML syntax") from None


def _from_environment(name: str) -> str | None:
    import os

    return os.environ.get(f"{ENVIRONMENT_PREFIX}{name.upper()}")
