"""Every query of the dashboard is one that a real server answers."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from support.promql import grouping_labels, labels_of, metric_names, scraped_series
from support.scrapes import real_scrape

FILE = Path(__file__).parents[3] / "docker" / "grafana" / "dashboards" / "headlong.json"
DASHBOARD = json.loads(FILE.read_text(encoding="utf-8"))
PANELS = [each for each in DASHBOARD["panels"] if each["type"] != "row"]
ROWS = [each["title"] for each in DASHBOARD["panels"] if each["type"] == "row"]
VARIABLES = {each["name"]: each for each in DASHBOARD["templating"]["list"]}
SOURCE = {"type": "prometheus", "uid": "${datasource}"}
# What Prometheus adds to every series.
ADDED = {"instance", "job"}
# Told elsewhere, or of no interest over time.
UNSHOWN = {
    "cache_config_info",
    "engine_process_start_time_seconds",
    "engine_process_virtual_memory_bytes",
}


def queries() -> Iterator[tuple[str, str]]:
    """Where each query stands, and the query."""
    for panel in PANELS:
        for target in panel["targets"]:
            yield f"{panel['title']} {target['refId']}", target["expr"]
    for each in DASHBOARD["annotations"]["list"]:
        yield f"annotation {each['name']}", each["expr"]


QUERIES = pytest.mark.parametrize("expression", [pytest.param(e, id=i) for i, e in queries()])
EACH_PANEL = pytest.mark.parametrize(
    "panel", [pytest.param(each, id=each["title"]) for each in PANELS]
)


@pytest.fixture(scope="module")
def series() -> dict[str, set[str]]:
    return scraped_series(real_scrape())


@pytest.fixture(scope="module")
def kinds() -> dict[str, str]:
    """Type of each series by its full name, of a histogram or summary with the suffix."""
    found: dict[str, str] = {}
    for family in text_string_to_metric_families(real_scrape()):
        for sample in family.samples:
            suffix = sample.name.removeprefix(family.name)
            cumulative = family.type in {"histogram", "summary"} and suffix != "_created"
            found[sample.name] = f"{family.type}{suffix}" if cumulative else family.type
    return found


@QUERIES
def test_the_server_has_what_a_query_asks_for(series: dict[str, set[str]], expression: str) -> None:
    asked = labels_of(expression)
    assert asked
    for name, labels in asked.items():
        assert name in series, f"no such series: {name}"
        assert labels <= series[name] | ADDED, f"{name} has no {labels - series[name] - ADDED}"
    known = set[str]().union(ADDED, *(series[name] for name in asked))
    assert grouping_labels(expression) <= known


@QUERIES
def test_every_series_is_chosen_by_the_variables(
    series: dict[str, set[str]], expression: str
) -> None:
    for name, labels in labels_of(expression).items():
        wanted = {"instance", "model_name"} if "model_name" in series[name] else {"instance"}
        assert wanted <= labels, f"{name} ignores {wanted - labels}"


@QUERIES
def test_rates_are_of_what_only_grows(kinds: dict[str, str], expression: str) -> None:
    grows = ("counter", "histogram_bucket", "histogram_sum", "histogram_count", "summary_sum",
             "summary_count")  # fmt: skip
    rated = re.findall(r"\b(?:rate|irate|increase)\s*\(\s*([\w:]+)", expression)
    assert all(kinds[name] in grows for name in rated)
    # The sum of a counter over restarts says nothing.
    unrated = metric_names(expression) - set(rated)
    assert all(kinds[name] == "gauge" for name in unrated), unrated


@QUERIES
def test_quantiles_are_of_buckets(kinds: dict[str, str], expression: str) -> None:
    if "histogram_quantile" in expression:
        assert "by (le" in expression
        assert all(kinds[name] == "histogram_bucket" for name in metric_names(expression))


@QUERIES
def test_nothing_is_divided_by_zero(expression: str) -> None:
    """Of an idle server 0 / 0 would be shown as NaN; what is filtered out is shown as no value."""
    for divisor in re.findall(r" / (?:ignoring \(\w+\) group_left \(\) )?(.*)", expression):
        assert divisor.endswith(" > 0)") or re.match(r"[\w:]+_max_fds{", divisor), divisor


@EACH_PANEL
def test_a_single_value_is_never_nan(panel: dict[str, Any]) -> None:
    for target in panel["targets"] if panel["type"] == "stat" else []:
        if "histogram_quantile" in target["expr"]:
            assert target["expr"].endswith(" >= 0")
        if re.search(r" / | >= 0$", target["expr"]):
            assert panel["fieldConfig"]["defaults"]["noValue"]


@QUERIES
def test_brackets_are_balanced(expression: str) -> None:
    for opening, closing in ("()", "{}", "[]"):
        assert expression.count(opening) == expression.count(closing)
    assert expression.count('"') % 2 == 0


@EACH_PANEL
def test_a_panel_says_what_it_shows(panel: dict[str, Any]) -> None:
    assert panel["title"] and panel["description"].endswith(".")
    assert panel["datasource"] == SOURCE
    assert panel["fieldConfig"]["defaults"]["unit"]
    assert panel["targets"]
    references = [each["refId"] for each in panel["targets"]]
    assert len(set(references)) == len(references)
    assert all(each["datasource"] == SOURCE for each in panel["targets"])


@EACH_PANEL
def test_legends_tell_the_lines_apart(series: dict[str, set[str]], panel: dict[str, Any]) -> None:
    legends = [each["legendFormat"] for each in panel["targets"]]
    assert len(set(legends)) == len(legends)
    if panel["type"] not in {"stat", "table"}:
        assert all(legends)
    for target in panel["targets"]:
        known = set[str]().union(ADDED, *(series[name] for name in metric_names(target["expr"])))
        assert set(re.findall(r"{{(\w+)}}", target["legendFormat"])) <= known


@EACH_PANEL
def test_thresholds_rise(panel: dict[str, Any]) -> None:
    steps = panel["fieldConfig"]["defaults"]["thresholds"]["steps"]
    values = [each["value"] for each in steps]
    assert values[0] is None
    assert values[1:] == sorted(set(values[1:]))


def test_all_that_is_measured_is_shown(series: dict[str, set[str]]) -> None:
    shown = {
        re.sub(r"_(bucket|sum|count)$", "", name)
        for _, expression in queries()
        for name in metric_names(expression)
    }
    there = {
        re.sub(r"_(bucket|sum|count)$", "", name)
        for name in series
        if name.startswith("headlong:") and not name.endswith("_created")
    }
    assert there - shown == {f"headlong:{name}" for name in UNSHOWN}


@pytest.mark.parametrize("name", ["model_name", "instance"])
def test_variables_ask_for_what_is_there(series: dict[str, set[str]], name: str) -> None:
    variable = VARIABLES[name]
    assert variable["datasource"] == SOURCE
    query = variable["query"]["query"]
    assert query == variable["definition"]
    selector, label = re.fullmatch(r"label_values\((.+), (\w+)\)", query).groups()  # type: ignore[union-attr]
    assert label == name
    for metric, labels in labels_of(selector).items():
        assert {*labels, label} <= series[metric] | ADDED


def test_only_variables_that_exist_are_used() -> None:
    used = set(re.findall(r"\$\{?(\w+)", FILE.read_text(encoding="utf-8")))
    assert used - {"__rate_interval", "__all"} == set(VARIABLES)
    assert VARIABLES["datasource"]["query"] == "prometheus"


def test_ids_are_unique_and_panels_do_not_overlap() -> None:
    ids = [each["id"] for each in DASHBOARD["panels"]]
    assert len(set(ids)) == len(ids)
    taken: set[tuple[int, int]] = set()
    for panel in DASHBOARD["panels"]:
        place = panel["gridPos"]
        assert place["x"] + place["w"] <= 24
        cells = {
            (place["x"] + column, place["y"] + line)
            for column in range(place["w"])
            for line in range(place["h"])
        }
        assert not cells & taken, panel["title"]
        taken |= cells


def test_the_dashboard_as_a_whole() -> None:
    assert ROWS == [
        "Overview",
        "Latency",
        "Throughput",
        "Head-aware cache",
        "Prefix cache",
        "Host and disk",
        "Engine",
        "Quality (canary)",
        "Process",
    ]
    assert DASHBOARD["schemaVersion"] >= 41
    assert DASHBOARD["timezone"] == "browser"
    # One that is provisioned has no id of its own: Grafana gives it one.
    assert DASHBOARD["uid"] == "headlong" and "id" not in DASHBOARD


def test_a_query_that_is_wrong_is_found(series: dict[str, set[str]]) -> None:
    for wrong in ("headlong:nothing", 'headlong:num_requests_waiting{engine="0"}'):
        with pytest.raises(AssertionError):
            test_the_server_has_what_a_query_asks_for(series, wrong)
