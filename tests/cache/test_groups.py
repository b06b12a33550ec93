import pytest

from headlong.cache.groups import HeadGroup, build_head_groups
from headlong.cache.policy import RETRIEVAL, HeadPolicy

STREAMING = HeadPolicy(sink_size=4, window_size=16)


def test_labels_give_two_groups() -> None:
    groups = build_head_groups([[True, False], [False, False]], STREAMING, [None, None])
    assert groups == (
        HeadGroup("retrieval", RETRIEVAL, ((0, 0),)),
        HeadGroup("streaming", STREAMING, ((0, 1), (1, 0), (1, 1))),
    )


@pytest.mark.parametrize(("label", "name"), [(True, "retrieval"), (False, "streaming")])
def test_a_group_without_members_is_left_out(label: bool, name: str) -> None:
    (group,) = build_head_groups([[label] * 2] * 3, STREAMING, [None] * 3)
    assert group.name == name
    assert len(group.members) == 6


def test_a_native_window_wins_over_the_labels() -> None:
    groups = build_head_groups(
        [[True, False], [True, False], [True, False]], STREAMING, [32, None, 32]
    )
    assert groups == (
        HeadGroup("retrieval", RETRIEVAL, ((1, 0),)),
        HeadGroup("streaming", STREAMING, ((1, 1),)),
        HeadGroup("sliding-32", HeadPolicy(0, 32), ((0, 0), (0, 1), (2, 0), (2, 1))),
    )


def test_each_native_window_is_a_group() -> None:
    groups = build_head_groups([[True]] * 3, STREAMING, [8, 64, 8])
    assert [(group.policy.window_size, group.members) for group in groups] == [
        (8, ((0, 0), (2, 0))),
        (64, ((1, 0),)),
    ]


def test_a_native_window_like_the_streaming_one_stays_apart() -> None:
    policy = HeadPolicy(sink_size=0, window_size=8)
    groups = build_head_groups([[False], [False]], policy, [None, 8])
    assert [group.name for group in groups] == ["streaming", "sliding-8"]


def test_every_head_is_in_exactly_one_group_and_groups_are_sorted() -> None:
    labels = [[(layer * head) % 3 == 0 for head in range(4)] for layer in range(6)]
    groups = build_head_groups(labels, STREAMING, [None, 8, None, None, 16, 8])
    everyone = [member for group in groups for member in group.members]
    assert sorted(everyone) == [(layer, head) for layer in range(6) for head in range(4)]
    for group in groups:
        assert list(group.members) == sorted(group.members)


def test_labels_and_windows_of_different_lengths_are_refused() -> None:
    with pytest.raises(ValueError, match="retrieval has 2 layers, native_windows has 3"):
        build_head_groups([[True], [True]], STREAMING, [None] * 3)
