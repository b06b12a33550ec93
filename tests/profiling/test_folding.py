import pytest
from hypothesis import given
from hypothesis import strategies as st

from headlong.profiling.folding import fold_query_heads


def test_groups_neighbours() -> None:
    scores = [[0.0, 1.0, 0.5, 0.25], [0.1, 0.2, 0.3, 0.4]]
    assert fold_query_heads(scores, 2, "max") == ((1.0, 0.5), (0.2, 0.4))
    assert fold_query_heads(scores, 2, "mean") == (
        (0.5, 0.375),
        (pytest.approx(0.15), pytest.approx(0.35)),
    )


@given(st.lists(st.floats(0, 1), min_size=1, max_size=8))
def test_one_query_head_each_is_unchanged(row: list[float]) -> None:
    assert fold_query_heads([row], len(row), "max") == (tuple(row),)
    assert fold_query_heads([row], len(row), "mean") == (tuple(row),)


@given(st.integers(1, 4), st.integers(1, 4), st.data())
def test_mean_is_at_most_max(num_kv_heads: int, group_size: int, data: st.DataObject) -> None:
    size = num_kv_heads * group_size
    row = data.draw(st.lists(st.floats(0, 1), min_size=size, max_size=size))
    means, maxima = (fold_query_heads([row], num_kv_heads, fold)[0] for fold in ("mean", "max"))
    assert len(means) == len(maxima) == num_kv_heads
    assert all(m <= x + 1e-12 for m, x in zip(means, maxima, strict=True))


def test_refuses() -> None:
    with pytest.raises(ValueError, match="layer 1 has 3 query heads, which do not share 2 KV"):
        fold_query_heads([[0.0, 0.0], [0.0, 0.0, 0.0]], 2, "max")
    with pytest.raises(ValueError, match="layer 0 has 0 query heads"):
        fold_query_heads([[]], 1, "max")
    with pytest.raises(ValueError, match="num_kv_heads must be at least 1, got 0"):
        fold_query_heads([[0.0]], 0, "max")
    with pytest.raises(ValueError, match="fold must be one of max, mean, got 'sum'"):
        fold_query_heads([[0.0]], 1, "sum")
