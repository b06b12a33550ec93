"""Heads dealt to ranks: every head once, as many on each rank, retrieval heads shared out."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from headlong.server.engine.head_dealing import HeadDealing, deal_heads


@st.composite
def dealings(draw: st.DrawFn) -> tuple[list[list[bool]], int]:
    num_ranks = draw(st.integers(1, 8))
    layer = st.lists(st.booleans(), min_size=1, max_size=32)
    per_rank = draw(st.integers(1, 8))
    labels = draw(
        st.lists(
            layer.map(lambda labels: (labels * per_rank * num_ranks)[: per_rank * num_ranks]),
            min_size=1,
            max_size=12,
        )
    )
    return labels, num_ranks


def retrieval_counts(labels: list[list[bool]], dealing: HeadDealing) -> list[list[int]]:
    return [
        [sum(row[head] for head in heads) for heads in ranks]
        for row, ranks in zip(labels, dealing.heads, strict=True)
    ]


@given(dealings())
def test_every_head_is_dealt_once_and_every_rank_has_as_many(
    case: tuple[list[list[bool]], int],
) -> None:
    labels, num_ranks = case
    dealing = deal_heads(labels, num_ranks)
    assert dealing.num_ranks == num_ranks
    for layer, row in enumerate(labels):
        assert sorted(dealing.order(layer)) == list(range(len(row)))
        assert {len(heads) for heads in dealing.heads[layer]} == {len(row) // num_ranks}
        assert all(list(heads) == sorted(heads) for heads in dealing.heads[layer])


@given(dealings())
def test_no_two_ranks_differ_by_more_than_one_retrieval_head(
    case: tuple[list[list[bool]], int],
) -> None:
    labels, num_ranks = case
    totals = [0] * num_ranks
    for counts in retrieval_counts(labels, deal_heads(labels, num_ranks)):
        totals = [total + count for total, count in zip(totals, counts, strict=True)]
        assert max(counts) - min(counts) <= 1
        assert max(totals) - min(totals) <= 1


@given(dealings())
def test_a_ranks_members_are_its_slice_of_the_order(case: tuple[list[list[bool]], int]) -> None:
    labels, num_ranks = case
    dealing = deal_heads(labels, num_ranks)
    for rank in range(num_ranks):
        members = dealing.members(rank)
        for layer, row in enumerate(labels):
            share = len(row) // num_ranks
            own = dealing.order(layer)[rank * share : (rank + 1) * share]
            assert [members[layer, head] for head in own] == list(range(share))
            assert sum(key[0] == layer for key in members) == share


@pytest.mark.parametrize("keeps_all", [True, False])
def test_heads_that_are_all_alike_stay_where_they_are(keeps_all: bool) -> None:
    dealing = deal_heads([[keeps_all] * 8] * 3, 4)
    assert [dealing.order(layer) for layer in range(3)] == [tuple(range(8))] * 3


def test_an_unlucky_profile_is_dealt_evenly() -> None:
    """Slices as they come would give all retrieval heads to rank 0."""
    dealing = deal_heads([[True, True, False, False], [True, False, False, False]] * 2, 2)
    assert dealing.heads == (
        ((0, 2), (1, 3)),
        ((0, 1), (2, 3)),
        ((0, 2), (1, 3)),
        ((1, 2), (0, 3)),
    )


@pytest.mark.parametrize(
    ("labels", "num_ranks", "message"),
    [
        ([[True] * 3], 2, "3 KV heads of layer 0 cannot be dealt to 2 ranks"),
        ([[True] * 2, []], 2, "0 KV heads of layer 1"),
        ([], 2, "at least one layer"),
        ([[True]], 0, "num_ranks must be at least 1, got 0"),
    ],
)
def test_what_cannot_be_dealt(labels: list[list[bool]], num_ranks: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        deal_heads(labels, num_ranks)
