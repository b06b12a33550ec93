from dataclasses import fields, replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from headlong.kernels.layout import (
    GROUP_ALIGNMENT_BYTES,
    QUANTISATIONS,
    SECTION_ALIGNMENT_BYTES,
    ArenaLayout,
    PageLayout,
    build_arena_layout,
    view_pages,
)

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
FORMATS = [None, *QUANTISATIONS.values()]
PAGE = PageLayout(block_size=4, head_dim=2, dtype=torch.float32)

page_layouts = st.builds(
    PageLayout,
    block_size=st.integers(1, 20),
    head_dim=st.sampled_from([2, 8, 10, 80]),
    dtype=st.sampled_from(DTYPES),
    quantisation=st.sampled_from(FORMATS),
    summarised=st.booleans(),
    compensated=st.booleans(),
)


@st.composite
def layouts(draw: st.DrawFn) -> tuple[ArenaLayout, tuple[tuple[tuple[int, int], ...], ...]]:
    """A layout, and the members of its groups."""
    num_layers, num_kv_heads = draw(st.integers(1, 4)), draw(st.integers(1, 4))
    num_groups = draw(st.integers(1, min(3, num_layers * num_kv_heads)))
    heads = [(layer, head) for layer in range(num_layers) for head in range(num_kv_heads)]
    groups: list[list[tuple[int, int]]] = [[] for _ in range(num_groups)]
    for index, head in enumerate(draw(st.permutations(heads))):
        # The first ones make sure that no group is empty.
        group = index if index < num_groups else draw(st.integers(0, num_groups - 1))
        groups[group].append(head)
    members = tuple(tuple(sorted(group)) for group in groups)
    pages = tuple(draw(page_layouts) for _ in members)
    num_blocks = tuple(draw(st.integers(1, 5)) for _ in members)
    return build_arena_layout(members, pages, num_blocks), members


def test_page_bytes() -> None:
    assert PAGE.page_bytes == 2 * 4 * 2 * 4
    page = PageLayout(16, 128, torch.bfloat16)
    assert page.page_bytes == 8192
    scales = 2 * 16 * 2
    assert replace(page, quantisation=QUANTISATIONS["int8"]).page_bytes == 4096 + scales
    assert replace(page, quantisation=QUANTISATIONS["fp8"]).page_bytes == 4096 + scales
    assert replace(page, quantisation=QUANTISATIONS["int4"]).page_bytes == 2048 + 2 * scales
    assert replace(page, summarised=True).page_bytes == 8192 + 4 * 128 * 2
    assert replace(page, compensated=True).page_bytes == 8192 + 2 * 128 * 4


@given(page_layouts)
def test_what_a_token_takes_is_what_its_page_takes(page: PageLayout) -> None:
    """But for what pages say of all their tokens, and what alignment costs."""
    summaries = 4 * page.head_dim * page.dtype.itemsize * page.summarised
    summaries += 2 * 4 * page.head_dim * page.compensated
    rest = page.page_bytes - summaries - page.block_size * page.entry_bytes
    assert 0 <= rest < 6 * SECTION_ALIGNMENT_BYTES


@given(page_layouts)
def test_sections_are_aligned_and_do_not_overlap(page: PageLayout) -> None:
    """Each section is written with a byte of its own, and all are there at the end."""
    layout = build_arena_layout((((0, 0), (0, 1)),), (page,), (3,))
    arena = torch.zeros(layout.total_bytes, dtype=torch.uint8)
    views = view_pages(layout, arena, 0)
    sections = {each.name: getattr(views, each.name) for each in fields(views)}
    assert (sections["scales"] is None) == (page.quantisation is None)
    assert (sections["minima"] is None) == (page.quantisation != QUANTISATIONS["int4"])
    assert (sections["bounds"] is None) == (not page.summarised)
    assert (sections["sums"] is None) == (not page.compensated)
    there = {name: section for name, section in sections.items() if section is not None}
    for number, section in enumerate(there.values(), start=1):
        assert section.shape[:2] == (3, 2)
        address = section[1, 1].data_ptr() - layout.view_group(arena, 0)[1, 1].data_ptr()
        assert address % SECTION_ALIGNMENT_BYTES == 0
        section.view(torch.uint8).fill_(number)
    for number, section in enumerate(there.values(), start=1):
        assert (section.view(torch.uint8) == number).all()
    taken = sum(section.nbytes for section in there.values())
    assert (arena != 0).sum() == taken
    assert taken <= 6 * page.page_bytes < taken + 6 * 6 * SECTION_ALIGNMENT_BYTES


@given(layouts())
def test_pages_are_disjoint_and_cover_the_arena(
    case: tuple[ArenaLayout, tuple[tuple[tuple[int, int], ...], ...]],
) -> None:
    layout, members = case
    taken = torch.zeros(layout.total_bytes, dtype=torch.int64)
    for group, heads in enumerate(members):
        for layer, kv_head in heads:
            owner, page = layout.head_page(layer, kv_head)
            assert owner == group
            page_bytes = layout.pages[group].page_bytes
            for block in range(layout.num_blocks[group]):
                start = layout.group_bases[group] + page_bytes * (
                    block * layout.group_pages[group] + page
                )
                taken[start : start + page_bytes] += 1
    assert taken.max() == 1
    # What no page takes is less than an alignment at the end of each group.
    assert (taken == 0).sum() < layout.num_groups * GROUP_ALIGNMENT_BYTES
    for group, base in enumerate(layout.group_bases):
        assert base % GROUP_ALIGNMENT_BYTES == 0
        size = layout.num_blocks[group] * layout.block_bytes(group)
        assert taken[base : base + size].all()


@given(layouts())
def test_a_view_agrees_with_the_formula(
    case: tuple[ArenaLayout, tuple[tuple[tuple[int, int], ...], ...]],
) -> None:
    layout, members = case
    arena = torch.zeros(layout.total_bytes, dtype=torch.uint8)
    for group, heads in enumerate(members):
        page = layout.pages[group]
        view = layout.view_group(arena, group)
        assert view.dtype == torch.uint8
        assert view.shape == (layout.num_blocks[group], len(heads), page.page_bytes)
        for layer, kv_head in heads:
            _, index = layout.head_page(layer, kv_head)
            address = view[-1, index].data_ptr() - arena.data_ptr()
            block = layout.num_blocks[group] - 1
            assert address == layout.group_bases[group] + page.page_bytes * (
                block * layout.group_pages[group] + index
            )
        pages = view_pages(layout, arena, group)
        # K first, then V.
        assert pages.keys.data_ptr() == view.data_ptr()
        assert pages.values.data_ptr() == view.data_ptr() + page.values_at
        assert pages.keys[-1, -1].data_ptr() == view[-1, -1].data_ptr()


@given(layouts())
def test_heads_of_a_layer_and_group_are_neighbours(
    case: tuple[ArenaLayout, tuple[tuple[tuple[int, int], ...], ...]],
) -> None:
    layout, members = case
    found = [
        (heads.group, (layer, kv_head), heads.first_page + index)
        for layer, groups in enumerate(layout.layers)
        for heads in groups
        for index, kv_head in enumerate(heads.kv_heads)
    ]
    expected = [
        (group, head, index)
        for group, heads in enumerate(members)
        for index, head in enumerate(heads)
    ]
    assert sorted(found) == sorted(expected)


def test_a_head_that_the_model_lacks_has_no_page() -> None:
    layout = build_arena_layout((((0, 0),),), (PAGE,), (1,))
    with pytest.raises(ValueError, match="layer 0 has no KV head 1"):
        layout.head_page(0, 1)


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ((((0, 0),), ((0, 0),)), "listed twice"),
        ((((0, 0), (0, 0)), ((0, 1),)), "listed twice"),
        ((((0, 0),), ()), "members of group 1 must be sorted and not empty"),
        ((((0, 1), (0, 0)), ((0, 2),)), "members of group 0 must be sorted and not empty"),
    ],
)
def test_bad_members_are_refused(
    members: tuple[tuple[tuple[int, int], ...], ...], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        build_arena_layout(members, (PAGE, PAGE), (1, 1))


def test_arguments_of_different_lengths_are_refused() -> None:
    with pytest.raises(ValueError, match="got 1, 2, 1"):
        build_arena_layout((((0, 0),),), (PAGE, PAGE), (1,))
