import shutil
from unittest.mock import Mock

import pytest

from headlong.server.api.routes_metrics import metrics_router
from support.deployment import DOCKER, read_yaml, run
from support.promql import metric_names

CONFIG = read_yaml(DOCKER / "prometheus" / "prometheus.yml")
RULES = [
    rule
    for group in read_yaml(DOCKER / "prometheus" / "alerts.yml")["groups"]
    for rule in group["rules"]
]
COMPOSE = read_yaml(DOCKER / "compose.yaml")


def _job(name):
    (job,) = [each for each in CONFIG["scrape_configs"] if each["job_name"] == name]
    return job


def test_the_rules_are_read():
    assert CONFIG["rule_files"] == ["alerts.yml"]
    assert "./prometheus:/etc/prometheus:ro" in COMPOSE["services"]["prometheus"]["volumes"]


def test_the_server_is_asked_where_it_is_with_a_key_that_is_there():
    job = _job("headlong")
    assert job["static_configs"] == [{"targets": ["headlong:8000"]}]
    assert "headlong" in COMPOSE["services"]
    assert COMPOSE["services"]["headlong-cpu"]["networks"]["default"]["aliases"] == ["headlong"]
    # The path that Prometheus takes when none is given.
    assert "metrics_path" not in job
    assert "/metrics" in {getattr(route, "path", "") for route in metrics_router(Mock()).routes}
    secret = COMPOSE["services"]["prometheus"]["secrets"][0]
    assert job["authorization"]["credentials_file"] == f"/run/secrets/{secret['target']}"


def test_grafana_asks_prometheus_and_finds_its_dashboards():
    provisioning = DOCKER / "grafana" / "provisioning"
    (source,) = read_yaml(provisioning / "datasources" / "prometheus.yaml")["datasources"]
    assert source["url"] == "http://prometheus:9090"
    assert source["jsonData"]["timeInterval"] == CONFIG["global"]["scrape_interval"]
    (provider,) = read_yaml(provisioning / "dashboards" / "headlong.yaml")["providers"]
    mounted = [v.split(":")[1] for v in COMPOSE["services"]["grafana"]["volumes"]]
    assert provider["options"]["path"] in mounted


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule["alert"])
def test_alerts_are_complete(rule):
    assert set(rule) <= {"alert", "expr", "for", "labels", "annotations"}
    assert rule["labels"]["severity"] in {"critical", "warning"}
    assert set(rule["annotations"]) == {"summary", "description"}
    assert "$labels.instance" in rule["annotations"]["summary"]
    assert metric_names(rule["expr"])


def test_every_alert_is_explained():
    text = (DOCKER.parent / "docs" / "docker.md").read_text(encoding="utf-8")
    assert [rule["alert"] for rule in RULES if f"`{rule['alert']}`" not in text] == []


@pytest.mark.skipif(shutil.which("promtool") is None, reason="needs promtool, of Prometheus")
@pytest.mark.parametrize("command", ["check rules alerts.yml", "test rules alerts_test.yml"])
def test_promtool_agrees(command):
    done = run("promtool", *command.split(), cwd=DOCKER / "prometheus")
    assert done.returncode == 0, done.stdout + done.stderr
