"""What docs/observability.md lists is what there is."""

import re
from pathlib import Path
from typing import get_args

import pytest
from prometheus_client.openmetrics.parser import text_string_to_metric_families

from headlong.server.telemetry.observer import FinishedAs
from headlong.server.telemetry.trace_spans import OPERATIONS, SPAN_NAME
from support.scrapes import real_scrape

ROOT = Path(__file__).parents[3]
TEXT = (ROOT / "docs" / "observability.md").read_text(encoding="utf-8")
ROWS = [re.split(r" *\| *", line.strip("| ")) for line in re.findall(r"^\| `.*$", TEXT, re.M)]
EVERYWHERE = {"model_name", "le", "quantile"}


@pytest.fixture(scope="module")
def found() -> dict[str, tuple[str, set[str]]]:
    """Type and labels of each metric of a real server, by the name that it is asked for."""
    families = text_string_to_metric_families(real_scrape("application/openmetrics-text"))
    metrics: dict[str, tuple[str, set[str]]] = {}
    for family in families:
        suffix = {"counter": "_total", "info": "_info"}.get(family.type, "")
        labels = set[str]().union(*(sample.labels for sample in family.samples))
        metrics[family.name + suffix] = family.type, labels - EVERYWHERE
    return metrics


def test_every_metric_is_listed_with_its_type_and_labels(
    found: dict[str, tuple[str, set[str]]],
) -> None:
    listed = {
        name.strip("`"): (kind, set(re.findall(r"`(\w+)`", labels)))
        for name, kind, labels, _ in ROWS
    }
    assert len(listed) == len(ROWS), "a metric is listed twice"
    ours = {
        name.removeprefix("headlong:"): told
        for name, told in found.items()
        if name.startswith("headlong:")
    }
    assert listed == ours


def test_every_row_says_what_it_is() -> None:
    assert all(len(meaning) > 5 for *_, meaning in ROWS)


@pytest.mark.parametrize(
    ("metric", "label"),
    [
        ("prefix_cache_misses", "reason"),
        ("request_success", "finished_reason"),
        ("canary_skipped", "reason"),
        ("engine_state", "state"),
        ("kv_cache_blocks", "state"),
    ],
)
def test_the_values_of_labels_are_listed(metric: str, label: str) -> None:
    (row,) = [row for row in ROWS if row[0].strip("`").removesuffix("_total") == metric]
    told = set(re.findall(r"`(\w+)`", row[3]))
    lines = re.findall(
        rf"^headlong:{metric}(?:_total)?{{.*\b{label}=\"(\w+)\"", real_scrape(), re.M
    )
    assert told == set(lines)


def test_every_end_of_a_completion_is_listed() -> None:
    for reason in get_args(FinishedAs):
        assert f"`{reason}`" in TEXT


def test_the_processes_own_metrics_are_there(found: dict[str, tuple[str, set[str]]]) -> None:
    others = {name for name in found if not name.startswith("headlong:")}
    assert "python_info" in others
    assert all(name.startswith("process_") for name in others - {"python_info"})


def test_what_is_traced_is_listed() -> None:
    assert SPAN_NAME in TEXT
    for path in OPERATIONS:
        assert f"`{path}`" in TEXT


def test_the_files_it_speaks_of_are_there() -> None:
    for target in re.findall(r"\]\(([^)#]+)", TEXT):
        assert (ROOT / "docs" / target).resolve().exists(), target
