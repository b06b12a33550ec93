"""Every series and label that the alert rules speak of is one that a server has."""

import re

import pytest
import yaml

from headlong.server.errors import HeadlongError
from support.deployment import DOCKER
from support.promql import grouping_labels, labels_of, scraped_series

RULES = [
    rule
    for group in yaml.safe_load((DOCKER / "prometheus" / "alerts.yml").read_text())["groups"]
    for rule in group["rules"]
]
# What Prometheus itself adds.
OF_PROMETHEUS = {"up": set()}
TARGET_LABELS = {"job", "instance"}


@pytest.fixture
def series(client, post):
    """Of a server that has answered one request and turned one away."""
    assert post("/v1/completions", max_tokens=2).status_code == 200
    assert post("/v1/completions", max_tokens=-1).status_code == 400
    return {**scraped_series(client.get("/metrics").text), **OF_PROMETHEUS}


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule["alert"])
def test_series_and_labels_are_real(rule, series):
    wanted = labels_of(rule["expr"])
    assert set(wanted) - set(series) == set()
    for name, labels in wanted.items():
        assert labels <= series[name] | TARGET_LABELS, name
    known = set.union(*(series[name] for name in wanted)) | TARGET_LABELS
    assert grouping_labels(rule["expr"]) <= known
    templates = " ".join(rule["annotations"].values())
    assert set(re.findall(r"\$labels\.(\w+)", templates)) <= known


def test_reasons_are_real():
    reasons = re.findall(r'reason=~?"([^"]+)"', " ".join(rule["expr"] for rule in RULES))
    assert {reason for each in reasons for reason in each.split("|")} <= _codes(HeadlongError)


def _codes(error):
    codes = {error.code} if getattr(error, "code", None) else set()
    return codes.union(*(_codes(each) for each in error.__subclasses__()))


def test_unreal_ones_are_found(series):
    assert "headlong:num_requests_sleeping" not in series
    assert "colour" not in series["headlong:num_requests_waiting"]
    assert series["headlong:request_rejections_total"] >= {"model_name", "reason"}
