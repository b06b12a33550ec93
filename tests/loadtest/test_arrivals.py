import math
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from headlong.loadtest.arrivals import ArrivalKind, Arrivals, constant, gamma, poisson, ramp

rates = st.floats(0.01, 1000)
seeds = st.integers(0, 1000)
processes = st.one_of(
    st.builds(constant, rates),
    st.builds(poisson, rates, seeds),
    st.builds(gamma, rates, st.floats(0.05, 20), seeds),
    st.builds(ramp, st.one_of(st.just(0.0), rates), rates, st.floats(0.1, 100), seeds),
)


@given(processes, st.integers(0, 200))
def test_times_ascend_from_zero_and_are_equal_for_equal_values(
    arrivals: Arrivals, count: int
) -> None:
    times = arrivals.times(count)
    assert len(times) == count
    assert times[:1] == [0.0][:count]
    assert times == sorted(times)
    assert all(math.isfinite(time) for time in times)
    assert arrivals.times(count + 5)[:count] == times


@given(rates, st.integers(2, 100))
def test_constant_arrivals_have_equal_gaps(rate: float, count: int) -> None:
    times = constant(rate).times(count)
    assert times == pytest.approx([index / rate for index in range(count)])


@pytest.mark.parametrize(
    ("arrivals", "variation"),
    [
        (poisson(4.0, 7), 1.0),
        (gamma(4.0, 1.0, 7), 1.0),
        (gamma(4.0, 0.25, 7), 2.0),
        (gamma(4.0, 16.0, 7), 0.25),
    ],
)
def test_gaps_have_the_mean_and_the_variation_of_their_kind(
    arrivals: Arrivals, variation: float
) -> None:
    """The coefficient of variation of a gamma distribution is 1 / sqrt(shape)."""
    count = 20_000
    times = arrivals.times(count + 1)
    gaps = [after - before for before, after in pairwise(times)]
    mean = sum(gaps) / count
    deviation = math.sqrt(sum((gap - mean) ** 2 for gap in gaps) / count)
    assert mean == pytest.approx(0.25, rel=0.05)
    assert deviation / mean == pytest.approx(variation, rel=0.05)


@pytest.mark.parametrize(("from_rate", "to_rate"), [(0.0, 40.0), (10.0, 50.0), (50.0, 10.0)])
def test_a_ramp_changes_its_rate_linearly_and_stays(from_rate: float, to_rate: float) -> None:
    duration = 200.0
    times = ramp(from_rate, to_rate, duration, seed=3).times(30_000)
    assert times[-1] > 1.5 * duration

    def seen(start: float, end: float) -> float:
        return sum(start <= time < end for time in times) / (end - start)

    middle = (from_rate + to_rate) / 2
    assert seen(0, duration / 2) == pytest.approx((from_rate + middle) / 2, rel=0.06)
    assert seen(duration / 2, duration) == pytest.approx((middle + to_rate) / 2, rel=0.06)
    assert seen(duration, 1.5 * duration) == pytest.approx(to_rate, rel=0.06)


def test_a_ramp_between_equal_rates_is_poisson() -> None:
    assert ramp(5.0, 5.0, 3.0, seed=1).times(100) == pytest.approx(poisson(5.0, 1).times(100))


def test_seeds_differ() -> None:
    assert poisson(1.0, 0).times(10) != poisson(1.0, 1).times(10)


@pytest.mark.parametrize("value", [0.0, -1.0, math.nan, math.inf, 5e-324])
def test_a_rate_that_is_none_is_refused(value: float) -> None:
    with pytest.raises(ValueError, match=rf"^rate must be above 0 and finite, got {value}$"):
        poisson(value)
    with pytest.raises(ValueError, match=r"^burstiness must be above 0 and finite"):
        gamma(1.0, value)
    with pytest.raises(ValueError, match=r"^duration_s must be above 0 and finite"):
        ramp(1.0, 2.0, value)


@pytest.mark.parametrize("value", [-1.0, math.nan, math.inf])
def test_a_ramp_from_an_impossible_rate_is_refused(value: float) -> None:
    with pytest.raises(ValueError, match=rf"^from_rate must be at least 0 and finite, got {value}"):
        ramp(value, 2.0, 1.0)


@pytest.mark.parametrize(
    ("kind", "given_values", "message"),
    [
        ("poisson", {"burstiness": 2.0}, "burstiness=2.0 means nothing for poisson arrivals"),
        ("gamma", {"burstiness": 2.0, "duration_s": 1.0}, "duration_s=1.0 means nothing for gamma"),
        ("gamma", {}, "gamma arrivals need burstiness"),
        ("ramp", {"from_rate": 1.0}, "ramp arrivals need duration_s"),
    ],
)
def test_a_number_that_is_missing_or_means_nothing_is_refused(
    kind: ArrivalKind, given_values: dict[str, float], message: str
) -> None:
    with pytest.raises(ValueError, match=f"^{message}"):
        Arrivals(kind, 1.0, **given_values)  # type: ignore[arg-type]


def test_an_unknown_kind_is_refused() -> None:
    with pytest.raises(ValueError, match=r"^kind must be one of constant, .*, got uniform$"):
        Arrivals("uniform", 1.0)  # type: ignore[arg-type]
