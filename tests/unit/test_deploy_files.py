"""What docker-compose.yml and deploy/ say agrees with the code, as far as that can be seen without Docker."""

from __future__ import annotations

import itertools
import json
import re
import tomllib
from pathlib import Path
from typing import Any

import prometheus_client
import pytest
import yaml

from streams import telemetry
from streams.config import ENVIRONMENT_PREFIX, Settings
from streams.localstack.kafka_jars import FILES

ROOT = Path(__file__).resolve().parent.parent.parent
WORKERS = {"store", "sink"}
SERVICES = WORKERS | {"kafka", "redis", "clickhouse", "prometheus", "grafana"}


def _yaml(path: str) -> dict[str, Any]:
    content: dict[str, Any] = yaml.safe_load((ROOT / path).read_text())
    return content


COMPOSE = _yaml("docker-compose.yml")


def test_the_whole_system_is_described() -> None:
    assert set(COMPOSE["services"]) == SERVICES


@pytest.mark.parametrize("name", sorted(SERVICES))
def test_every_service_is_pinned_watched_and_restarted(name: str) -> None:
    service = COMPOSE["services"][name]
    assert re.fullmatch(r"[\w./-]+:v?\d+\.\d[\w.-]*", service["image"])
    assert service["healthcheck"]["test"][0] in ("CMD", "CMD-SHELL")
    assert service["restart"] == "unless-stopped"
    for port in service.get("ports", []):
        assert port.startswith("127.0.0.1:")


def test_every_named_volume_is_declared_and_every_mounted_file_exists() -> None:
    mounts = [mount.split(":") for service in COMPOSE["services"].values() for mount in service.get("volumes", [])]
    assert {source for source, *_ in mounts if not source.startswith(".")} == set(COMPOSE["volumes"])
    for source, *_ in mounts:
        assert not source.startswith(".") or (ROOT / source).exists()


def test_what_a_service_waits_for_can_be_waited_for() -> None:
    for service in COMPOSE["services"].values():
        for other, wait in service.get("depends_on", {}).items():
            assert other in SERVICES
            assert wait["condition"] in ("service_healthy", "service_started")


def test_no_panel_of_the_dashboard_hides_another() -> None:
    panels = json.loads((ROOT / "deploy/grafana/dashboards/pintail.json").read_text())["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    taken: dict[tuple[int, int], str] = {}
    for panel in panels:
        at = panel["gridPos"]
        for cell in itertools.product(range(at["x"], at["x"] + at["w"]), range(at["y"], at["y"] + at["h"])):
            assert taken.setdefault(cell, panel["title"]) == panel["title"]


@pytest.mark.parametrize("worker", sorted(WORKERS))
def test_the_settings_of_the_workers_are_settings_that_parse(worker: str) -> None:
    environment = COMPOSE["services"][worker]["environment"]
    values: dict[str, Any] = {}
    for name, value in environment.items():
        setting = name.removeprefix(ENVIRONMENT_PREFIX).lower()
        assert setting in Settings.model_fields
        values[setting] = re.sub(r"\$\{\w+:\?[^}]*\}", "ab" * 32, value)
    settings = Settings(**values)
    settings.require("kafka", "clickhouse")
    if worker == "store":
        settings.require("redis", "snapshot_key")
    assert COMPOSE["services"][worker]["command"] == [worker]


def test_secrets_come_from_outside_and_are_missed_when_absent() -> None:
    secrets = [
        (name, value)
        for service in COMPOSE["services"].values()
        for name, value in service.get("environment", {}).items()
        if re.search("KEY|PASSWORD", name) or "@" in value.partition("//")[2]
    ]
    assert {name for name, _ in secrets} >= {"PINTAIL_SNAPSHOT_KEY", "PINTAIL_CLICKHOUSE", "CLICKHOUSE_PASSWORD"}
    for _, value in secrets:
        assert re.fullmatch(r"(http://pintail:)?\$\{\w+:\?[^}]+\}(@clickhouse:8123/pintail)?", value)
    assert ".env" in (ROOT / ".gitignore").read_text().split()


def test_prometheus_scrapes_exactly_the_workers() -> None:
    jobs = {job["job_name"]: job["static_configs"] for job in _yaml("deploy/prometheus.yml")["scrape_configs"]}
    assert set(jobs) == WORKERS
    for worker, targets in jobs.items():
        port = COMPOSE["services"][worker]["environment"]["PINTAIL_METRICS_PORT"]
        assert targets == [{"targets": [f"{worker}:{port}"]}]


def test_alerts_are_where_prometheus_looks_for_them_and_ask_for_metrics_and_help_that_exist() -> None:
    mounts = {inside: outside for outside, inside in _mounts("prometheus")}
    assert [mounts[file] for file in _yaml("deploy/prometheus.yml")["rule_files"]] == ["./deploy/alerts.yml"]
    (group,) = _yaml("deploy/alerts.yml")["groups"]
    page = (ROOT / "docs/operations.md").read_text()
    for rule in group["rules"]:
        assert set(re.findall(r"pintail_\w+", rule["expr"])) <= _metrics_to_show()
        file, _, section = rule["annotations"]["help"].partition("#")
        assert file == "docs/operations.md"
        assert section in {re.sub(r"\W+", "-", title.lower()) for title in re.findall(r"^## (.+)$", page, re.MULTILINE)}


def test_the_dashboard_shows_only_metrics_that_workers_have_and_leaves_none_out() -> None:
    dashboard = json.loads((ROOT / "deploy/grafana/dashboards/pintail.json").read_text())
    panels = [panel for panel in dashboard["panels"] if panel["type"] != "row"]
    shown = {
        name for panel in panels for target in panel["targets"] for name in re.findall(r"pintail_\w+", target["expr"])
    }
    assert shown == _metrics_to_show()
    assert len({panel["title"] for panel in panels}) == len(panels)
    source = _yaml("deploy/grafana/provisioning/datasources/prometheus.yml")["datasources"][0]
    assert {panel["datasource"]["uid"] for panel in panels} == {source["uid"]}
    assert source["url"] == "http://prometheus:9090"


def _mounts(service: str) -> list[tuple[str, str]]:
    """(outside, inside) of each volume."""
    volumes = [volume.split(":") for volume in COMPOSE["services"][service]["volumes"]]
    return [(outside, inside) for outside, inside, *_ in volumes]


def test_the_dashboard_is_where_grafana_looks_for_it() -> None:
    provider = _yaml("deploy/grafana/provisioning/dashboards/pintail.yml")["providers"][0]
    mounts = dict(_mounts("grafana"))
    assert mounts["./deploy/grafana/dashboards"] == provider["options"]["path"]


def test_versions_agree_everywhere() -> None:
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    for worker in WORKERS:
        assert COMPOSE["services"][worker]["image"] == f"pintail:{version}"
    assert f"pintail:{version}" in (ROOT / "deploy/Dockerfile").read_text()
    kafka = re.search(r"<kafka.version>([\d.]+)<", (FILES / "pom.xml").read_text())
    assert kafka is not None
    assert COMPOSE["services"]["kafka"]["image"] == f"apache/kafka:{kafka[1]}"


def test_the_readme_says_which_clickhouse_is_tested_and_which_one_is_deployed() -> None:
    tested = re.search(r"^chdb-core==(\d+\.\d+)", (ROOT / "requirements.lock").read_text(), re.MULTILINE)
    deployed = COMPOSE["services"]["clickhouse"]["image"].partition(":")[2]
    assert tested
    said = " ".join((ROOT / "README.md").read_text().split())
    assert f"tested as the embedded {tested[1]} engine" in said
    assert tested[1] == deployed or f"not as the server {deployed} that `docker-compose.yml` runs" in said


def test_the_image_is_built_from_files_that_the_build_can_see_by_a_user_without_privileges() -> None:
    dockerfile = (ROOT / "deploy/Dockerfile").read_text()
    visible = {line.removeprefix("!") for line in (ROOT / ".dockerignore").read_text().splitlines() if line[0] == "!"}
    copied = {
        source
        for line in re.findall(r"^COPY (?!--from)(.*)$", dockerfile, re.MULTILINE)
        for source in line.split()[:-1]
    }
    assert copied == visible
    assert all((ROOT / source).exists() for source in copied)
    assert all(
        re.fullmatch(r"python:3\.\d+\.\d+-slim\S*", image) for image in re.findall(r"^FROM (\S+)", dockerfile, re.M)
    )
    assert "--require-hashes" in dockerfile
    assert re.search(r"^USER (?!root)\w+$", dockerfile, re.MULTILINE)


def _metrics_to_show() -> set[str]:
    """The names under which Prometheus stores what telemetry.py defines: the charted series of each metric."""
    names = set()
    for metric in vars(telemetry).values():
        match metric:
            case prometheus_client.Counter():
                names.add(f"{metric._name}_total")
            case prometheus_client.Histogram():
                names.add(f"{metric._name}_bucket")
            case prometheus_client.Gauge():
                names.add(metric._name)
    return names
