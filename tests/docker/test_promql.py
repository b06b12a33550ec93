"""What the tests of alerts and dashboard read from expressions."""

import pytest

from support.promql import grouping_labels, labels_of, metric_names, scraped_series

RATIO = """
histogram_quantile(0.99, sum by (le, model_name) (
  rate(headlong:ttft_bucket{model_name=~"$model", job!="x and y"}[$__rate_interval])
)) > 1e3 and on (instance) up{job="a{b}"} == 0
"""


@pytest.mark.parametrize(
    ("expression", "names"),
    [
        ("up", {"up"}),
        ("absent(up)", {"up"}),
        (RATIO, {"headlong:ttft_bucket", "up"}),
        ("a / ignoring (reason) group_left b offset 1h", {"a", "b"}),
        ("sum(rate(a[5m:1m] offset 1d)) without (x) / 2.5e-3 unless b_2", {"a", "b_2"}),
        ("{job='a'} or vector(0)", set()),
        ("topk(5, a{}) - on (x) c * Inf", {"a", "c"}),
        ('label_replace(a, "dst", \'$1\', `src`, "(.*)")', {"a"}),
        ("rate(a[${window}]) > bool [[limit]]", {"a"}),
    ],
)
def test_names(expression: str, names: set[str]) -> None:
    assert metric_names(expression) == names


def test_labels() -> None:
    assert labels_of(RATIO) == {"headlong:ttft_bucket": {"model_name", "job"}, "up": {"job"}}
    assert labels_of('a{x="1"} + a{y!~"2"} + b') == {"a": {"x", "y"}, "b": set()}
    assert grouping_labels(RATIO) == {"le", "model_name", "instance"}
    assert grouping_labels('sum(a{text="by (x)"})') == set()


def test_series() -> None:
    text = (
        '# TYPE a counter\na_total{x="1"} 1\na_total{y="1"} 1\n# TYPE b counter\n'
        '# TYPE c histogram\nc_bucket{le="+Inf"} 0\nc_count 0\nc_sum 0\n'
    )
    assert scraped_series(text) == {
        "a_total": {"x", "y"},
        "b_total": set(),
        "c_bucket": {"le"},
        "c_count": set(),
        "c_sum": set(),
    }
